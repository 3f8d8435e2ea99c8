"""A folder of embeddings: vectors on disk, the image of each, and what they were computed with.

vectors.npy      float32 [N, F], which numpy can memory-map: np.load(..., mmap_mode="r")
images.csv       path, label and class of each row
unreadable.csv   images that have no row, and why
meta.json        encoder, images, settings and versions; also the progress while rows are being added
"""

import csv
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, InstanceOf, ValidationError

from moco.config import DataConfig
from moco.data import DATASETS, FileImages, Images, load_data
from moco.data.sources.shards import is_shards
from moco.data.spacing import evenly
from moco.method.encoder import ImageEncoder

FORMAT = 1
"""Version of the folder's format; raised when older versions could no longer read new folders correctly."""
STREAMED = 1e-9
"""GiB of decoded images to keep in memory: none."""
VECTORS, IMAGES, UNREADABLE, META = "vectors.npy", "images.csv", "unreadable.csv", "meta.json"
HEADS = {IMAGES: ("path", "label", "class"), UNREADABLE: ("path", "reason")}
FILES = (VECTORS, *HEADS, META)
NUM_CHECKED = 16
"""Rows whose paths are checked to see whether the files still exist."""


@dataclass(frozen=True)
class Embeddings:
    """Features of images, one row per image, in the order of the images.

    Attributes:
        vectors: features, float32 `[N, F]`.
        paths: path or name of each row's image.
        labels: class numbers `[N]`, or None.
        classes: names of the classes, or None.
        encoder: the encoder that computed them, if it is available.
        folder: where they are on disk, if they are; `vectors` is then memory-mapped and read-only.
    """

    vectors: np.ndarray
    paths: tuple[str, ...]
    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    encoder: ImageEncoder | None = field(default=None, repr=False, compare=False)
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def class_of(self, row: int) -> str | None:
        """Name of the class of a row, if it has one."""
        return None if self.labels is None or self.classes is None else self.classes[int(self.labels[row])]


Name = InstanceOf[str]
"""Text that need not be valid UTF-8, unlike pydantic's own strings, because file names need not be."""


class Settings(BaseModel, frozen=True):
    """Everything that the values in a table depend on; if one differs, it is another table."""

    encoder: str
    """SHA-256 of the encoder's weights and description."""
    images: str
    """SHA-256 of the names and labels in order, and of pixels that are in memory."""
    precision: str
    batch_size: int


class Meta(BaseModel, frozen=True):
    """Content of meta.json."""

    format: int = FORMAT
    complete: bool = False
    rows: int = 0
    columns: int
    unreadable: int = 0
    settings: Settings
    encoder: dict[str, Any]
    """Description from `ImageEncoder.describe`."""
    encoder_source: Name | None
    """Where the encoder was loaded from, or None."""
    images_source: Name | None
    """Absolute path of the folder, or name of the images; None if they were passed in by a program."""
    part: str
    """Which part of the images: `train`, `test`."""
    classes: tuple[Name, ...] | None
    start: int = 0
    """First image of this folder; of several processes, each has a folder for some of the images."""
    stop: int
    done: int = 0
    """Number of the first image that has not been processed yet."""
    written: dict[str, int] | None = None
    """Valid bytes of each file, while rows are being added."""
    versions: dict[str, str]


