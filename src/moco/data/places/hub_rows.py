"""Rows of Hugging Face sets."""

import errno
import hashlib
import importlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from moco.data.places.local_file import facts_of_file, open_file
from moco.packages import install

HUGGING_FACE = "hf:"
"""Before the paths of rows of Hugging Face sets."""


def read_row(path: str) -> bytes:
    """The image file of `hf:NAME/PART/ROW`.

    Raises:
        OSError: the row holds none, or names a file that is not of its set.
        ValueError: as `load_hugging_face`.
    """
    name, part, row = path.removeprefix(HUGGING_FACE).rsplit("/", 2)
    rows, column = rows_of(name, part)
    try:
        image = rows[int(row)][column]
    except (IndexError, ValueError):
        image = None
    if image and image["bytes"] is not None:
        return image["bytes"]
    if image and image["path"]:
        with open_file(_own(name, image["path"], path)) as file:
            return file.read()
    raise FileNotFoundError(2, "the row holds no image", path)


def _own(name: str, file: str, path: str) -> str:
    """Whoever made a set could else have any file of whoever reads it packed, and given away."""
    if Path(name).is_dir():
        places = [name]
    else:
        cache = vars(library_of(name).config)
        places = [cache[each] for each in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH") if each in cache]
        places.append(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE)
    whole = Path(file).resolve()
    if not any(whole.is_relative_to(Path(place).expanduser().resolve()) for place in places):
        raise PermissionError(errno.EACCES, f"the row names {file!r}, a file outside of its set", path)
    return str(whole)


def facts_of_row(path: str) -> str:
    """What changes when the set that `hf:NAME/PART/ROW` is in does; errors as `load_hugging_face`."""
    name, part, _ = path.removeprefix(HUGGING_FACE).rsplit("/", 2)
    return facts_of_part(name, part)


@lru_cache(maxsize=64)
def facts_of_part(name: str, part: str) -> str:
    """Digest of the library's own fingerprint, and of size and time of change of the files that the rows lie in."""
    rows = parts_of(name)[part]
    files = sorted(each["filename"] for each in rows.cache_files)
    return hashlib.sha256("\0".join([rows._fingerprint, *map(facts_of_file, files)]).encode()).hexdigest()


def column_of(rows: Any, kind: type) -> str | None:
    """Name of the first column of a kind."""
    return next((name for name, feature in rows.features.items() if isinstance(feature, kind)), None)


@lru_cache(maxsize=64)
def rows_of(name: str, part: str) -> tuple[Any, str]:
    """Rows of a part with images as their files, and the column of these."""
    library, rows = library_of(name), parts_of(name)[part]
    column = column_of(rows, library.Image)
    if column is None:
        raise ValueError(f"hf:{name} has no column of images, it has {', '.join(rows.features)}")
    # Plain rows: a set may have been saved as one that gives tensors.
    return rows.with_format(None).cast_column(column, library.Image(decode=False)), column


@lru_cache(maxsize=16)
def parts_of(name: str) -> dict[str, Any]:
    library = library_of(name)
    try:
        found = library.load_from_disk(name) if Path(name).is_dir() else library.load_dataset(name)
    except Exception as error:  # whatever the hub, the network or the files raise
        raise ValueError(f"hf:{name} cannot be loaded ({' '.join(str(error).split())})") from None
    return dict(found) if isinstance(found, dict) else {"train": found}


def library_of(name: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise ValueError(f"hf:{name} needs an extra: run {install('hf')}") from None
