"""STL-10 from its authors' binary files (https://cs.stanford.edu/~acoates/stl10)."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from moco.config import DataConfig
from moco.data.images import Splits
from moco.data.places.array_rows import STL10_SHAPE
from moco.data.sources.array_file import from_rows
from moco.data.sources.named import found

FOLDER = "stl10_binary"
_FILES = ("unlabeled_X.bin", "train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "class_names.txt")
_BYTES = math.prod(STL10_SHAPE)  # of an image


def stl10(config: DataConfig) -> Splits:
    """STL-10 of 96x96 pixels: trains on the 100,000 unlabelled and the 5,000 labelled images; 8,000 are for testing.

    Where from: as `cifar10`. Training images as a whole have no labels; `labelled` of them are the 5,000, which kNN
    and evaluations look at. What exceeds `data.memory` is read from the files as it is needed.

    Raises:
        ValueError: it is not there and could not be downloaded, or a file is not what it should be.
    """
    import torchvision.datasets as tv

    return read_stl10(found("stl10", tv.STL10), config)


def stl10_folder(folder: Path) -> Path | None:
    """Return the folder with the authors' files, this one or one directly below; None if there is none."""
    places = (folder, folder / FOLDER)
    return next((place for place in places if all((place / name).is_file() for name in _FILES)), None)


def read_stl10(folder: Path, config: DataConfig) -> Splits:
    """Read the authors' files in a folder; otherwise as `stl10`."""
    classes = tuple(_bytes(folder / "class_names.txt").decode("utf-8", "replace").split())
    labels = [_labels(folder / f"{part}_y.bin", len(classes)) for part in ("train", "test")]
    counts = [_count(folder / f"{part}_X.bin") for part in ("unlabeled", "train", "test")]
    for part, known, count in zip(("train", "test"), labels, counts[1:], strict=True):
        if len(known) != count:
            raise ValueError(f"{str(folder)!r} has {count} {part} images and {len(known)} labels; get it anew")
    budget = config.memory * 2**30
    train = from_rows([str(folder / f"{part}_X.bin") for part in ("unlabeled", "train")], config.channels, budget)
    budget -= train.nbytes
    some = train.select(range(counts[0], len(train)))
    train = replace(train, labelled=replace(some, labels=labels[0], classes=classes))
    test = from_rows([str(folder / "test_X.bin")], config.channels, budget)
    return Splits(train, replace(test, labels=labels[1], classes=classes))


def _count(path: Path) -> int:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror}); get the folder anew") from None
    if size == 0 or size % _BYTES:
        raise ValueError(f"{str(path)!r} has {size} bytes; expected {_BYTES} for each image: get it anew")
    return size // _BYTES


def _labels(path: Path, num_classes: int) -> Int64[Tensor, " n"]:
    numbers = np.frombuffer(_bytes(path), np.uint8).astype(np.int64) - 1  # the authors count from 1
    if not (0 <= numbers.min(initial=0) and numbers.max(initial=-1) < num_classes):
        raise ValueError(f"{str(path)!r} has labels outside 1 to {num_classes}; get it anew")
    return torch.from_numpy(numbers)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror}); get the folder anew") from None
