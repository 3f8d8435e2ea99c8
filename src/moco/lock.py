"""That one process alone writes a file, by a lock of the system's, which releases it when the process ends."""

from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


def is_ours(file: BinaryIO) -> bool:
    """Lock an open file until it is closed; false if another process holds it, true where there are no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
