"""Space for features: in memory or, if there are many, in a temporary file that is deleted after use."""

import errno
import os
import tempfile
from typing import IO

import numpy as np
import torch
from torch import Tensor

HELD = 2**30
"""Most bytes held in memory; more are written to a memory-mapped temporary file."""


def room(rows: int, columns: int) -> Tensor:
    """Return a float32 tensor `[rows, columns]` to be filled.

    Raises:
        OSError: it needs a file, and the disk has no space for it.
    """
    size, folder = 4 * rows * columns, tempfile.gettempdir()
    if size <= HELD:
        return torch.empty(rows, columns)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            _reserve(file, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                error.errno,
                f"{rows:,} rows of {columns:,} features take {size / 2**30:.3g} GiB, for which {folder} has no space; "
                "free some, or set TMPDIR to a folder on a larger disk",
            ) from None
        return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="r+", shape=(rows, columns)))


def _reserve(file: IO[bytes], size: int) -> None:
    """Allocate a file's blocks on disk, because a process is killed when it writes to a mapped page without one."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    zeros = bytes(2**20)
    for start in range(0, size, len(zeros)):
        file.write(zeros[: size - start])
    file.flush()
