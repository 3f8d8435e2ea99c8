"""Locks keep a file, and what it stands for, to one process; the system ends a lock when its process ends.

Windows has no such locks, and some file systems of clusters (Lustre, NFS) none either: there nobody is kept out.
"""

from typing import BinaryIO

try:
    import fcntl
except ImportError:
    fcntl = None


def take(file: BinaryIO) -> bool:
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


def wait_for(file: BinaryIO) -> bool:
    """Locks an open file until it is closed, once no other process holds it; false where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return False
    return True
