"""Opens an image by its path: a file, a file in a tar (`shards/0000.tar/cat.jpg`), or a row of a Hugging Face set.

That a path alone says where the image is lets everything that reads images read these too: training, embedding,
search, figures. Tars are opened by each process for itself, when it first needs them, and each read is one `pread`,
which threads and forked processes may do at the same time.
"""

import errno
import io
import os
import stat
from functools import cache, lru_cache
from typing import final

from moco.data.index import Index, Stamp, ensure, read_tar, to_bytes, write
from moco.data.remote import cache_folder, find, is_remote, open_copy, read

OPEN = 128
"""Local tars that a process keeps open."""
OPEN_COPIES = 24
"""Copies of remote tars that a process keeps open, and so on the disk."""
HUGGING_FACE = "hf:"
"""Before the paths of rows of Hugging Face sets."""
_BUFFER = 2**16


def open_image(path: str) -> io.BufferedReader | io.BytesIO:
    """The file, to be read and closed.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: its tar is none.
    """
    if path.startswith(HUGGING_FACE):
        from moco.data.hugging_face import read_row

        return io.BytesIO(read_row(path))
    begin = path.find(".tar/")
    while begin >= 0:
        tar, name = path[: begin + 4], path[begin + 5 :]
        try:
            opened = _copy(tar) if is_remote(tar) else _local(tar)
        except IsADirectoryError:  # a folder may be called so
            begin = path.find(".tar/", begin + 1)
            continue
        place = opened.index.find(name.encode("utf-8", "surrogateescape"))
        if place is None:
            raise FileNotFoundError(errno.ENOENT, f"{tar} does not hold it", path)
        return io.BufferedReader(_Member(opened, *place, path), _BUFFER)
    # Opening a pipe that has an image's name would wait for ever; anything but a file is an error right here.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a file", path)
    return file


def read_image(path: str) -> bytes:
    """All bytes of an image; errors as `open_image`."""
    with open_image(path) as file:
        return file.read()


def facts_of(path: str) -> str:
    """Size and time of change of an image's file, or of the tar that holds it; empty of what is not there."""
    try:
        status = os.stat(path)
        return f"{status.st_size},{status.st_mtime_ns}"
    except OSError:
        pass
    begin = path.find(".tar/")
    return _facts_of_tar(path[: begin + 4]) if begin >= 0 else ""


@lru_cache(maxsize=1024)
def _facts_of_tar(tar: str) -> str:
    try:
        return find(tar).local.name if is_remote(tar) else facts_of(tar)
    except (OSError, ValueError):
        return ""


def index_of(tar: str) -> Index:
    """The index of a local or remote tar; made if need be. Errors as `open_image`."""
    if not is_remote(tar):
        return ensure(tar, cache_folder())
    place = find(tar)
    local = place.local.with_suffix(".index")
    try:
        return Index(local)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    # `moco pack` leaves one beside each tar: then nothing else needs to be fetched yet.
    given = read(f"{tar}.index")
    if given is not None:
        local.parent.mkdir(parents=True, exist_ok=True)
        write(local, given)
        try:
            index = Index(local)
            if index.stamp.size == place.size:
                return index
        except (ValueError, KeyError, TypeError):
            pass
        local.unlink()
    file = open_copy(tar, let_go)
    try:
        images, content = read_tar(file, tar)
        write(local, to_bytes(images, content, Stamp(place.size, os.fstat(file).st_mtime_ns)))
    finally:
        os.close(file)
    return Index(local)


def let_go() -> None:
    """Closes the tars that this process does not read from at this moment."""
    _copy.cache_clear()
    _local.cache_clear()
    _facts_of_tar.cache_clear()


@final
class _Tar:
    """An open tar. It is closed when nothing uses it any more."""

    def __init__(self, path: str):
        self.index = index_of(path)
        sha256 = self.index.stamp.sha256
        self.file = open_copy(path, let_go, sha256) if is_remote(path) else os.open(path, os.O_RDONLY)

    def __del__(self):
        if "file" in self.__dict__:
            os.close(self.file)


@final
class _Member(io.RawIOBase):
    """A part of an open tar, as a file."""

    mode = "rb"

    def __init__(self, tar: _Tar, begin: int, size: int, name: str):
        self._tar, self._begin, self._size, self._at, self.name = tar, begin, size, 0, name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer) -> int:
        content = os.pread(self._tar.file, min(len(buffer), max(0, self._size - self._at)), self._begin + self._at)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def readall(self) -> bytes:
        content = os.pread(self._tar.file, max(0, self._size - self._at), self._begin + self._at)
        self._at += len(content)
        return content


@lru_cache(maxsize=OPEN)
def _local(path: str) -> _Tar:
    return _Tar(path)


@lru_cache(maxsize=OPEN_COPIES)
def _copy(path: str) -> _Tar:
    _close_before_forks()
    return _Tar(path)


@cache
def _close_before_forks() -> None:
    """A forked process would share the locks of the copies, which then stayed for as long as both lived."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=let_go)
