"""Files that are written whole or not at all, locked, or memory-mapped."""

import errno
import os
import secrets
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from jaxtyping import Float

try:
    import fcntl
except ImportError:
    fcntl = None


def take_lock(file: BinaryIO) -> bool:
    """Locks an open file until it is closed; false if another process holds it, true where there are no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def wait_for_lock(file: BinaryIO) -> bool:
    """Locks an open file until it is closed, once no other process holds it; false where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return False
    return True


HELD_IN_MEMORY = 2**30
"""Most bytes held in memory; more are written to a memory-mapped temporary file."""


def scratch_room(rows: int, columns: int) -> Float[np.ndarray, "rows columns"]:
    """Return a float32 array to be filled.

    Raises:
        OSError: it needs a file, and the disk has no space for it.
    """
    size, folder = 4 * rows * columns, tempfile.gettempdir()
    if size <= HELD_IN_MEMORY:
        return np.empty((rows, columns), dtype=np.float32)
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
        return np.memmap(file, dtype=np.float32, mode="r+", shape=(rows, columns))


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


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file completely or not at all: after a crash or on a full disk, the old file is untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with disk_full_named(path), temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def disk_full_named(path: Path) -> Generator[None]:
    try:
        yield
    except Exception as error:
        # torch.save raises its own error in place of the system's.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"{cause.strerror}; earlier files are intact; free some space and resume; could not write"
            raise OSError(cause.errno, what, str(path)) from None
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; not every file system can, and the file is intact either way."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
