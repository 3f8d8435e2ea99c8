"""Crops of images: where they are, cutting them out, resizing and flipping them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

ImageBatch = Float[Tensor, "n c h w"]  # values in [0, 1], or normalised
PerImage = Float[Tensor, " n"]


def resampling(start: PerImage, length: PerImage, flip: Tensor, size: int, full: int) -> Float[Tensor, "n s f"]:
    """Return the matrices that cut [start, start + length) out of `full` pixels and resize it to `size`.

    Their rows are the triangle filter of Pillow and of torchvision's antialiased bilinear resize, which is wider when
    the crop shrinks, and takes nothing from outside the crop.
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


def crop_resize_flip(
    images: ImageBatch, box: Float[Tensor, "n 4"], flip: Tensor, size: int
) -> Float[Tensor, "n c s s"]:
    """Crop to (top, left, height, width), resize to `size` x `size` and flip, all as two matrix products."""
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
    """Return the largest central crop whose width over height lies in `ratio`."""
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def crop_resize(image: UInt8[Tensor, "c h w"], box: Box, *, size: int) -> UInt8[Tensor, "c {size} {size}"]:
    """Crop one image and resize it to `size` x `size` (bilinear, antialiased), as torchvision's `resized_crop` does."""
    part = image[None, :, box.top : box.top + box.height, box.left : box.left + box.width]
    # torch resizes integers twice as fast if the channels of a pixel are next to each other in memory.
    part = part.contiguous(memory_format=torch.channels_last)
    return F.interpolate(part, size=(size, size), mode="bilinear", antialias=True)[0]


def shrink_of(boxes: Sequence[Box], size: int) -> int:
    """Return by how much to shrink an image, 8, 4, 2 or 1, so that each side of every crop keeps `size` pixels."""
    smallest = min(min(box.height, box.width) for box in boxes)
    return next(factor for factor in (8, 4, 2, 1) if factor == 1 or smallest >= factor * size)


def shrunk_box(box: Box, factor: int, height: int, width: int) -> Box:
    """Return the same crop in the image shrunk by `factor`, which has `height` and `width`."""
    if factor == 1:
        return box
    h, w = box.height // factor, box.width // factor
    return Box(min(round(box.top / factor), height - h), min(round(box.left / factor), width - w), h, w)
