"""Images as a page shows them: many small ones on one sheet, or one large."""

import base64
import io
from collections.abc import Sequence
from typing import TypedDict

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from moco.data import BadImage, FileImages, Images

CELL = 48
"""Longest side of a thumbnail in pixels."""
ACROSS = 16
"""Thumbnails in a row of a sheet, and rows."""
LARGEST = 1024
"""Longest side in pixels of an image shown alone."""
_AT_ONCE = 16  # at camera size each takes tens of megabytes until it is shrunk


class Sheet(TypedDict):
    """A sprite sheet: the size in pixels of each thumbnail, row by row ([0, 0]: unreadable), and a data URI of all."""

    sizes: list[list[int]]
    image: str


def sheet(images: Images, rows: Sequence[int]) -> Sheet:
    """At most 256 thumbnails in their own aspect ratio, each at the top left of its square.

    Images of less than half the square are magnified a whole number of times, so that their pixels stay sharp.

    Args:
        images: where they come from.
        rows: which of them, in the order of the squares.
    """
    across = min(ACROSS, len(rows))
    canvas, sizes = Image.new("RGB", (CELL * across, CELL * -(-len(rows) // ACROSS))), []
    for start in range(0, len(rows), _AT_ONCE):
        for place, pixels in enumerate(_read(images, rows[start : start + _AT_ONCE]), start):
            if isinstance(pixels, BadImage):
                sizes.append([0, 0])
                continue
            picture = _picture(pixels, CELL)
            times = CELL // max(picture.size)
            picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
            canvas.paste(picture, (place % ACROSS * CELL, place // ACROSS * CELL))
            sizes.append(list(picture.size))
    buffer = io.BytesIO()
    canvas.save(buffer, "WEBP", quality=50, method=6)  # 450 bytes a photo; the slowest method saves a twentieth
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"sizes": sizes, "image": f"data:image/webp;base64,{data}"}


def large(images: Images, row: int) -> tuple[str, bytes]:
    """One image, shrunk if it is very large: its media type and its bytes. Nothing of the file but pixels is in them.

    Raises:
        BadImage: the file cannot be read.
    """
    picture = _picture(images.decode(row), LARGEST)
    if max(picture.size) <= 128:
        return "image/png", _encoded(picture, "PNG")
    return "image/jpeg", _encoded(picture, "JPEG")


def _read(images: Images, rows: Sequence[int]) -> Sequence[Tensor | BadImage]:
    return images.decode_many(rows) if isinstance(images, FileImages) else [images.decode(row) for row in rows]


def _picture(pixels: UInt8[Tensor, "c h w"], side: int) -> Image.Image:
    """In colour or, with fewer than three channels, the first of them in grey; shrunk to fit a square."""
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
