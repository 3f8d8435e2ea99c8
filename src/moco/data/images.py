"""What a set of image files is: their paths and labels, decoded on demand; and its parts."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from moco.data.arrays import ArrayImages
from moco.data.cache import Cached
from moco.data.decode import BadImage, Decoded, decode, decode_shrunk, quiet_pillow
from moco.transforms import Box, crop_resize, shrink_of, shrunk_box


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
