"""Rows of an array file, each read alone: the file is mapped into memory, which processes share."""

from functools import lru_cache
from tokenize import TokenError

import numpy as np
from jaxtyping import UInt8

from moco.data.places.addresses import STL10, array_row

STL10_SHAPE = (3, 96, 96)
"""Of each image of STL-10: channels, columns, rows."""


def read_row(address: str, channels: int) -> UInt8[np.ndarray, "c h w"]:
    """Return a copy of one image, with all channels that it has.

    Args:
        address: one that `array_row` splits.
        channels: to look for among the axes (`planes`).

    Raises:
        OSError: there is no such file.
        ValueError: it is no array of images.
        IndexError: it has fewer rows.
    """
    row = array_row(address)
    assert row, address
    file, number = row
    return np.array(planes(mapped(file), channels)[number])


@lru_cache(maxsize=64)
def mapped(file: str) -> UInt8[np.ndarray, "..."]:
    """Map all rows of a file; `mapped.cache_clear()` forgets files that may have changed. Errors as `read_row`."""
    try:
        if file.endswith(STL10):
            array = np.memmap(file, np.uint8, "r").reshape(-1, *STL10_SHAPE).swapaxes(2, 3)
        else:
            array = np.lib.format.open_memmap(file, mode="r")  # refuses objects, which would be unpickled
    except (ValueError, EOFError, TokenError) as error:
        raise ValueError(f"{file!r} cannot be read as an array ({' '.join(str(error).split())})") from None
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or not array.size:
        raise ValueError(
            f"{file!r} holds {array.dtype} of shape {array.shape}; expected uint8 [n, h, w], [n, h, w, c] or"
            " [n, c, h, w], n > 0: scale to 0 to 255 and save as uint8"
        )
    return np.asarray(array)  # rows of a plain view are taken faster than those of a memmap


def planes(array: UInt8[np.ndarray, "..."], channels: int) -> UInt8[np.ndarray, "n c h w"]:
    """View `[n, h, w]`, `[n, h, w, c]` or `[n, c, h, w]` as the last of these.

    The channels are the last axis if its length suits `channels` (1 suits 3 and the reverse), else the second axis if
    that suits, else the shorter of the two.
    """
    if array.ndim == 3:
        return array[:, None]
    suitable = (1, 3) if channels in (1, 3) else (channels,)
    second, last = array.shape[1], array.shape[-1]
    is_second = last not in suitable and (second in suitable or second < last)
    return array if is_second else np.moveaxis(array, -1, 1)
