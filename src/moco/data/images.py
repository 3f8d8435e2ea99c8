"""What a set of images is: held in memory, or files that are decoded on demand; and its parts."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from moco.data.cache import Cached
from moco.data.decode import Decoded, decode, decode_shrunk, quiet_pillow
from moco.data.places.addresses import is_remote, tar_of
from moco.data.places.shard_order import WINDOW, few_shards, in_windows
from moco.data.spacing import evenly
from moco.data.unreadable import BadImage
from moco.views.crops import Box, crop_resize, shrink_of, shrunk_box

NUM_COMPARED = 256
"""Images in memory of which a fingerprint holds the pixels, evenly spaced ones of more."""


@final
@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images of one size, all in memory."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"] | None
    """Index into `classes` of each image; None without labels."""
    classes: tuple[str, ...] | None
    """Names in label order."""
    paths: tuple[str, ...]
    """A name for each image that a person recognises: its file, or like `digits/train/17`."""
    skipped: tuple[str, ...] = ()
    """Files that could not be read and are not among the images."""
    labelled: "ArrayImages | None" = None
    """Those of the images that have labels, where others have none."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def decode(self, index: int) -> UInt8[Tensor, "c h w"]:
        """Pixels of one image."""
        return self.images[index]

    def select(self, indices: Sequence[int] | Int64[Tensor, " k"]) -> "ArrayImages":
        """The images at these positions, in this order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return ArrayImages(
            images=self.images[chosen],
            labels=None if self.labels is None else self.labels[chosen],
            classes=self.classes,
            paths=tuple(self.paths[i] for i in chosen.tolist()),
            skipped=self.skipped,
        )


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


def some_of(images: Images, most: int) -> Images:
    """All images, or so many at even distances; those in remote shards from few of them (`few_shards`)."""
    if len(images) <= most:
        return images
    if isinstance(images, ArrayImages) or not is_remote(images.paths[0]):
        return images.select(evenly(len(images), most).tolist())
    chosen = images.select(few_shards(images.paths, most).tolist())
    shards = len(set(map(tar_of, chosen.paths)))
    log = logging.getLogger("moco")
    log.info("of %s images elsewhere %s are looked at, in %d shards", f"{len(images):,}", f"{most:,}", shards)
    return chosen


def fingerprint(images: Images) -> str:
    """SHA-256 of the names, without the folder that all lie in, of the labels, and of some pixels in memory.

    Files are not opened. Many shards elsewhere are other images than their copies here: they come in another order.
    """
    digest = hashlib.sha256()
    within = len(os.path.commonprefix([os.path.dirname(path) for path in (images.paths[0], images.paths[-1])]))
    for path in images.paths:
        digest.update(path[within:].encode("utf-8", "surrogateescape") + b"\0")
    if images.labels is not None:
        digest.update(images.labels.numpy())
        digest.update("\0".join(images.classes or ()).encode("utf-8", "surrogateescape"))
    if isinstance(images, ArrayImages):
        chosen = torch.linspace(0, len(images) - 1, min(NUM_COMPARED, len(images))).long()
        digest.update(images.images[chosen].cpu().contiguous().numpy())
    elif in_windows(images.paths):
        digest.update(f"in windows of {WINDOW} shards".encode())
    return digest.hexdigest()
