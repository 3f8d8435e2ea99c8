"""Images in, from a name or a folder: `load_data` finds them, `Loader` deals them out."""

import logging
from collections.abc import Callable
from pathlib import Path

from moco.config import DataConfig
from moco.data.images import ArrayImages, FileImages, Images, Splits, fingerprint, some_of, with_labels
from moco.data.loader import Loader, epoch_order, resized
from moco.data.sources.array_file import is_array_file, load_array_file
from moco.data.sources.file_list import is_list, load_list
from moco.data.sources.folder import load_folder
from moco.data.sources.from_python import as_images
from moco.data.sources.hugging_face import is_hugging_face, load_hugging_face
from moco.data.sources.named import cifar10, cifar100, cifar_folder, digits, imagenet
from moco.data.sources.shards import is_shards, load_shards
from moco.data.sources.stl10 import read_stl10, stl10, stl10_folder
from moco.data.unreadable import BadImage
from moco.messages import closest

__all__ = [
    "DATASETS",
    "GIVEN",
    "ArrayImages",
    "BadImage",
    "FileImages",
    "Images",
    "Loader",
    "Splits",
    "as_images",
    "epoch_order",
    "fingerprint",
    "load_data",
    "resized",
    "some_of",
    "with_labels",
]

GIVEN = "given"
"""In place of a source, in the settings of a run whose images a program handed over."""

DATASETS: dict[str, Callable[[DataConfig], Splits]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "stl10": stl10,
    "imagenet": imagenet,
}


def load_data(config: DataConfig) -> Splits:
    """Images of `config.source`: a name in `DATASETS`, a folder of images, a list, an array file, shards, or `hf:NAME`.

    A folder may also be one with CIFAR's python files or STL-10's binary ones. Shards are a tar, a pattern or folder of
    tars, or their URL.

    Example:
        >>> load_data(DataConfig(source="digits")).train.images.shape
        torch.Size([1442, 3, 8, 8])

    Raises:
        ValueError: neither a known name nor a folder, no images in it, or too many that cannot be read.
    """
    splits = _load(config)
    if config.cache and not any(part and part.cache for part in splits):
        logging.getLogger("moco").warning(
            "data.cache %s is not used: the images are %s, so there is nothing to decode",
            config.cache,
            "rows of an array" if splits.train.in_memory is None else "held in memory",
        )
    return splits


def _load(config: DataConfig) -> Splits:
    if config.source == GIVEN:
        raise ValueError("this run's images were handed over by a program; hand them over again with data=...")
    if is_array_file(config.source):
        return load_array_file(Path(config.source).expanduser(), config)
    _refuse_channels(config)
    if config.source in DATASETS:
        return DATASETS[config.source](config)
    if is_list(config.source):
        return load_list(Path(config.source).expanduser(), config)
    if is_hugging_face(config.source):
        return load_hugging_face(config.source, config)
    if is_shards(config.source):
        return load_shards(config.source, config)
    folder = Path(config.source).expanduser()
    if folder.is_dir():
        if binary := stl10_folder(folder):
            return read_stl10(binary, config)
        read = cifar_folder(folder)
        return read(config) if read else load_folder(folder, config)
    raise ValueError(
        f"data source {config.source!r} {'is a file' if folder.exists() else 'does not exist'}; expected one of"
        f" {', '.join(DATASETS)}, or a folder of images or tar shards, a list (.csv, .tsv, .parquet) or an array file"
        f" (.npy, .npz, .pt){closest(config.source, list(DATASETS))}"
    )


def _refuse_channels(config: DataConfig) -> None:
    if config.channels not in (1, 3):
        raise ValueError(
            f"data.channels is {config.channels}; {config.source!r} is read with 1 or 3: give images of"
            f" {config.channels} channels as an array file (.npy, .npz, .pt) or from Python as a uint8 array or tensor"
        )
