"""One image file to uint8 pixels, whatever the file holds, or a `BadImage` that names it."""

import os
import stat
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from moco.transforms import pixels_of

try:
    from torchcodec.decoders import decode_jpeg
except (ImportError, RuntimeError, OSError):  # an older version, or one whose libraries are not here: Pillow does it
    decode_jpeg = None

# Pillow's other readers are never asked: some of them start programs (EPS), none is a format of image sets.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")


class BadImage(ValueError):
    """A file that cannot be read as an image."""

    def __init__(self, path: str, reason: str):
        self.path, self.reason = path, " ".join(reason.split())
        super().__init__(f"{path!r} cannot be read as an image: {self.reason}")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """So that workers can send it: pickle would give the message alone."""
        return BadImage, (self.path, self.reason)


@contextmanager
def quiet_pillow() -> Generator[None]:
    """Turns Pillow's warning about decompression bombs into an error and hides its others (odd EXIF, odd palettes).

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
        # Opening a pipe that has an image's name would wait for ever; anything but a file is an error right here.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadImage(path, "not a file")
            with Image.open(file, formats=FORMATS) as image:
                yield file, image
    except BadImage:
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


def check_header(path: str) -> None:
    """Raises `BadImage` if not even the header can be read. Call inside `quiet_pillow`."""
    with _open(path):
        pass


def decode(path: str, channels: int) -> UInt8[np.ndarray, "c h w"]:
    """Pixels of a file, upright by its EXIF orientation; transparency lies on white, grey of 16 bits is scaled to 8.

    Call inside `quiet_pillow`. Of several frames (GIF, TIFF) it is the first. Colour to grey is by Rec. 601 luma.

    Raises:
        BadImage: the file is missing, broken, cut off, too large, or holds floating-point pixels.
    """
    with _open(path) as (file, image):
        plain = image.format == "JPEG" and image.mode == "RGB" and channels == 3 and "xmp" not in image.info
        if plain and decode_jpeg is not None:
            # As Pillow decodes, upright too, in two thirds of the time. Pillow has checked the size. This decoder
            # knows EXIF's orientation, not XMP's.
            file.seek(0)
            try:
                pixels = decode_jpeg(torch.frombuffer(bytearray(file.read()), dtype=torch.uint8))
            except RuntimeError as error:
                raise BadImage(path, f"broken or cut off ({str(error).splitlines()[-1]})") from None
            assert isinstance(pixels, Tensor)
            return pixels.numpy()
        ImageOps.exif_transpose(image, in_place=True)
        return pixels_of(image, channels)


def luma(images: UInt8[Tensor, "n 3 h w"]) -> UInt8[Tensor, "n 1 h w"]:
    """Colour to grey with Pillow's weights and rounding (Rec. 601)."""
    red, green, blue = images.to(torch.int32).split(1, dim=1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16).to(torch.uint8)
