"""Images of any kind as pixels of one size and range: PIL to uint8, central crop, normalisation, thumbnails."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from moco.views.crops import ImageBatch, resampling

STRIP = 16
"""Ratio of the sides above which only the centre of an image is resized."""


def centred(images: UInt8[Tensor, "n c h w"], size: int) -> UInt8[Tensor, "n c s s"]:
    """Resize the short side to `size` pixels (bilinear, antialiased), then crop the centre."""
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    short = min(height, width)
    new = (size * height // short, size * width // short)
    top, left = round((new[0] - size) / 2), round((new[1] - size) / 2)  # half to even, as torchvision's CenterCrop
    if max(height, width) > STRIP * short:
        return _centre_of_strip(images, size, max(new), max(top, left))
    # Only the CPU can resize integers; that is three times as fast, and rounds as Pillow does.
    pixels = images if images.device.type == "cpu" else images.float()
    pixels = F.interpolate(pixels, size=new, mode="bilinear", antialias=True)
    pixels = pixels[:, :, top : top + size, left : left + size]
    return pixels if pixels.dtype == torch.uint8 else _to_uint8(pixels)


def _centre_of_strip(images: UInt8[Tensor, "n c h w"], size: int, new: int, start: int) -> UInt8[Tensor, "n c s s"]:
    """Return what `centred` would, to within one grey level, without resizing the whole image.

    Resizing all of 30,000 x 1 pixels would take gigabytes.

    Args:
        images: images with one side much longer than the other.
        size: side of the result in pixels.
        new: length in pixels that the whole long side would be resized to.
        start: first of these pixels that belongs to the result.
    """
    height, width = images.shape[2:]
    full, short, is_tall = max(height, width), min(height, width), height > width
    scale = full / new
    margin = math.ceil(max(1.0, 1 / scale)) + 1  # the filter's reach, so that no edge affects the result
    count, begin = size + 2 * margin, (start - margin) * scale
    first, last = math.floor(begin), math.ceil(begin + count * scale)
    part = images.narrow(2 if is_tall else 3, first, last - first).float()
    along = _resampling_of_one(begin - first, count * scale, count, last - first)[margin:-margin].to(images.device)
    across = _resampling_of_one(0, short, size, short).to(images.device)
    return _to_uint8(along @ part @ across.mT if is_tall else across @ part @ along.mT)


def _resampling_of_one(start: float, length: float, size: int, full: int) -> Float[Tensor, "s f"]:
    begin, extent = torch.tensor([start, length], dtype=torch.float32).split(1)
    return resampling(begin, extent, torch.tensor([False]), size, full)[0]


def _to_uint8(pixels: ImageBatch) -> UInt8[Tensor, "n c h w"]:
    return pixels.round().clamp(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Float[Tensor, "c 1 1"]:
    """Return one number per channel, cached on the device: to copy it each time would make the host wait for a GPU."""
    with torch.inference_mode(mode=False):
        return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1)


def normalise(
    images: UInt8[Tensor, "n c h w"] | ImageBatch,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    out: ImageBatch | None = None,
) -> Float[Tensor, "n c h w"]:
    """Return (images - mean) / std per channel, with uint8 scaled to [0, 1] first.

    If the images have another number of channels than the statistics, the statistics are averaged. `out` may be
    `images`.
    """
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    channels = images.shape[1]
    if channels != len(mean):
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    shift, scale = (constant(x, images.device, images.dtype) for x in (mean, std))
    return torch.sub(images, shift, out=out).div_(scale)


def thumbnail(pixels: UInt8[Tensor, "c h w"], side: int) -> Image.Image:
    """Return a small picture with the image's proportions, of at most `side` pixels in either direction.

    It shows the first three channels in colour, or the first in grey if there are fewer than three.
    """
    array = pixels[: 3 if len(pixels) >= 3 else 1].movedim(0, 2).cpu().numpy()
    picture = Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])
    picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return picture


def pixels_of(image: Image.Image, channels: int) -> UInt8[np.ndarray, "c h w"]:
    """Convert a PIL image of any mode to uint8: transparency is put on white, 16-bit grey is scaled to 8 bits.

    Raises:
        ValueError: pixels are floats or integers of more than 16 bits, or `channels` is neither 1 nor 3.
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
    # A copy, because Pillow's memory is read-only. The channels of a pixel stay together, as torchcodec leaves them.
    return np.array(np.atleast_3d(pixels)).transpose(2, 0, 1)
