"""The random parameters of each image's view, from a hash of (seed, epoch, view, image id).

So an image's views depend neither on the rest of the batch, nor on what ran before, nor on the device. This is why a
resumed run sees the same views.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from moco.views.crops import Box, whole_box
from moco.views.specs import ViewSpec

# Which of an image's random numbers each operation uses. These must never change: a resumed run would see other views.
# A crop is tried up to ten times, as by torchvision.
_TRIES = 10
_AREA, _RATIO = range(0, _TRIES), range(_TRIES, 2 * _TRIES)
_TOP, _LEFT, _FLIP, _JITTER, _GREY, _BLUR, _SIGMA, _SOLARIZE = range(20, 28)
_STRENGTH, _ORDER = range(28, 32), range(32, 36)
_NUM_RANDOM = 36


class Parameters(NamedTuple):
    """What is done to each of n images; on the CPU."""

    top: Int64[Tensor, " n"]
    left: Int64[Tensor, " n"]
    height: Int64[Tensor, " n"]
    width: Int64[Tensor, " n"]
    flip: Tensor
    jitter: Tensor  # bool: whether jittered at all
    strength: Float64[Tensor, "n 4"]  # brightness, contrast and saturation factor, hue shift in turns
    order: Int64[Tensor, "n 4"]  # operation at each position: 0 brightness, 1 contrast, 2 saturation, 3 hue
    grey: Tensor
    sigma: Float64[Tensor, " n"]  # pixels; 0: not blurred
    solarize: Tensor


def _mix(x: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """Apply the finaliser of SplitMix64 (Steele, Lea, Flood 2014) to int64, whose products wrap around."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def random_numbers(ids: Int64[Tensor, " n"], *, seed: int, epoch: int, view: int) -> Float64[Tensor, "n d"]:
    """Return uniform random numbers in [0, 1), one row per image."""
    step = -0x61C8864680B583EB  # the golden ratio's odd 64-bit constant
    state = torch.zeros_like(ids)
    for word in (seed, epoch, view, ids):
        state = _mix(state + word + step)
    numbers = torch.arange(1, _NUM_RANDOM + 1) * step
    return ((_mix(state[:, None] + numbers) >> 11) & 0x1FFFFFFFFFFFFF).double() * 2.0**-53


BoxFinder = Callable[[int, int, int], list[Box]]
"""(index in the batch, height and width of that image) -> the crop of each of its views."""


def _sides(u: Float64[Tensor, "n d"], spec: ViewSpec) -> Float64[Tensor, "n t 2"]:
    """Return height and width of the crop at each try, in units of the square root of the image's area."""
    (low, high), (narrow, broad) = spec.crop_scale, map(math.log, spec.crop_ratio)
    area = low + (high - low) * u[:, _AREA.start : _AREA.stop]
    ratio = torch.exp(narrow + (broad - narrow) * u[:, _RATIO.start : _RATIO.stop])
    return torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], dim=2)


def crop_box(
    u: Float64[Tensor, "n d"], spec: ViewSpec, height: int, width: int
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"], Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """Return top, left, height and width as torchvision's RandomResizedCrop does: ten tries, then a central crop."""
    h, w = (_sides(u, spec) * math.sqrt(height * width)).round().long().unbind(dim=2)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
    top = (u[:, _TOP] * (height - h + 1)).floor().long()
    left = (u[:, _LEFT] * (width - w + 1)).floor().long()
    never_fits = ~fits.any(dim=1)
    for value, fallback in zip((top, left, h, w), whole_box(height, width, spec.crop_ratio), strict=True):
        value.masked_fill_(never_fits, fallback)
    return top, left, h, w


def box_finder(u: Float64[Tensor, "n d"], spec: ViewSpec) -> BoxFinder:
    """Return a function that finds the same crops, image by image, without tensors, for images of different sizes."""
    sides, corners = _sides(u, spec).tolist(), u[:, [_TOP, _LEFT]].tolist()

    def box(index: int, height: int, width: int) -> list[Box]:
        unit, (down, right) = math.sqrt(height * width), corners[index]
        for tall, broad in sides[index]:
            h, w = round(tall * unit), round(broad * unit)
            if 0 < h <= height and 0 < w <= width:
                return [Box(math.floor(down * (height - h + 1)), math.floor(right * (width - w + 1)), h, w)]
        return [whole_box(height, width, spec.crop_ratio)]

    return box


def view_parameters(u: Float64[Tensor, "n d"], spec: ViewSpec, height: int, width: int) -> Parameters:
    """Turn uniform random numbers `u` into what is done to each image of `height` and `width`."""
    strengths = torch.tensor(spec.jitter, dtype=torch.float64)
    strength = 1 + strengths * (2 * u[:, _STRENGTH.start : _STRENGTH.stop] - 1)
    strength[:, 3] -= 1
    low, high = spec.blur_sigma
    sigma = (low + (high - low) * u[:, _SIGMA]).masked_fill(u[:, _BLUR] >= spec.blur_p, 0)
    return Parameters(
        *crop_box(u, spec, height, width),
        flip=u[:, _FLIP] < spec.flip,
        jitter=u[:, _JITTER] < spec.jitter_p,
        strength=strength,
        order=u[:, _ORDER.start : _ORDER.stop].argsort(dim=1),
        grey=u[:, _GREY] < spec.grey_p,
        sigma=sigma,
        solarize=u[:, _SOLARIZE] < spec.solarize_p,
    )
