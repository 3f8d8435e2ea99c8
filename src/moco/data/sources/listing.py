"""From a list of image files to images: which are readable, which are held, and which part is which."""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8

from moco.config import DataConfig
from moco.data.cache import cached
from moco.data.decode import check_header, decode, has_16_bits, quiet_pillow
from moco.data.images import ArrayImages, FileImages, Images
from moco.data.places.tar_index import SUFFIXES
from moco.data.spacing import evenly
from moco.data.unreadable import BadImage, report_bad

HELD_OUT = ("test", "val", "valid", "validation")
"""Names of the part that is kept for evaluation, of every kind of source, in the order in which they are looked for.

Where there are several, the first is taken; of folders and Hugging Face sets, which may lack labels in some, the first
with labels.
"""
SMALL_SIDE = 64
"""Images of one size up to this many pixels a side are decoded once and held, if `data.memory` allows."""
NUM_CHECKED = 100_000
"""Up to this many files every header is looked at before training; beyond, bad files show when they are read."""
SAMPLED = 10
"""Images whose headers tell whether there are some of 16 bits."""

_CHUNK = 256


class Listing(NamedTuple):
    """Paths in order; of labelled ones also the class of each."""

    paths: list[str]
    labels: list[int] | None
    classes: tuple[str, ...] | None


def first_labelled(parts: Iterable[tuple[str, Listing]]) -> tuple[str, Listing] | None:
    """Return the first part with labels, after which no more are looked at; the first of all where none has any."""
    first = None
    for part in parts:
        if part[1].labels is not None:
            return part
        first = first or part
    return first


def read_listing(listing: Listing, folder: Path, config: DataConfig, budget: float) -> Images:
    """Load the images if they are small and of one size, otherwise check their headers; drop unreadable ones."""
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
    with quiet_pillow():
        wide = next(filter(has_16_bits, (kept[i] for i in evenly(len(kept), SAMPLED))), None)
        if wide is not None:
            logging.getLogger("moco").warning(
                "%r has 16 bits; read, they are scaled to 8: 65535 becomes 255. If your images use less of that range, "
                "as scans of 12 bits do, they become too dark: scale them first",
                wide,
            )
    known = None if labels is None else torch.tensor(labels)[good]
    skipped = tuple(paths[i] for i in sorted(bad))
    if pixels is None:
        return FileImages(kept, known, classes, skipped, config.channels, cache and cache.select(torch.tensor(good)))
    return ArrayImages(torch.from_numpy(pixels), known, classes, kept, skipped)


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
    """Do `work` on every item in several threads; return what failed, by position."""

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


def numbered(
    where: str, labels: Sequence[str], known: tuple[str, ...] | None = None
) -> tuple[list[int], tuple[str, ...]]:
    """Return the class number of each label, and the classes' names in order: by their size if all are whole numbers.

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
