"""Equally sized images, held in memory as one tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor


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


def planes(array: UInt8[np.ndarray, "..."], channels: int) -> UInt8[np.ndarray, "n c h w"]:
    """A view of `[n, h, w]`, `[n, h, w, c]` or `[n, c, h, w]` as the last of these.

    The axis of the channels is the last if it has a number that will do for `channels`, else the second if that does;
    failing both, the shorter one.
    """
    if array.ndim == 3:
        return array[:, None]
    will_do = (1, 3) if channels in (1, 3) else (channels,)
    second, last = array.shape[1], array.shape[-1]
    is_second = last not in will_do and (second in will_do or second < last)
    return array if is_second else np.moveaxis(array, -1, 1)
