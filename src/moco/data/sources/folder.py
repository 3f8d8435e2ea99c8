"""Folders of image files: what is in them, at any depth, by class or in parts."""

import os
from collections.abc import Sequence
from pathlib import Path

from moco.config import DataConfig
from moco.data.images import Splits
from moco.data.places.tar_index import SUFFIXES
from moco.data.sources.listing import HELD_OUT, Listing, first_labelled, read_listing


def load_folder(folder: Path, config: DataConfig) -> Splits:
    """Images of a folder in sorted order, hidden files left out.

    `train/` beside a folder named in `HELD_OUT` are the two splits; of several held-out ones, the first with labels.
    At least two subfolders with images and no image beside them are classes. Anything else is unlabelled images,
    however nested.

    Raises:
        ValueError: no images, a test class that training does not have, or too many unreadable files.
    """
    subfolders = {entry.name for entry in _entries(str(folder)) if _is_folder(entry)}
    held_out = [name for name in HELD_OUT if name in subfolders]
    if "train" not in subfolders or not (held_out or len(subfolders) == 1):
        return Splits(read_listing(_list(folder), folder, config, config.memory * 2**30), None)
    train_listing = _list(folder / "train")
    train = read_listing(train_listing, folder / "train", config, config.memory * 2**30)
    found = first_labelled((name, _list(folder / name, train.classes)) for name in held_out)
    if found is None:
        return Splits(train, None)
    name, listing = found
    return Splits(train, read_listing(listing, folder / name, config, config.memory * 2**30 - train.nbytes))


def _list(folder: Path, known: tuple[str, ...] | None = None) -> Listing:
    """Files and labels of one split; `known` classes come from training, and then one class subfolder is enough."""
    direct, by_folder = [], {}
    for entry in _entries(str(folder)):
        if _is_folder(entry):
            if found := _find(entry.path, _identity(str(folder))):
                by_folder[entry.name] = sorted(found)
        elif _is_image(entry):
            direct.append(entry.path)
    if direct or len(by_folder) < (1 if known else 2):
        return Listing(sorted(direct + [path for found in by_folder.values() for path in found]), None, None)
    classes = known or tuple(sorted(by_folder))
    if unknown := sorted(set(by_folder) - set(classes)):
        raise ValueError(
            f"{str(folder)!r} has the class {unknown[0]!r}, which training does not have; expected only subfolders"
            f" named as those of train/ ({_some(classes)}); rename or remove it"
        )
    labels = [label for label, name in enumerate(classes) for _ in by_folder.get(name, ())]
    return Listing([path for name in sorted(by_folder) for path in by_folder[name]], labels, classes)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"the folder {folder!r} cannot be listed: {error.strerror}; check its permissions") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symlink to itself
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    """By name; a dangling symlink counts, to be named among the unreadable. No stat but for symlinks."""
    if entry.name.rpartition(".")[2].lower() not in SUFFIXES:
        return False
    return entry.is_symlink() or entry.is_file()


def _identity(folder: str) -> frozenset[tuple[int, int]]:
    status = os.stat(folder)
    return frozenset(((status.st_dev, status.st_ino),))


def _find(folder: str, above: frozenset[tuple[int, int]]) -> list[str]:
    """Images at any depth, in no order. A folder that leads back to one above it is not entered again."""
    found, waiting = [], [(folder, above)]
    while waiting:
        folder, above = waiting.pop()
        identity = _identity(folder)
        if identity <= above:
            continue
        for entry in _entries(folder):
            if _is_folder(entry):
                waiting.append((entry.path, above | identity))
            elif _is_image(entry):
                found.append(entry.path)
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
