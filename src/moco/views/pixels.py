"""Operations on batches of images, each image with its own parameters; they follow torchvision's functional forms.

Floats are in [0, 1], uint8 in 0 to 255.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from moco.views.crops import Batch, resampling

STRIP = 16
"""How many times the short side the long one has to be before what lies outside the centre is not resized at all."""


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
    return resampling(begin, extent, torch.tensor([False]), size, full)[0]


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
