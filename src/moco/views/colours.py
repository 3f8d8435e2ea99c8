"""Colour jitter, grey and blur of a batch of images."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from moco.views.crops import Batch, PerImage
from moco.views.pixels import constant

LARGE = 50_000
"""Numbers of an image from which all that is done to its colours is best done while it is in a CPU's cache."""


def to_grey(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1 h w"]:
    """Luma of ITU-R BT.601, with torchvision's weights."""
    red, green, blue = images.unbind(dim=1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def shift_hue(
    images: Float[Tensor, "n 3 h w"], turns: PerImage, *, out: Tensor | None = None
) -> Float[Tensor, "n 3 h w"]:
    """Moves the hue by a fraction of a full turn, in HSV.

    On the circle of hues, six steps around, a pixel is |d| = 1 + (green + blue - red - low) / chroma away from red,
    with the sign of green - blue. A channel |d| away from the hue is low + chroma clip(2 - |d|, 0, 1), |d| being the
    shorter way around. That is HSV there and back with no case to be told from another.
    """
    red, green, blue = images.unbind(dim=1)
    high = torch.maximum(red, green)
    low = torch.minimum(red, green)
    torch.maximum(high, blue, out=high)
    torch.minimum(low, blue, out=low)
    chroma = high.sub_(low)
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-12)).add_(1).copysign_(green - blue)
    hue.add_(6 * turns[:, None, None])
    hue.sub_((hue / 6).round_(), alpha=6)  # from -3 to 3; |d| is up to 5 from a channel, 3 - ||d| - 3| the shorter way
    away = hue[:, None] - constant((0.0, 2.0, -2.0), images.device, images.dtype)
    away = away.abs_().sub_(3).abs_().clamp_(1, 2)
    return torch.addcmul(low.sub_(chroma)[:, None], chroma[:, None], away, out=out)


def jitter_colour(images: Batch, strength: Float[Tensor, "n 4"], order: Int64[Tensor, "n 4"]) -> Batch:
    """Brightness, contrast, saturation and hue in each image's own order; `order` is on the CPU.

    With other than three channels saturation and hue step aside, and grey is the mean of the channels.
    """
    return jitter_colour_(images.clone(), strength, order)


def jitter_colour_(images: Batch, strength: Float[Tensor, "n 4"], order: Int64[Tensor, "n 4"]) -> Batch:
    """The same in place: it is fastest for images that lie together if their orders are equal."""
    operations = [_brighten_, _contrast_, _saturate_, _shift_hue_]
    if images.shape[1] != 3:
        operations = operations[:2]
    if images.device.type == "cpu" and math.prod(images.shape[1:]) > LARGE:
        runs = order.unique_consecutive(dim=0, return_counts=True)[1].tolist()
        for part, factors, own in zip(images.split(runs), strength.split(runs), order.split(runs), strict=True):
            for number in own[0].tolist():
                if number < len(operations):
                    operations[number](part, factors[:, number])
        return images
    for position in order.unbind(dim=1):
        for number, operation in enumerate(operations):
            which = (position == number).nonzero()[:, 0]
            if len(which) and which[-1] - which[0] == len(which) - 1:
                part = slice(int(which[0]), int(which[-1]) + 1)
                operation(images[part], strength[part, number])
            elif len(which):
                there = which.to(images.device, non_blocking=True)
                some = images.index_select(0, there)
                operation(some, strength[there, number])
                images.index_copy_(0, there, some)
    return images


def _brighten_(images: Batch, factor: PerImage) -> None:
    images.mul_(factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def _contrast_(images: Batch, factor: PerImage) -> None:
    grey = to_grey(images) if images.shape[1] == 3 else images.mean(dim=1, keepdim=True)
    _blend_(images, grey.mean(dim=(2, 3), keepdim=True), factor)


def _saturate_(images: Batch, factor: PerImage) -> None:
    _blend_(images, to_grey(images), factor)


def _shift_hue_(images: Batch, turns: PerImage) -> None:
    shift_hue(images, turns, out=images)


def _blend_(images: Batch, other: Tensor, factor: PerImage) -> None:
    """Factor * images + (1 - factor) * other, within [0, 1]; torch.lerp takes five times as long."""
    factor = factor.view(-1, 1, 1, 1)
    torch.addcmul(other.mul_(1 - factor), images, factor, out=images).clamp_(0, 1)


def gaussian_blur(images: Batch, sigma: PerImage, radius: int = 6) -> Batch:
    """Separable Gaussian of each image's own width in pixels, mirrored at the border; `radius`: three sigma or more."""
    radius = min(radius, images.shape[2] - 1, images.shape[3] - 1)
    taps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    # Weights that change no digit are none: below 1e-38 some processors need a hundred times as long for a product.
    kernel = F.threshold(torch.exp(-0.5 * (taps / sigma[:, None]) ** 2), 1e-20, 0)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(images.shape[1], dim=0)  # nc taps
    flat = F.pad(images, [radius] * 4, mode="reflect").flatten(0, 1)[None]  # 1 nc h w
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))
    return F.conv2d(flat, kernel[:, None, None, :], groups=len(kernel)).view_as(images)
