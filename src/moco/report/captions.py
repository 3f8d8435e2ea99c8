"""The pictures in a run's folder and their captions; what they show is read from pictures.json."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

NAMES = ("views", "neighbours", "map", "similarities")
"""Pictures, each of which may be in the folder as NAME.svg or NAME.png."""
SAFE = "/;=+,!@*$?~-_."
"""Characters that need no escaping in a data URI."""


class Picture(NamedTuple):
    """A picture with its heading and caption; `source` is a data URI."""

    name: str
    heading: str
    words: str
    source: str


def pictures(folder: Path, facts: Any) -> list[Picture]:
    """Return the pictures in a run's folder, as data URIs.

    Args:
        folder: folder of the run.
        facts: content of pictures.json; facts that are missing or malformed are not mentioned.
    """
    known, found = facts if isinstance(facts, dict) else {}, []
    for name in NAMES:
        source = _source(folder / name)
        if source:
            found.append(Picture(name, *_WORDS[name](_Facts(known, name)), source))
    return found


def _source(path: Path) -> str:
    """Return the picture as a data URI; an SVG is mostly base64 already, and encoding it again would enlarge it."""
    drawn, painted = (_content(path.with_suffix(ending)) for ending in (".svg", ".png"))
    if drawn.startswith(b"<svg"):
        return f"data:image/svg+xml,{quote(drawn, safe=SAFE)}"
    if painted.startswith(b"\x89PNG"):
        return f"data:image/png;base64,{base64.b64encode(painted).decode()}"
    return ""


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def asked(facts: Any) -> str:
    """Which images the table of accuracies is about, in a sentence or two."""
    part = _Facts(facts if isinstance(facts, dict) else {}, "images").word("asked")
    if part == "test":
        return "Each test image, which was not trained on, is given the label of the most similar training images."
    if part == "tenth":
        return (
            "There are no test images: every tenth training image is given the label of the most similar images among "
            "the other nine tenths. All of them were used in training, without their labels."
        )
    return "Each image is given the label of the images whose features are most similar to its own."


@dataclass(frozen=True)
class _Facts:
    known: dict[str, Any]
    picture: str

    def word(self, name: str) -> str:
        value = self._of(self.picture, name)
        return value if isinstance(value, str) else ""

    def count(self, name: str) -> int | None:
        value = self._of(self.picture, name)
        return value if isinstance(value, int) else None

    def share(self, part: str) -> str:
        """`1,000 of the 50,000 training images`, or `all 1,000 training images`."""
        some, total = self.count(part), self.count("total")
        if some is None or total is None:
            return "training images"
        return f"all {total:,} training images" if some == total else f"{some:,} of the {total:,} training images"

    def _of(self, picture: str, name: str) -> Any:
        found = self.known.get(picture)
        return found.get(name) if isinstance(found, dict) else None


def _views(facts: _Facts) -> tuple[str, str]:
    return "What the model sees", (
        "Each image is cropped and changed in two ways. The encoder learns to recognise that two such views belong "
        "together. If you cannot tell yourself, the augmentation is too strong."
    )


def _neighbours(facts: _Facts) -> tuple[str, str]:
    part = _Facts(facts.known, "images").word("asked")
    among = facts.share("among")
    if facts.word("asked") == "same":
        start = f"A few training images, with those of {among}"
    elif facts.word("asked") and part == "test":
        start = f"A few test images, which were not trained on, with those of {among}"
    elif facts.word("asked") and part == "tenth":
        start = f"A few of every tenth training image, with those of the others ({among})"
    else:
        start = "A few images, with those"
    return "Neighbours", (
        f"{start} that the encoder finds most and least similar; the number is the cosine similarity of the features."
    )


def _map(facts: _Facts) -> tuple[str, str]:
    share, drawn, shown = facts.share("shown"), facts.count("drawn"), facts.count("shown")
    dots = ""
    if shown is not None and drawn is not None and drawn < shown:
        dots = f"; the {shown - drawn:,} without room for a thumbnail are dots"
    words = (
        f"{share[0].upper()}{share[1:]} on a plane{dots}. Near neighbours are meaningful; distances between groups and "
        "the size of a group are not. Thumbnails are placed in the nearest free square of a grid."
    )
    return "Map", words


def _similarities(facts: _Facts) -> tuple[str, str]:
    of = f" of {facts.share('shown')}" if facts.count("shown") is not None else ""
    return "Similarity of views", (
        f"Cosine similarity of projections{of}, which is what the loss uses. The less the two histograms overlap, the "
        "better an image is recognised by its other view."
    )


_WORDS = {"views": _views, "neighbours": _neighbours, "map": _map, "similarities": _similarities}
