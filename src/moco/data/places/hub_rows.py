"""Rows of Hugging Face sets, read by the `datasets` library."""

import errno
import hashlib
import importlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from moco.data.places.addresses import HUGGING_FACE
from moco.data.places.local_file import facts_of_file, open_file
from moco.packages import install


def read_row(name: str, part: str, number: str) -> bytes:
    """Return the image file in a row of a set.

    Raises:
        OSError: there is no such row, it holds no image, or it names a file outside of its set.
        ValueError: as `rows_of`.
    """
    rows, column = rows_of(name, part)
    try:
        image = rows[int(number)][column]
    except (IndexError, ValueError):
        image = None
    if image and image["bytes"] is not None:
        return image["bytes"]
    if image and image["path"]:
        with open_file(_inside_set(name, image["path"])) as file:
            return file.read()
    raise FileNotFoundError(errno.ENOENT, "the row holds no image", f"{HUGGING_FACE}{name}/{part}/{number}")


def _inside_set(name: str, file: str) -> str:
    """Refuse a file outside of its set, because `moco pack` would copy any file that the set's author names."""
    if Path(name).is_dir():
        folders = [name]
    else:
        config = vars(library_of(name).config)
        folders = [config[each] for each in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH") if each in config]
        folders.append(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE)
    whole = Path(file).resolve()
    if not any(whole.is_relative_to(Path(folder).expanduser().resolve()) for folder in folders):
        raise PermissionError(errno.EACCES, f"the row names {file!r}, a file outside of its set")
    return str(whole)


@lru_cache(maxsize=64)
def facts_of_part(name: str, part: str) -> str:
    """Hash the library's fingerprint of a part, and size and time of change of its files; errors as `parts_of`."""
    rows = parts_of(name)[part]
    files = sorted(each["filename"] for each in rows.cache_files)
    return hashlib.sha256("\0".join([rows._fingerprint, *map(facts_of_file, files)]).encode()).hexdigest()


def column_of(rows: Any, kind: type) -> str | None:
    """Return the name of the first column of a kind; None if there is none."""
    return next((name for name, feature in rows.features.items() if isinstance(feature, kind)), None)


@lru_cache(maxsize=64)
def rows_of(name: str, part: str) -> tuple[Any, str]:
    """Return the rows of a part, with images left as files, and the name of the column of images.

    Raises:
        ValueError: there is no such column, or as `parts_of`.
    """
    library, rows = library_of(name), parts_of(name)[part]
    column = column_of(rows, library.Image)
    if column is None:
        raise ValueError(f"hf:{name} has no column of images, it has {', '.join(rows.features)}")
    # Plain rows, because a set may have been saved as one that gives tensors.
    return rows.with_format(None).cast_column(column, library.Image(decode=False)), column


@lru_cache(maxsize=16)
def parts_of(name: str) -> dict[str, Any]:
    """Load a set from a folder, or from the hub; a set without parts is its own part `train`.

    Raises:
        ValueError: the library is not installed, or it cannot load the set.
    """
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
