"""Images that are files of their own on this machine."""

import errno
import io
import os
import stat


def open_file(path: str) -> io.BufferedReader:
    """Open a regular file.

    Raises:
        OSError: there is none, or it is a pipe, a device or a folder.
    """
    # A blocking open of a pipe would wait for ever.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a file", path)
    return file


def facts_of_file(path: str) -> str:
    """Return size and time of the last change; empty if there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_size},{status.st_mtime_ns}"
