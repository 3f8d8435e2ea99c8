"""Images in an array file: .npy, which is mapped if it is large, .npz, or tensors in a .pt."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moco.config import DataConfig
from moco.data.decode import with_channels
from moco.data.images import ArrayImages, FileImages, Images, Splits
from moco.data.places.array_rows import mapped, planes
from moco.data.sources.from_python import array_images
from moco.data.sources.listing import numbered

SUFFIXES = (".npy", ".npz", ".pt", ".pth")
IMAGES, LABELS = ("images", "x", "x_train", "train_images"), ("labels", "y", "y_train", "train_labels")
"""What the arrays of an .npz or .pt may be called, in capitals or not; the first of these that is there is taken."""
TEST_IMAGES, TEST_LABELS = ("x_test", "test_images"), ("y_test", "test_labels")
_AT_ONCE = 256  # rows that are copied into memory at a time


def is_array_file(source: str) -> bool:
    """Whether it is a file with the suffix of arrays."""
    return source.lower().endswith(SUFFIXES) and Path(source).expanduser().is_file()


def load_array_file(path: Path, config: DataConfig) -> Splits:
    """Images of uint8 `[n, h, w]`, `[n, h, w, c]` or `[n, c, h, w]`; nothing that could run is ever unpickled.

    An .npy has no labels; larger than `data.memory`, it is read from the disk a row at a time. An .npz or .pt is held
    in memory, for it cannot be read in parts; names are those of `IMAGES` and so on. Labels are whole numbers or text.
    A .pt may be a single tensor.

    Raises:
        ValueError: it cannot be read, holds no images, other channels than asked for, labels that do not fit, or a
            test class that training does not have.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return Splits(from_rows([str(path)], config.channels, config.memory * 2**30), None)
    held = _from_npz(path) if suffix == ".npz" else _from_tensors(path)
    train = _part(path, "train", held, IMAGES, LABELS, None, config.channels)
    if train is None:
        raise ValueError(
            f"{str(path)!r} holds no images, it has {', '.join(held)[:200] or 'nothing'}; expected an array called"
            f" {', '.join(IMAGES[:-1])} or {IMAGES[-1]}"
        )
    return Splits(train, _part(path, "test", held, TEST_IMAGES, TEST_LABELS, train.classes, config.channels))


def from_rows(files: Sequence[str], channels: int, budget: float) -> Images:
    """Images without labels of all rows of some files, one after the other: in memory within `budget` bytes, or mapped.

    Raises:
        ValueError: a file that cannot be read, or other channels than asked for.
    """
    mapped.cache_clear()  # a file may have changed since
    try:
        arrays = [planes(mapped(file), channels) for file in files]
        first = with_channels(torch.from_numpy(np.array(arrays[0][:1])), channels)[0]
    except OSError as error:
        raise ValueError(f"{error.filename!r} cannot be read: {error.strerror}") from None
    paths = tuple(f"{file}/{row}" for file, array in zip(files, arrays, strict=True) for row in range(len(array)))
    if len(paths) * first.nbytes > budget:
        return FileImages(paths, None, None, (), channels)
    pixels = torch.empty((len(paths), *first.shape), dtype=torch.uint8)
    done = 0
    for array in arrays:
        for start in range(0, len(array), _AT_ONCE):
            part = torch.from_numpy(np.array(array[start : start + _AT_ONCE]))
            pixels[done : done + len(part)] = with_channels(part, channels)
            done += len(part)
    return ArrayImages(pixels, None, None, paths)


def _part(
    path: Path,
    part: str,
    held: Mapping[str, Any],
    names: tuple[str, ...],
    label_names: tuple[str, ...],
    known: tuple[str, ...] | None,
    channels: int,
) -> ArrayImages | None:
    given = next((held[name] for name in names if name in held), None)
    if given is None:
        return None
    try:
        images = array_images(given, channels)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None
    images = replace(images, paths=tuple(f"{path}/{part}/{row}" for row in range(len(images))))
    found = next((np.asarray(held[name]) for name in label_names if name in held), None)
    if found is None:
        return images
    if found.size != len(images) or found.dtype.kind not in "iubUS":
        raise ValueError(
            f"{str(path)!r} has labels of {found.dtype} {found.shape} for {len(images)} {part} images; expected a whole"
            " number or a name for each"
        )
    if found.dtype.kind == "i" and (found < 0).any():
        missing = int((found < 0).sum())
        logging.getLogger("moco").warning(
            "%d of %d %s images have no label; the labels of the others are not used", missing, len(images), part
        )
        return images
    texts = [
        each.decode("utf-8", "replace") if isinstance(each, bytes) else str(each) for each in found.ravel().tolist()
    ]
    numbers, classes = numbered(str(path), texts, known)
    return replace(images, labels=torch.tensor(numbers), classes=classes)


def _from_npz(path: Path) -> dict[str, Any]:
    wanted = {*IMAGES, *LABELS, *TEST_IMAGES, *TEST_LABELS, "arr_0"}
    try:
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array, not an archive of arrays: call it .npy")
            with file:
                held = {name.lower(): file[name] if name.lower() in wanted else None for name in file.files}
    except MemoryError:
        raise ValueError(
            f"{str(path)!r} does not fit into memory; save its images as .npy, which is read a row at a time"
        ) from None
    except Exception as error:  # whatever numpy, zipfile and its decompressors raise on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{str(path)!r} cannot be read as arrays ({reason})") from None
    if list(held) == ["arr_0"]:  # as numpy names what was given no name
        return {"images": held["arr_0"]}
    return held


def _from_tensors(path: Path) -> dict[str, Any]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        held = {"images": held} if isinstance(held, Tensor) else held
        if not isinstance(held, dict):
            raise ValueError(f"it holds a {type(held).__name__}, expected a tensor or a dictionary of tensors")
        return {str(name).lower(): _plain(value) for name, value in held.items()}
    except Exception as error:  # whatever torch raises on files that are not its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{str(path)!r} cannot be read as tensors alone ({reason})") from None


def _plain(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) and value.dtype != torch.bfloat16 else value
