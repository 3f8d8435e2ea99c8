"""Colour jitter, conversion to grey and blur of a batch of images."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from moco.views.crops import ImageBatch, PerImage
from moco.views.pixels import constant

LARGE = 50_000
"""Values per image above which a CPU is faster when it finishes one group of images before it starts the next."""


def to_grey(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1 h w"]:
    """Return the luma of ITU-R BT.601, with torchvision's weights."""
    red, green, blue = images.unbind(dim=1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def shift_hue_(images: Float[Tensor, "n 3 h w"], turns: PerImage) -> None:
    """Shift the hue by a fraction of a full turn, in HSV, in place.

    The circle of hues has six steps. A pixel is |d| = 1 + (green + blue - red - low) / chroma steps away from red, in
    the direction given by the sign of green - blue. A channel at distance |d| from the hue, by the shorter way around,
    has the value low + chroma * clip(2 - |d|, 0, 1). This is the conversion to HSV and back, without branches.
    """
    red, green, blue = images.unbind(dim=1)
    high = torch.maximum(red, green)
    low = torch.minimum(red, green)
    torch.maximum(high, blue, out=high)
    torch.minimum(low, blue, out=low)
    chroma = high.sub_(low)
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-12)).add_(1).copysign_(green - blue)
    hue.add_(6 * turns[:, None, None])
    hue.sub_(
        (hue / 6).round_(), alpha=6
    )  # from -3 to 3; a channel is up to |d| = 5 away, and 3 - ||d| - 3| by the shorter way
    away = hue[:, None] - constant((0.0, 2.0, -2.0), images.device, images.dtype)
    away = away.abs_().sub_(3).abs_().clamp_(1, 2)
    torch.addcmul(low.sub_(chroma)[:, None], chroma[:, None], away, out=images)


def jitter_colour_(images: ImageBatch, strength: Float[Tensor, "n 4"], order: Int64[Tensor, "n 4"]) -> ImageBatch:
    """Change brightness, contrast, saturation and hue of each image in its own order, in place.

    `order` is on the CPU. Images with the same order are processed fastest if they follow each other. Unless there are
    three channels, saturation and hue are left out, and grey is the mean of the channels.
    """
    operations = [_brighten_, _contrast_, _saturate_, shift_hue_]
    if images.shape[1] != 3:
        operations = operations[:2]
    if images.device.type == "cpu" and math.prod(images.shape[1:]) > LARGE:
        runs = order.unique_consecutive(dim=0, return_counts=True)[1].tolist()
        for part, factors, orders in zip(images.split(runs), strength.split(runs), order.split(runs), strict=True):
            for number in orders[0].tolist():
                if number < len(operations):
                    operations[number](part, factors[:, number])
        return images
    for position in order.unbind(dim=1):
        for number, operation in enumerate(operations):
            which = (position == number).nonzero()[:, 0]
            if len(which) and which[-1] - which[0] == len(which) - 1:
                run = slice(int(which[0]), int(which[-1]) + 1)
                operation(images[run], strength[run, number])
            elif len(which):
                rows = which.to(images.device, non_blocking=True)
                part = images.index_select(0, rows)
                operation(part, strength[rows, number])
                images.index_copy_(0, rows, part)
    return images


def _brighten_(images: ImageBatch, factor: PerImage) -> None:
    images.mul_(factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def _contrast_(images: ImageBatch, factor: PerImage) -> None:
    grey = to_grey(images) if images.shape[1] == 3 else images.mean(dim=1, keepdim=True)
    _blend_(images, grey.mean(dim=(2, 3), keepdim=True), factor)


def _saturate_(images: ImageBatch, factor: PerImage) -> None:
    _blend_(images, to_grey(images), factor)


def _blend_(images: ImageBatch, other: Tensor, factor: PerImage) -> None:
    """Set images to factor * images + (1 - factor) * other, within [0, 1]; torch.lerp takes five times as long."""
    factor = factor.view(-1, 1, 1, 1)
    torch.addcmul(other.mul_(1 - factor), images, factor, out=images).clamp_(0, 1)


def gaussian_blur(images: ImageBatch, sigma: PerImage, radius: int = 6) -> ImageBatch:
    """Blur each image with a Gaussian of its own `sigma` in pixels, mirrored at the border.

    `radius`, half the width of the kernel in pixels, should be at least three times the largest sigma.
    """
    radius = min(radius, images.shape[2] - 1, images.shape[3] - 1)
    taps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    # Weights too small to matter are set to 0: below 1e-38 some processors take a hundred times as long to multiply.
    kernel = F.threshold(torch.exp(-0.5 * (taps / sigma[:, None]) ** 2), 1e-20, 0)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(images.shape[1], dim=0)  # nc taps
    flat = F.pad(images, [radius] * 4, mode="reflect").flatten(0, 1)[None]  # 1 nc h w
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))
    return F.conv2d(flat, kernel[:, None, None, :], groups=len(kernel)).view_as(images)
