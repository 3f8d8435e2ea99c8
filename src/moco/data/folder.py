"""Folders of image files: what is in them, which files are readable, and images decoded on demand."""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from moco.config import DataConfig
from moco.data.arrays import ArrayImages
from moco.data.cache import Cached, cached
from moco.data.decode import BadImage, Decoded, check_header, decode, decode_shrunk, quiet_pillow
from moco.data.index import SUFFIXES
from moco.transforms import Box, crop_resize, shrink_of, shrunk_box

HELD_OUT = ("test", "val", "valid", "validation")
"""Names of the part that is kept for evaluation, of every kind of source, in the order in which they are looked for.

Where there are several, the first is taken; of folders and Hugging Face sets, which may lack labels in some, the first
with labels.
"""
SMALL_SIDE = 64
"""Images of one size up to this many pixels a side are decoded once and held, if `data.memory` allows."""
NUM_CHECKED = 100_000
"""Up to this many files every header is looked at before training; beyond, bad files show when they are read."""
NUM_NAMED = 10
"""Bad files that the log names one by one."""
_CHUNK = 256


@final
@dataclass(frozen=True, eq=False)
class FileImages:
    """Image files of any sizes, decoded when asked for."""

    paths: tuple[str, ...]
    labels: Int64[Tensor, " n"] | None
    """Index into `classes` of each image; None without labels."""
    classes: tuple[str, ...] | None
    """Names in label order."""
    skipped: tuple[str, ...] = ()
    """Files that could not be read and are not among the images."""
    channels: int = 3
    cache: Cached | None = None
    """Where the pixels lie decoded and shrunk already; the files are then not opened any more."""
    labelled: "FileImages | None" = None
    """Those of the images that have labels, where others have none."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def decode(self, index: int) -> UInt8[Tensor, "c h w"]:
        """Pixels of one image; from one thread of a process at a time, for it changes the warning filters.

        Raises:
            BadImage: the file cannot be read.
        """
        with quiet_pillow():
            return torch.from_numpy(self._pixels(index))

    def crops(
        self, index: int, boxes: Callable[[int, int], Sequence[Box]], *, size: int
    ) -> list[UInt8[Tensor, "c s s"]]:
        """Views of one image from one decoding, of as few pixels as do them no harm. Call inside `quiet_pillow`.

        Args:
            index: of the image.
            boxes: (height, width) -> the crop of each view.
            size: side of a view.

        Raises:
            BadImage: the file cannot be read.
        """
        if self.cache is None:
            read = decode_shrunk(self.paths[index], self.channels, lambda *sides: shrink_of(boxes(*sides), size))
        else:
            pixels = self._pixels(index)
            read = Decoded(pixels, *pixels.shape[1:], 1)
        image = torch.from_numpy(read.pixels)
        cut = [shrunk_box(box, read.shrink, *image.shape[1:]) for box in boxes(read.height, read.width)]
        return [crop_resize(image, box, size=size) for box in cut]

    def _pixels(self, index: int) -> UInt8[np.ndarray, "c h w"]:
        return decode(self.paths[index], self.channels) if self.cache is None else self.cache.pixels(index)

    def decode_many(self, indices: Sequence[int]) -> list[UInt8[Tensor, "_ _ _"] | BadImage]:
        """Pixels of some images by several threads, in order; in place of an unreadable one, why it is."""

        def read(index: int) -> Tensor | BadImage:
            try:
                return torch.from_numpy(self._pixels(index))
            except BadImage as bad:
                return bad

        with quiet_pillow(), ThreadPoolExecutor() as pool:
            return list(pool.map(read, indices))

    def select(self, indices: Sequence[int] | Int64[Tensor, " k"]) -> "FileImages":
        """The images at these positions, in this order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return FileImages(
            paths=tuple(self.paths[i] for i in chosen.tolist()),
            labels=None if self.labels is None else self.labels[chosen],
            classes=self.classes,
            skipped=self.skipped,
            channels=self.channels,
            cache=None if self.cache is None else self.cache.select(chosen),
        )


Images = ArrayImages | FileImages


def with_labels(images: Images) -> Images:
    """Those of the images that have labels, where others have none; else all, with labels or without."""
    return images if images.labelled is None else images.labelled


class Splits(NamedTuple):
    """Training images, and test images where the source has them."""

    train: Images
    test: Images | None


class _Listing(NamedTuple):
    """Paths in order; of labelled ones also the class of each."""

    paths: list[str]
    labels: list[int] | None
    classes: tuple[str, ...] | None


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
        return Splits(_read(_list(folder), folder, config, config.memory * 2**30), None)
    train_listing = _list(folder / "train")
    train = _read(train_listing, folder / "train", config, config.memory * 2**30)
    found = first_labelled((name, _list(folder / name, train.classes)) for name in held_out)
    if found is None:
        return Splits(train, None)
    name, listing = found
    used = train.images.nbytes if isinstance(train, ArrayImages) else 0
    return Splits(train, _read(listing, folder / name, config, config.memory * 2**30 - used))


