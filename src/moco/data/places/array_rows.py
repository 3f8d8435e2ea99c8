"""Images that are rows of one array on the disk, each read alone by its path: `bands.npy/17`.

The file is mapped, so that of a set of any size only what is read takes memory, and processes share it.
"""

from functools import lru_cache
from tokenize import TokenError

import numpy as np
from jaxtyping import UInt8

NPY, STL10 = ".npy", "_X.bin"
STL10_SHAPE = (3, 96, 96)
"""Of each image of STL-10: channels, columns, rows."""


def is_row(path: str) -> bool:
    """Whether an image's path names a row of such a file."""
    file, _, number = path.rpartition("/")
    return file.endswith((NPY, STL10)) and number.isdecimal()


def read_row(path: str, channels: int) -> UInt8[np.ndarray, "c h w"]:
    """A copy of one image, with the channels that it has.

    Args:
        path: as `is_row` takes it.
        channels: that are looked for among the axes.

    Raises:
        OSError: the file is not there.
        ValueError: it holds no such images.
        IndexError: it has fewer.
    """
    file, _, number = path.rpartition("/")
    return np.array(planes(mapped(file), channels)[int(number)])


@lru_cache(maxsize=64)
def mapped(file: str) -> UInt8[np.ndarray, "..."]:
    """All rows of a file; `mapped.cache_clear()` lets go of those that may have changed. Errors as `read_row`."""
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
    return np.asarray(array)  # a plain view of the mapping, whose rows are taken faster


def planes(array: UInt8[np.ndarray, "..."], channels: int) -> UInt8[np.ndarray, "n c h w"]:
    """A view of `[n, h, w]`, `[n, h, w, c]` or `[n, c, h, w]` as the last of these.

    The axis of the channels is the last if it has a number that will do for `channels`, else the second if that does;
    failing both, the shorter one.
    """
    if array.ndim == 3:
        return array[:, None]
    will_do = (1, 3) if channels in (1, 3) else (channels,)
    second, last = array.shape[1], array.shape[-1]
    is_second = last not in will_do and (second in will_do or second < last)
    return array if is_second else np.moveaxis(array, -1, 1)
