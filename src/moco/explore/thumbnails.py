"""Images for the page: many thumbnails on a sheet, or one large image.

All functions are called inside `quiet_pillow`, which is entered once around all threads.
"""

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypedDict

import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from moco.data import BadImage, Images
from moco.data.decode import FORMATS, decode
from moco.data.places.addresses import array_row
from moco.data.places.open import open_image
from moco.views.pixels import pixels_of

CELL = 48
"""Longest side of a thumbnail in pixels."""
ACROSS = 16
"""Number of thumbnails in a row of a sheet, and of rows."""
LARGEST = 1024
"""Longest side in pixels of an image shown alone."""


class Sheet(TypedDict):
    """A sprite sheet: the size in pixels of each thumbnail, row by row ([0, 0] if unreadable), and a data URI."""

    sizes: list[list[int]]
    image: str


def sheet(images: Images, rows: Sequence[int]) -> Sheet:
    """Draw at most 256 thumbnails in their own aspect ratio, each at the top left of its square.

    Images of less than half the square are magnified by a whole number, so that their pixels stay sharp.

    Args:
        images: the images.
        rows: which of them to draw, in the order of the squares.
    """
    across = min(ACROSS, len(rows))
    canvas, sizes = Image.new("RGB", (CELL * across, CELL * -(-len(rows) // ACROSS))), []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for place, picture in enumerate(pool.map(partial(_thumbnail, images), rows)):
            if picture is None:
                sizes.append([0, 0])
                continue
            canvas.paste(picture, (place % ACROSS * CELL, place // ACROSS * CELL))
            sizes.append(list(picture.size))
    buffer = io.BytesIO()
    canvas.save(buffer, "WEBP", quality=50, method=6)  # 450 bytes a photo; the slowest method saves a twentieth
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"sizes": sizes, "image": f"data:image/webp;base64,{data}"}


def large(images: Images, row: int) -> tuple[str, bytes]:
    """Media type and bytes of one image, shrunk if it is very large and re-encoded without the file's metadata.

    Raises:
        BadImage: the file cannot be read.
    """
    picture = _read(images, row, LARGEST)
    if max(picture.size) <= 128:
        return "image/png", _encoded(picture, "PNG")
    return "image/jpeg", _encoded(picture, "JPEG")


def _thumbnail(images: Images, row: int) -> Image.Image | None:
    try:
        picture = _read(images, row, CELL)
    except BadImage:
        return None
    times = CELL // max(picture.size)
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def _read(images: Images, row: int, side: int) -> Image.Image:
    """Return an image that fits into a square, upright and in colour; never decode a large JPEG at full size."""
    if images.in_memory is not None:
        return _picture(images.decode(row), side)
    return _picture(_reduced(images, row, 2 * side), side)


def _reduced(images: Images, row: int, least: int) -> UInt8[Tensor, "c h w"]:
    path = images.paths[row]
    if array_row(path):
        return torch.from_numpy(decode(path, images.channels))
    try:
        with open_image(path) as file, Image.open(file, formats=FORMATS) as image:
            # The decoder of JPEG gives a half, a quarter or an eighth of the size in a fraction of the time.
            image.draft(None, (least, least))
            ImageOps.exif_transpose(image, in_place=True)
            return torch.from_numpy(pixels_of(image, images.channels))
    except Exception as error:  # what Pillow's readers raise on broken files can be anything
        raise BadImage(path, f"{type(error).__name__}: {error}") from None


def _picture(pixels: UInt8[Tensor, "c h w"], side: int) -> Image.Image:
    """Return the image in colour, or its first channel in grey; shrunk to fit into a square."""
    array = pixels[:3].permute(1, 2, 0).numpy() if len(pixels) >= 3 else pixels[0].numpy()
    picture = Image.fromarray(array).convert("RGB")
    if max(picture.size) > side:
        shrunk = side / max(picture.size)
        width, height = (max(1, round(length * shrunk)) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return picture


def _encoded(picture: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, quality=88)
    return buffer.getvalue()