def first_labelled(parts: Iterable[tuple[str, _Listing]]) -> tuple[str, _Listing] | None:
    """The first part with labels, after which no more are looked at; the first of all where none has any."""
    first = None
    for part in parts:
        if part[1].labels is not None:
            return part
        first = first or part
    return first


def _list(folder: Path, known: tuple[str, ...] | None = None) -> _Listing:
    """Files and labels of one split; `known` classes come from training, and then one class subfolder is enough."""
    direct, by_folder = [], {}
    for entry in _entries(str(folder)):
        if _is_folder(entry):
            if found := _find(entry.path, _identity(str(folder))):
                by_folder[entry.name] = sorted(found)
        elif _is_image(entry):
            direct.append(entry.path)
    if direct or len(by_folder) < (1 if known else 2):
        return _Listing(sorted(direct + [path for found in by_folder.values() for path in found]), None, None)
    classes = known or tuple(sorted(by_folder))
    if unknown := sorted(set(by_folder) - set(classes)):
        raise ValueError(
            f"{str(folder)!r} has the class {unknown[0]!r}, which training does not have; expected only subfolders"
            f" named as those of train/ ({_some(classes)}); rename or remove it"
        )
    labels = [label for label, name in enumerate(classes) for _ in by_folder.get(name, ())]
    return _Listing([path for name in sorted(by_folder) for path in by_folder[name]], labels, classes)


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


def _read(listing: _Listing, folder: Path, config: DataConfig, budget: float) -> Images:
    """Holds the images where they are small and alike, else checks their headers; drops the unreadable."""
    paths, labels, classes = listing
    if not paths:
        raise ValueError(f"no images in {str(folder)!r}; expected files ending in {', '.join(sorted(SUFFIXES))}")
    bad: dict[int, BadImage] = {}
    cache = None
    with quiet_pillow():
        pixels = _read_small(paths, config.channels, budget, bad)
        if pixels is None and config.cache:
            side, channels = config.cache_side, config.channels
            cache, bad = cached(paths, folder.resolve(), folder=config.cache, side=side, channels=channels)
        elif pixels is None and len(paths) <= NUM_CHECKED:
            bad |= _failures(paths, check_header)
    report_bad(list(bad.values()), len(paths), config.max_bad)
    good = [i for i in range(len(paths)) if i not in bad]
    if pixels is not None and bad:
        pixels = pixels[good]
    kept = tuple(paths[i] for i in good)
    known = None if labels is None else torch.tensor(labels)[good]
    skipped = tuple(paths[i] for i in sorted(bad))
    if pixels is None:
        return FileImages(kept, known, classes, skipped, config.channels, cache and cache.select(torch.tensor(good)))
    return ArrayImages(torch.from_numpy(pixels), known, classes, kept, skipped)


def report_bad(bad: Sequence[BadImage], num_images: int, max_bad: float) -> None:
    """Names unreadable files in the log.

    Raises:
        ValueError: they are more than the fraction `max_bad` of `num_images`, or all.
    """
    if bad and (len(bad) > max_bad * num_images or len(bad) == num_images):
        raise ValueError(
            f"{len(bad)} of {num_images} files cannot be read, expected at most {max_bad:.2%}; remove them or raise"
            f" data.max_bad: " + "; ".join(f"{each.path!r} ({each.reason})" for each in bad[:5])
        )
    log = logging.getLogger("moco")
    for each in bad[:NUM_NAMED]:
        log.warning("skipped: %s", each)
    if len(bad) > NUM_NAMED:
        log.warning("skipped: %d more files, %d of %d in all", len(bad) - NUM_NAMED, len(bad), num_images)


def _read_small(
    paths: list[str], channels: int, budget: float, bad: dict[int, BadImage]
) -> UInt8[np.ndarray, "n c h w"] | None:
    """All pixels, if all images are small, of one size and within `budget` bytes; `bad` receives the unreadable."""
    shape = next((shape for shape in map(lambda path: _shape(path, channels), paths) if shape), None)
    if shape is None or max(shape) > SMALL_SIDE or len(paths) * np.prod(shape) > budget:
        return None
    pixels = np.zeros((len(paths), *shape), dtype=np.uint8)
    unequal = threading.Event()

    def read(i: int) -> None:
        if not unequal.is_set():
            one = decode(paths[i], channels)
            if one.shape == shape:
                pixels[i] = one
            else:
                unequal.set()

    bad.update(_failures(range(len(paths)), read))
    return None if unequal.is_set() else pixels


def _shape(path: str, channels: int) -> tuple[int, ...] | None:
    try:
        return decode(path, channels).shape
    except BadImage:
        return None


def _failures(items: Sequence[Any], work: Callable[[Any], object]) -> dict[int, BadImage]:
    """Does `work` on every item by several threads; returns what failed, by position."""

    def chunk(start: int) -> Iterable[tuple[int, BadImage]]:
        failed = []
        for i, item in enumerate(items[start : start + _CHUNK], start):
            try:
                work(item)
            except BadImage as error:
                failed.append((i, error))
        return failed

    # A chunk is a task: handing over single files would cost more than reading small ones.
    with ThreadPoolExecutor() as pool:
        return {i: error for failed in pool.map(chunk, range(0, len(items), _CHUNK)) for i, error in failed}


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
