"""Operations on batches of images, each image with its own parameters; they follow torchvision's functional forms.

Floats are in [0, 1], uint8 in 0 to 255.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

Batch = Float[Tensor, "n c h w"]
PerImage = Float[Tensor, " n"]


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


def to_grey(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1 h w"]:
    """Luma of ITU-R BT.601, with torchvision's weights."""
    red, green, blue = images.unbind(dim=1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]


def shift_hue(images: Float[Tensor, "n 3 h w"], turns: PerImage) -> Float[Tensor, "n 3 h w"]:
    """Moves the hue by a fraction of a full turn, in HSV."""
    high, low = images.amax(dim=1), images.amin(dim=1)
    chroma = high - low
    red, green, blue = images.unbind(dim=1)
    safe = chroma.clamp(min=1e-12)
    hue = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = hue + 6 * turns[:, None, None]
    offset = torch.tensor([5.0, 3.0, 1.0], device=images.device, dtype=images.dtype)[:, None, None]
    k = (hue[:, None] + offset).remainder_(6)
    return high[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def blend(images: Batch, other: Tensor, factor: PerImage) -> Batch:
    """Factor * images + (1 - factor) * other, within [0, 1]."""
    return torch.lerp(other, images, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def jitter_colour(
    images: Batch, strength: Float[Tensor, "n 4"], order: Int64[Tensor, "n 4"], *, on_host: Int64[Tensor, "n 4"]
) -> Batch:
    """Brightness, contrast, saturation and hue in each image's own order. `on_host` is `order` on the CPU.

    With other than three channels saturation and hue step aside, and grey is the mean of the channels.
    """
    colour = images.shape[1] == 3
    for position in range(4):
        operation = order[:, position]
        factor = strength.gather(1, operation[:, None])[:, 0].masked_fill(operation == 3, 1)
        grey = to_grey(images) if colour else images.mean(dim=1, keepdim=True)
        if not colour:
            factor = factor.masked_fill(operation == 2, 1)
        kind = operation.view(-1, 1, 1, 1)
        mean = grey.mean(dim=(2, 3), keepdim=True)
        base = torch.where(kind == 2, grey, mean * (kind == 1))
        images = blend(images, base, factor)
        chosen = (on_host[:, position] == 3).nonzero()[:, 0].to(images.device, non_blocking=True)
        if colour and len(chosen):
            images[chosen] = shift_hue(images[chosen], strength[chosen, 3])
    return images


def gaussian_blur(images: Batch, sigma: PerImage, radius: int = 6) -> Batch:
    """Separable Gaussian of each image's own width in pixels, mirrored at the border; `radius`: three sigma or more."""
    radius = min(radius, images.shape[2] - 1, images.shape[3] - 1)
    taps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
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
    # Only the CPU resizes whole numbers; there it is three times as fast and rounds as Pillow does.
    pixels = images if images.device.type == "cpu" else images.float()
    pixels = F.interpolate(pixels, size=new, mode="bilinear", antialias=True)
    top, left = round((new[0] - size) / 2), round((new[1] - size) / 2)  # halves to even, as torchvision's CenterCrop
    pixels = pixels[:, :, top : top + size, left : left + size]
    return pixels if pixels.dtype == torch.uint8 else pixels.round().clamp(0, 255).to(torch.uint8)


def normalise(
    images: UInt8[Tensor, "n c h w"] | Batch, mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "n c h w"]:
    """(images - mean) / std per channel, uint8 brought to [0, 1] first.

    With another number of channels than the statistics have, by the mean over theirs.
    """
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    channels = images.shape[1]
    if channels != len(mean):
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    shift, scale = (torch.tensor(x, device=images.device, dtype=images.dtype).view(-1, 1, 1) for x in (mean, std))
    return (images - shift) / scale


def pixels_of(image: Image.Image, channels: int) -> UInt8[np.ndarray, "c h w"]:
    """A PIL image of any mode as uint8: transparency lies on white, grey of 16 bits is scaled to 8.

    Raises:
        ValueError: floating-point pixels, or whole numbers of more than 16 bits.
    """
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
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    # A copy, for Pillow's own memory is read-only.
    return np.array(np.atleast_3d(pixels).transpose(2, 0, 1), order="C")
