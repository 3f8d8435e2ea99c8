"""Labels as people write them, to class numbers and names."""

from collections.abc import Sequence


def numbered(
    where: str, labels: Sequence[str], known: tuple[str, ...] | None = None
) -> tuple[list[int], tuple[str, ...]]:
    """The class number of each label, and the classes' names in order: by their size if all are whole numbers.

    Args:
        where: the labels stand, for the message.
        labels: of each image.
        known: classes of the training images, which give the numbers.

    Raises:
        ValueError: a label that is not among the known.
    """
    found = set(labels)
    if known is None:
        whole = all(name.removeprefix("-").isdecimal() for name in found)
        known = tuple(sorted(found, key=lambda name: (int(name) if whole else 0, name)))
    if unknown := sorted(found.difference(known)):
        raise ValueError(
            f"{where!r} has the test class {unknown[0]!r}, which training does not have; expected only those of the"
            " training images: leave it out or rename it"
        )
    place = {name: number for number, name in enumerate(known)}
    return list(map(place.__getitem__, labels)), known