def load(folder: str | Path) -> Embeddings:
    """Load a finished table; its vectors stay on disk, memory-mapped and read-only.

    Raises:
        FileNotFoundError: there is no table.
        ValueError: it is unfinished or damaged, or a newer version wrote it.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    if not meta.complete:
        progress = f"{meta.done} of {meta.stop} images"
        raise ValueError(f"{folder} is unfinished: {progress}; run the same `moco embed` command again to resume")
    if not meta.rows:
        raise ValueError(f"{folder} has no rows: none of the images could be read; {UNREADABLE} in it says why")
    try:
        vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
        with (folder / IMAGES).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            lines = csv.reader(file)
            head, paths, labels = tuple(next(lines, ())), list[str](), list[int]()
            for path, label, _ in lines:
                paths.append(path)
                labels += [int(label)] if label else []
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise ValueError(f"{folder} is damaged ({' '.join(str(error).split())}); embed the images again") from None
    if vectors.shape != (meta.rows, meta.columns) or vectors.dtype != np.float32 or len(paths) != meta.rows:
        raise ValueError(
            f"{folder} is damaged: {vectors.dtype} vectors of shape {vectors.shape} and {len(paths)} names, expected "
            f"float32 {(meta.rows, meta.columns)}; embed the images again"
        )
    known = range(len(meta.classes or ()))
    if head != HEADS[IMAGES] or len(labels) not in (0, meta.rows) or not all(label in known for label in labels):
        raise ValueError(f"{folder / IMAGES} does not match meta.json; embed the images again")
    return Embeddings(vectors, tuple(paths), np.array(labels) if labels else None, meta.classes, folder=folder)


def read_meta(folder: str | Path) -> Meta:
    """Read meta.json of a finished or unfinished table; raises the same errors as `load`."""
    path = Path(folder) / META
    if not path.is_file():
        what = "only what several processes have begun to write" if process_folders(Path(folder)) else f"no {META}"
        raise FileNotFoundError(f"{folder} holds {what}; expected a folder that `moco embed` has finished")
    try:
        meta = Meta.model_validate(json.loads(path.read_bytes()))
    except ValueError as error:
        what = " ".join(str(error).split())
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            what = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise ValueError(f"{path} does not describe embeddings ({what}); embed the images again") from None
    if meta.format > FORMAT:
        raise ValueError(f"{path} has format {meta.format}, but this version reads formats up to {FORMAT}; update moco")
    return meta


def process_folders(folder: Path) -> list[Path]:
    """Return the folders within a table that several processes write, one each; they hold nothing else."""
    return [
        each
        for each in sorted(folder.glob("share-*-of-*"))
        if re.fullmatch(r"share-\d{5}-of-\d{5}", each.name) and each.is_dir() and not each.is_symlink()
        if all(file.name in FILES or file.name.startswith(".") for file in each.iterdir())
    ]


def images_of(embeddings: Embeddings) -> Images | None:
    """Return the images of the rows, if they still exist: the files at their paths, or those of the named data set.

    Files that no longer exist cannot be decoded; the others can.
    """
    meta = read_meta(embeddings.folder) if embeddings.folder else None
    paths, channels = embeddings.paths, int(meta.encoder.get("channels", 3)) if meta else 3
    files = FileImages(paths, None, None, (), channels)
    if any(Path(paths[row]).is_file() for row in evenly(len(paths), NUM_CHECKED)):
        return files
    if meta is None or meta.images_source is None:
        return None
    try:
        found = load_part(meta.images_source, meta.part, channels)
    except (ValueError, OSError):  # they no longer exist
        return None
    index_of = {path: index for index, path in enumerate(found.paths)}
    if all(path in index_of for path in paths):
        return found.select([index_of[path] for path in paths])
    return files if found.in_memory is None and any(path in index_of for path in paths) else None


def absolute_source(source: str) -> str:
    """Return the absolute path of a folder or of shards, to find it from anywhere; other names stay unchanged."""
    if source in DATASETS or "://" in source or source.startswith("hf:"):
        return source
    path = os.path.abspath(os.path.expanduser(source))
    return path if os.path.exists(path) or is_shards(path) else source


def load_part(source: str, part: str, channels: int) -> Images:
    """Return the training or test images of a folder or named data set, not decoded yet, without unreadable ones.

    Raises:
        ValueError: there are no such images.
    """
    settings = {"source": source, "channels": channels, "memory": STREAMED, "max_bad": 1.0}
    splits = load_data(DataConfig.model_validate(settings))
    if part not in ("train", "test"):
        raise ValueError(f"part is {part!r}; expected train or test")
    images = splits.train if part == "train" else splits.test
    if images is None:
        raise ValueError(f"{source} has no test images; expected a folder with train/ and test/, or leave out --part")
    return images
