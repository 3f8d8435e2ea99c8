"""One image file to uint8 pixels, whatever the file holds, or a `BadImage` that names it."""

import io
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from moco.data.places.addresses import array_row
from moco.data.places.array_rows import read_row
from moco.data.places.open import open_image
from moco.data.places.remote import Unavailable
from moco.data.unreadable import BadImage
from moco.views.pixels import pixels_of

try:
    from torchcodec.decoders import decode_jpeg
except (ImportError, RuntimeError, OSError):  # an older version, or one whose libraries are not here: Pillow does it
    decode_jpeg = None

# Pillow's other readers are never asked: some of them start programs (EPS), none is a format of image sets.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
ORIENTATION = 0x0112
"""EXIF's tag; from 5 on the picture lies on its side."""


@contextmanager
def quiet_pillow() -> Generator[None]:
    """Turn Pillow's warning about decompression bombs into an error, and hide its others (odd EXIF, odd palettes).

    Filters belong to the process: enter once around a pool of threads, not inside each thread.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextmanager
def _open(path: str) -> Generator[tuple[BinaryIO, Image.Image]]:
    """Everything that Pillow's readers raise on broken files, and they raise anything, becomes a `BadImage`."""
    try:
        with open_image(path) as file:
            _refuse_large_webp(path, file)
            with Image.open(file, formats=FORMATS) as image:
                yield file, image
    except (BadImage, Unavailable):
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(path, "not an image in a known format, or cut off in its header") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise BadImage(path, f"more than {limit:.0f} million pixels (a decompression bomb?); shrink it first") from None
    except OSError as error:
        raise BadImage(path, error.strerror or str(error)) from None
    except ValueError as error:
        raise BadImage(path, str(error)) from None
    except Exception as error:
        raise BadImage(path, f"{type(error).__name__}: {error}") from None


def _refuse_large_webp(path: str, file: io.BufferedIOBase) -> None:
    """Before Pillow, which asks for the whole canvas of a WebP file as soon as it opens it."""
    head = file.read(30)
    file.seek(0)
    if head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X":
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
        if width * height > (Image.MAX_IMAGE_PIXELS or float("inf")):
            raise Image.DecompressionBombError


def check_header(path: str) -> tuple[int, int]:
    """Height and width as they stand in the file, before any turning. Call inside `quiet_pillow`.

    Raises:
        BadImage: not even the header can be read.
    """
    with _open(path) as (_, image):
        return image.height, image.width


def has_16_bits(path: str) -> bool:
    """Whether a file is grey of 16 bits, by its header; not if that cannot be read. Call inside `quiet_pillow`."""
    try:
        with _open(path) as (_, image):
            return image.mode.startswith("I")
    except BadImage:
        return False


class Decoded(NamedTuple):
    """Pixels of a file, and what it holds."""

    pixels: UInt8[np.ndarray, "c h w"]
    """Of one in `shrink` of the file's pixels in each direction; at the right and bottom of part of so many."""
    height: int
    """Of the whole picture, upright."""
    width: int
    shrink: int
    """1, 2, 4 or 8."""


def decode(path: str, channels: int) -> UInt8[np.ndarray, "c h w"]:
    """Pixels of a file, upright by its EXIF orientation; transparency lies on white, grey of 16 bits is scaled to 8.

    Call inside `quiet_pillow`. Of several frames (GIF, TIFF) it is the first. Colour to grey is by Rec. 601 luma.

    Args:
        path: the file; or one in a tar, or a row, as `open_image` takes it; or a row of an array file.
        channels: 1 or 3; of array files any number that they have.

    Raises:
        BadImage: the file is missing, broken, cut off, too large, or holds floating-point pixels.
    """
    return decode_shrunk(path, channels, lambda height, width: 1).pixels


def decode_shrunk(path: str, channels: int, shrink: Callable[[int, int], int]) -> Decoded:
    """As `decode`; of a JPEG only as many pixels as are wanted, by the smaller inverse transforms of its blocks.

    Args:
        path: the file; or one in a tar, or a row, as `open_image` takes it; or a row of an array file.
        channels: 1 or 3; of array files any number that they have.
        shrink: (upright height, width) -> 1, 2, 4 or 8: one pixel in each direction for so many. Of other formats than
            JPEG all pixels come, for there is nothing to be saved.

    Raises:
        BadImage: as `decode`.
    """
    if array_row(path):
        row = _row(path, channels)
        return Decoded(row, *row.shape[1:], 1)
    with _open(path) as (file, image):
        height, width = image.height, image.width
        jpeg, factor = image.format in ("JPEG", "MPO"), 1  # MPO: what cameras add further pictures to
        if jpeg:
            if {"exif", "xmp"} & image.info.keys() and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8):
                height, width = width, height
            factor = shrink(height, width)
        # As Pillow decodes, upright too, in a quarter to two thirds of the time. Pillow has checked the size. This
        # decoder knows EXIF's orientation, not XMP's, and cannot shrink.
        if jpeg and factor == 1 and decode_jpeg and image.mode == "RGB" and channels == 3 and "xmp" not in image.info:
            file.seek(0)
            try:
                pixels = decode_jpeg(torch.frombuffer(bytearray(file.read()), dtype=torch.uint8))
            except RuntimeError as error:
                raise BadImage(path, f"broken or cut off ({str(error).splitlines()[-1]})") from None
            assert isinstance(pixels, Tensor)
            return Decoded(pixels.numpy(), height, width, 1)
        if factor > 1:
            image.draft(image.mode, (image.width // factor, image.height // factor))
        ImageOps.exif_transpose(image, in_place=True)
        found = pixels_of(image, channels)
        return Decoded(found, height if jpeg else found.shape[1], width if jpeg else found.shape[2], factor)


def _row(path: str, channels: int) -> UInt8[np.ndarray, "c h w"]:
    try:
        return with_channels(torch.from_numpy(read_row(path, channels))[None], channels)[0].numpy()
    except OSError as error:
        raise BadImage(path, error.strerror or str(error)) from None
    except (ValueError, IndexError) as error:
        raise BadImage(path, str(error)) from None


def with_channels(images: UInt8[Tensor, "n _ h w"], channels: int) -> UInt8[Tensor, "n {channels} h w"]:
    """Grey repeated to 3 channels, colour averaged to 1 by `luma`; images that have as many stay as they are.

    Raises:
        ValueError: another number of channels than asked for, and not 1 and 3.
    """
    has = images.shape[1]
    if has == channels:
        return images
    if {has, channels} != {1, 3}:
        raise ValueError(f"images have {has} channels; expected {channels}: see --data.channels")
    return luma(images) if channels == 1 else images.repeat(1, 3, 1, 1)


def luma(images: UInt8[Tensor, "n 3 h w"]) -> UInt8[Tensor, "n 1 h w"]:
    """Colour to grey with Pillow's weights and rounding (Rec. 601)."""
    red, green, blue = images.to(torch.int32).split(1, dim=1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16).to(torch.uint8)
