"""Cropping, resizing and flipping."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

Batch = Float[Tensor, "n c h w"]
PerImage = Float[Tensor, " n"]


def resampling(start: PerImage, length: PerImage, flip: Tensor, size: int, full: int) -> Float[Tensor, "n s f"]:
    """Rows of weights that cut [start, start + length) out of `full` pixels and resize it to `size`.

    The triangle filter of Pillow and of torchvision's antialiased bilinear resize: it widens when the crop shrinks, and
    takes nothing from outside the crop.
    """
    scale = (length / size)[:, None]
    positions = torch.arange(size, device=start.device)
    positions = torch.where(flip[:, None], size - 1 - positions, positions)
    centre = (positions + 0.5) * scale + start[:, None]  # n s
    pixels = torch.arange(full, device=start.device) + 0.5
    weight = (1 - (pixels - centre[:, :, None]).abs() / scale.clamp(min=1)[:, :, None]).clamp(min=0)
    inside = (pixels > start[:, None]) & (pixels < (start + length)[:, None])  # n f
    weight = weight * inside[:, None, :]
    return weight / weight.sum(dim=2, keepdim=True)


def crop_resize_flip(images: Batch, box: Float[Tensor, "n 4"], flip: Tensor, size: int) -> Float[Tensor, "n c s s"]:
    """Crops (top, left, height, width), resizes to `size` x `size` and flips, all as two matrix products."""
    top, left, height, width = box.unbind(dim=1)
    rows = resampling(top, height, torch.zeros_like(flip), size, images.shape[2])
    columns = resampling(left, width, flip, size, images.shape[3])
    return rows[:, None] @ (images @ columns[:, None].mT)


class Box(NamedTuple):
    """A crop, in pixels of the image."""

    top: int
    left: int
    height: int
    width: int


def whole_box(height: int, width: int, ratio: tuple[float, float]) -> Box:
    """The largest crop in the middle whose width over height lies in `ratio`."""
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def crop_resize(image: UInt8[Tensor, "c h w"], box: Box, *, size: int) -> UInt8[Tensor, "c {size} {size}"]:
    """Crops one image and resizes it to `size` x `size` (bilinear, antialiased), as torchvision's `resized_crop`."""
    part = image[None, :, box.top : box.top + box.height, box.left : box.left + box.width]
    # torch resizes whole numbers twice as fast where the channels of a pixel lie together.
    part = part.contiguous(memory_format=torch.channels_last)
    return F.interpolate(part, size=(size, size), mode="bilinear", antialias=True)[0]


def shrink_of(boxes: Sequence[Box], size: int) -> int:
    """How many pixels may become one, 8, 4, 2 or 1, so that every crop still has `size` of them or more a side."""
    smallest = min(min(box.height, box.width) for box in boxes)
    return next(factor for factor in (8, 4, 2, 1) if factor == 1 or smallest >= factor * size)


def shrunk_box(box: Box, factor: int, height: int, width: int) -> Box:
    """The crop in an image of `height` and `width` of which each pixel stands for so many of the box's in a row."""
    if factor == 1:
        return box
    h, w = box.height // factor, box.width // factor
    return Box(min(round(box.top / factor), height - h), min(round(box.left / factor), width - w), h, w)
