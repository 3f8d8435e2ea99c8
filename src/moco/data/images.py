"""What a set of images is, in memory or as files that are decoded on demand, and its training and test parts."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, final, runtime_checkable

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
"""Largest number of images in memory whose pixels enter a fingerprint; they are evenly spaced."""


@runtime_checkable
class Images(Protocol):
    """A set of images: pixels in memory (`ArrayImages`), or files that are decoded on demand (`FileImages`)."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # both kinds are dataclasses, for `dataclasses.replace`

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    @property
    def paths(self) -> tuple[str, ...]:
        """A name for each image that a person recognises: its file, or a name such as `digits/train/17`."""
        ...

    @property
    def labels(self) -> Int64[Tensor, " n"] | None:
        """Index into `classes` of each image; None without labels."""
        ...

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in label order; None without labels."""
        ...

    @property
    def skipped(self) -> tuple[str, ...]:
        """Files that could not be read and are not among the images."""
        ...

    @property
    def labelled(self) -> "Images | None":
        """The images that have labels, if others have none."""
        ...

    @property
    def cache(self) -> Cached | None:
        """Decoded and shrunk pixels of files on the disk, which are then not opened any more; None without a cache."""
        ...

    @property
    def channels(self) -> int:
        """Channels of each image."""
        ...

    @property
    def in_memory(self) -> UInt8[Tensor, "n c h w"] | None:
        """All pixels if they are in memory; None for files."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the pixels take; 0 for files."""
        ...

    def decode(self, index: int) -> UInt8[Tensor, "c h w"]:
        """Return the pixels of one image. Call from one thread at a time: it may change the warning filters.

        Raises:
            BadImage: the file cannot be read.
        """
        ...

    def decode_many(self, indices: Sequence[int]) -> list[UInt8[Tensor, "_ _ _"] | BadImage]:
        """Return the pixels of several images in order, with a `BadImage` in place of each that cannot be read."""
        ...

    def crops(
        self, index: int, boxes: Callable[[int, int], Sequence[Box]], *, size: int
    ) -> list[UInt8[Tensor, "c s s"]]:
        """Return views of one image, which is decoded once. Call inside `quiet_pillow`.

        Args:
            index: position of the image.
            boxes: (height, width) -> the crop of each view.
            size: side of a view.

        Raises:
            BadImage: the file cannot be read.
        """
        ...

    def select(self, indices: Sequence[int] | Int64[Tensor, " k"]) -> "Images":
        """Return the images at these positions, in this order."""
        ...


@final
@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images of one size, all in memory. The fields are described in `Images`."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"] | None
    classes: tuple[str, ...] | None
    paths: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    labelled: Images | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def cache(self) -> None:
        return None

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def in_memory(self) -> UInt8[Tensor, "n c h w"]:
        return self.images

    @property
    def nbytes(self) -> int:
        return self.images.nbytes

    def decode(self, index: int) -> UInt8[Tensor, "c h w"]:
        return self.images[index]

    def decode_many(self, indices: Sequence[int]) -> list[UInt8[Tensor, "_ _ _"] | BadImage]:
        return [self.images[index] for index in indices]

    def crops(
        self, index: int, boxes: Callable[[int, int], Sequence[Box]], *, size: int
    ) -> list[UInt8[Tensor, "c s s"]]:
        image = self.images[index]
        return [crop_resize(image, box, size=size) for box in boxes(*image.shape[1:])]

    def select(self, indices: Sequence[int] | Int64[Tensor, " k"]) -> "ArrayImages":
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
    """Image files of any sizes, decoded on demand. The fields are described in `Images`."""

    paths: tuple[str, ...]
    labels: Int64[Tensor, " n"] | None
    classes: tuple[str, ...] | None
    skipped: tuple[str, ...] = ()
    channels: int = 3
    cache: Cached | None = None
    labelled: Images | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def in_memory(self) -> None:
        return None

    @property
    def nbytes(self) -> int:
        return 0

    def decode(self, index: int) -> UInt8[Tensor, "c h w"]:
        with quiet_pillow():
            return torch.from_numpy(self._pixels(index))

    def decode_many(self, indices: Sequence[int]) -> list[UInt8[Tensor, "_ _ _"] | BadImage]:
        def read(index: int) -> Tensor | BadImage:
            try:
                return torch.from_numpy(self._pixels(index))
            except BadImage as bad:
                return bad

        with quiet_pillow(), ThreadPoolExecutor() as pool:
            return list(pool.map(read, indices))

    def crops(
        self, index: int, boxes: Callable[[int, int], Sequence[Box]], *, size: int
    ) -> list[UInt8[Tensor, "c s s"]]:
        if self.cache is None:  # a JPEG is decoded to as few pixels as the crops need
            read = decode_shrunk(self.paths[index], self.channels, lambda *sides: shrink_of(boxes(*sides), size))
        else:
            pixels = self._pixels(index)
            read = Decoded(pixels, *pixels.shape[1:], 1)
        image = torch.from_numpy(read.pixels)
        cut = [shrunk_box(box, read.shrink, *image.shape[1:]) for box in boxes(read.height, read.width)]
        return [crop_resize(image, box, size=size) for box in cut]

    def _pixels(self, index: int) -> UInt8[np.ndarray, "c h w"]:
        return decode(self.paths[index], self.channels) if self.cache is None else self.cache.pixels(index)

    def select(self, indices: Sequence[int] | Int64[Tensor, " k"]) -> "FileImages":
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return FileImages(
            paths=tuple(self.paths[i] for i in chosen.tolist()),
            labels=None if self.labels is None else self.labels[chosen],
            classes=self.classes,
            skipped=self.skipped,
            channels=self.channels,
            cache=None if self.cache is None else self.cache.select(chosen),
        )


def with_labels(images: Images) -> Images:
    """Return the images that have labels if others have none; otherwise all images."""
    return images if images.labelled is None else images.labelled


class Splits(NamedTuple):
    """Training images, and test images if the source has them."""

    train: Images
    test: Images | None


def some_of(images: Images, most: int) -> Images:
    """Return at most `most` images, evenly spaced; those in remote shards are from a few shards (`few_shards`)."""
    if len(images) <= most:
        return images
    if images.in_memory is not None or not is_remote(images.paths[0]):
        return images.select(evenly(len(images), most).tolist())
    chosen = images.select(few_shards(images.paths, most).tolist())
    shards = len(set(map(tar_of, chosen.paths)))
    log = logging.getLogger("moco")
    log.info("of %s images elsewhere %s are looked at, in %d shards", f"{len(images):,}", f"{most:,}", shards)
    return chosen


def fingerprint(images: Images) -> str:
    """Return the SHA-256 of the names within their common folder, the labels, and some of the pixels in memory.

    Files are not opened. Many remote shards differ from local copies of them, because they are read in another order.
    """
    digest = hashlib.sha256()
    within = len(os.path.commonprefix([os.path.dirname(path) for path in (images.paths[0], images.paths[-1])]))
    for path in images.paths:
        digest.update(path[within:].encode("utf-8", "surrogateescape") + b"\0")
    if images.labels is not None:
        digest.update(images.labels.numpy())
        digest.update("\0".join(images.classes or ()).encode("utf-8", "surrogateescape"))
    pixels = images.in_memory
    if pixels is not None:
        chosen = torch.linspace(0, len(images) - 1, min(NUM_COMPARED, len(images))).long()
        digest.update(pixels[chosen].cpu().contiguous().numpy())
    elif in_windows(images.paths):
        digest.update(f"in windows of {WINDOW} shards".encode())
    return digest.hexdigest()
