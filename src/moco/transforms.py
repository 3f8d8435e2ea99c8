"""Operations on batches of images, each image with its own parameters; they follow torchvision's functional forms.

Floats are in [0, 1], uint8 in 0 to 255.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

Batch = Float[Tensor, "n c h w"]
PerImage = Float[Tensor, " n"]
LARGE = 50_000
"""Numbers of an image from which all that is done to its colours is best done while it is in a CPU's cache."""
STRIP = 16
"""How many times the short side the long one has to be before what lies outside the centre is not resized at all."""


def _resampling(start: PerImage, length: PerImage, flip: Tensor, size: int, full: int) -> Float[Tensor, "n s f"]:
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
    rows = _resampling(top, height, torch.zeros_like(flip), size, images.shape[2])
    columns = _resampling(left, width, flip, size, images.shape[3])
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


def centred(images: UInt8[Tensor, "n c h w"], size: int) -> UInt8[Tensor, "n c s s"]:
    """The short side brought to `size` pixels (bilinear, antialiased), then the centre."""
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    short = min(height, width)
    new = (size * height // short, size * width // short)
    top, left = round((new[0] - size) / 2), round((new[1] - size) / 2)  # halves to even, as torchvision's CenterCrop
    if max(height, width) > STRIP * short:
        return _centre_of_strip(images, size, max(new), max(top, left))
    # Only the CPU resizes whole numbers; there it is three times as fast and rounds as Pillow does.
    pixels = images if images.device.type == "cpu" else images.float()
    pixels = F.interpolate(pixels, size=new, mode="bilinear", antialias=True)
    pixels = pixels[:, :, top : top + size, left : left + size]
    return pixels if pixels.dtype == torch.uint8 else _to_uint8(pixels)


def _centre_of_strip(images: UInt8[Tensor, "n c h w"], size: int, new: int, start: int) -> UInt8[Tensor, "n c s s"]:
    """As `centred`, give or take a level; resized as a whole, 30,000 x 1 pixels would take gigabytes.

    Args:
        images: one side of which is much longer than the other.
        size: of the result.
        new: pixels that the whole long side would get.
        start: of these, the first in the result.
    """
    height, width = images.shape[2:]
    full, short, is_tall = max(height, width), min(height, width), height > width
    scale = full / new
    margin = math.ceil(max(1.0, 1 / scale)) + 1  # so far does the filter reach, and no border is within it
    count, begin = size + 2 * margin, (start - margin) * scale
    first, last = math.floor(begin), math.ceil(begin + count * scale)
    part = images.narrow(2 if is_tall else 3, first, last - first).float()
    along = _resampling_of_one(begin - first, count * scale, count, last - first)[margin:-margin].to(images.device)
    across = _resampling_of_one(0, short, size, short).to(images.device)
    return _to_uint8(along @ part @ across.mT if is_tall else across @ part @ along.mT)


def _resampling_of_one(start: float, length: float, size: int, full: int) -> Float[Tensor, "s f"]:
    begin, extent = torch.tensor([start, length], dtype=torch.float32).split(1)
    return _resampling(begin, extent, torch.tensor([False]), size, full)[0]


def _to_uint8(pixels: Batch) -> UInt8[Tensor, "n c h w"]:
    return pixels.round().clamp(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Float[Tensor, "c 1 1"]:
    """One number a channel, kept on the device: to bring it there each time would make the host wait for a GPU."""
    with torch.inference_mode(mode=False):
        return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1)


def normalise(
    images: UInt8[Tensor, "n c h w"] | Batch,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    out: Batch | None = None,
) -> Float[Tensor, "n c h w"]:
    """(images - mean) / std per channel, uint8 brought to [0, 1] first.

    With another number of channels than the statistics have, by the mean over theirs. `out` may be the images.
    """
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    channels = images.shape[1]
    if channels != len(mean):
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    shift, scale = (constant(x, images.device, images.dtype) for x in (mean, std))
    return torch.sub(images, shift, out=out).div_(scale)


def thumbnail(pixels: UInt8[Tensor, "c h w"], side: int) -> Image.Image:
    """A picture in its own proportions, of at most `side` pixels in either direction; grey, or in colour.

    Of two channels it shows the first, of more than three the first three.
    """
    array = pixels[: 3 if len(pixels) >= 3 else 1].movedim(0, 2).cpu().numpy()
    picture = Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])
    picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return picture


def pixels_of(image: Image.Image, channels: int) -> UInt8[np.ndarray, "c h w"]:
    """A PIL image of any mode as uint8: transparency lies on white, grey of 16 bits is scaled to 8.

    Raises:
        ValueError: floating-point pixels, whole numbers of more than 16 bits, or other channels than 1 or 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"pictures have 1 or 3 channels; expected {channels}: give arrays or tensors of so many")
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError(f"pixels from {wide.min()} to {wide.max()}, expected 8 or 16 bits; convert it first")
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels, expected 8 or 16 bits; convert it first")
    elif image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    wanted = "L" if channels == 1 else "RGB"
    pixels = np.asarray(image if image.mode == wanted else image.convert(wanted))
    # A copy, for Pillow's own memory is read-only. The channels of a pixel stay together, as torchcodec leaves them.
    return np.array(np.atleast_3d(pixels)).transpose(2, 0, 1)
