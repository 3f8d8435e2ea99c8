"""Image sets of the Hugging Face hub by name, `hf:NAME`, or from a folder that `save_to_disk` wrote.

A row is read by its path, `hf:NAME/PART/ROW`, and decoded by us like any file.
"""

import errno
import hashlib
import importlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from moco.config import DataConfig
from moco.data.arrays import ArrayImages
from moco.data.images import Splits
from moco.data.listing import HELD_OUT, Listing, first_labelled, read_listing
from moco.data.members import HUGGING_FACE, facts_of, read_image
from moco.explain import install


def is_hugging_face(source: str) -> bool:
    """Whether it is `hf:NAME`, or a folder of that kind."""
    folder = Path(source).expanduser()
    saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return source.startswith(HUGGING_FACE) or saved or (folder / "dataset_dict.json").is_file()


def load_hugging_face(source: str, config: DataConfig) -> Splits:
    """Images of the first column of images, labels of the first column of classes.

    Raises:
        ValueError: the extra is not installed, there is no such set, or it has no images or too many that cannot be
            read.
    """
    name = str(Path(source).expanduser()) if not source.startswith(HUGGING_FACE) else source[len(HUGGING_FACE) :]
    if Path(name).is_dir():  # it may have been written anew
        for known in (_parts, _images_of, _facts):
            known.cache_clear()
    parts = _parts(name)
    train = "train" if "train" in parts else next(iter(parts))
    kind, budget = _library(name).Image, config.memory * 2**30
    images = read_listing(_listing(name, train), _place(name, train), config, budget)
    budget -= images.images.nbytes if isinstance(images, ArrayImages) else 0
    others = (part for part in HELD_OUT if part in parts and part != train and _column(parts[part], kind) is not None)
    # Many sets keep the labels of their test part to themselves.
    test = first_labelled((part, _listing(name, part)) for part in others)
    return Splits(images, None if test is None else read_listing(test[1], _place(name, test[0]), config, budget))


def read_row(path: str) -> bytes:
    """The image file of `hf:NAME/PART/ROW`.

    Raises:
        OSError: the row holds none, or names a file that is not of its set.
        ValueError: as `load_hugging_face`.
    """
    name, part, row = path.removeprefix(HUGGING_FACE).rsplit("/", 2)
    rows, column = _images_of(name, part)
    try:
        image = rows[int(row)][column]
    except (IndexError, ValueError):
        image = None
    if image and image["bytes"] is not None:
        return image["bytes"]
    if image and image["path"]:
        return read_image(_own(name, image["path"], path))
    raise FileNotFoundError(2, "the row holds no image", path)


def _own(name: str, file: str, path: str) -> str:
    """Whoever made a set could else have any file of whoever reads it packed, and given away."""
    if Path(name).is_dir():
        places = [name]
    else:
        cache = vars(_library(name).config)
        places = [cache[each] for each in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH") if each in cache]
        places.append(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE)
    whole = Path(file).resolve()
    if not any(whole.is_relative_to(Path(place).expanduser().resolve()) for place in places):
        raise PermissionError(errno.EACCES, f"the row names {file!r}, a file outside of its set", path)
    return str(whole)


def _listing(name: str, part: str) -> Listing:
    """Paths of all rows of a part, and their labels if each has one."""
    rows, _ = _images_of(name, part)
    if not len(rows):
        raise ValueError(f"hf:{name} has no rows in its part {part}; expected one for each image")
    paths = [f"{HUGGING_FACE}{name}/{part}/{row}" for row in range(len(rows))]
    column = _column(rows, _library(name).ClassLabel)
    labels = [] if column is None else rows[column][:]
    if column is None or any(label is None or label < 0 for label in labels):  # -1 where a set keeps them to itself
        return Listing(paths, None, None)
    return Listing(paths, labels, tuple(rows.features[column].names))


def _place(name: str, part: str) -> Path:
    """What a cache of this part is told from others by: the folder, or the name on the hub, wherever this runs."""
    return Path(name, part) if Path(name).is_dir() else Path(os.sep, HUGGING_FACE + name, part)


def facts_of_row(path: str) -> str:
    """What changes when the set that `hf:NAME/PART/ROW` is in does; errors as `load_hugging_face`."""
    name, part, _ = path.removeprefix(HUGGING_FACE).rsplit("/", 2)
    return _facts(name, part)


@lru_cache(maxsize=64)
def _facts(name: str, part: str) -> str:
    """Digest of the library's own fingerprint, and of size and time of change of the files that the rows lie in."""
    rows = _parts(name)[part]
    files = sorted(each["filename"] for each in rows.cache_files)
    return hashlib.sha256("\0".join([rows._fingerprint, *map(facts_of, files)]).encode()).hexdigest()


def _column(rows: Any, kind: type) -> str | None:
    """Name of the first column of a kind."""
    return next((name for name, feature in rows.features.items() if isinstance(feature, kind)), None)


@lru_cache(maxsize=64)
def _images_of(name: str, part: str) -> tuple[Any, str]:
    """Rows of a part with images as their files, and the column of these."""
    library, rows = _library(name), _parts(name)[part]
    column = _column(rows, library.Image)
    if column is None:
        raise ValueError(f"hf:{name} has no column of images, it has {', '.join(rows.features)}")
    # Plain rows: a set may have been saved as one that gives tensors.
    return rows.with_format(None).cast_column(column, library.Image(decode=False)), column


@lru_cache(maxsize=16)
def _parts(name: str) -> dict[str, Any]:
    library = _library(name)
    try:
        found = library.load_from_disk(name) if Path(name).is_dir() else library.load_dataset(name)
    except Exception as error:  # whatever the hub, the network or the files raise
        raise ValueError(f"hf:{name} cannot be loaded ({' '.join(str(error).split())})") from None
    return dict(found) if isinstance(found, dict) else {"train": found}


def _library(name: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise ValueError(f"hf:{name} needs an extra: run {install('hf')}") from None
