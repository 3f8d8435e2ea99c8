"""Opens an image by its path: a file, a file in a tar (`shards/0000.tar/cat.jpg`), or a row of a Hugging Face set.

That a path alone says where the image is lets everything that reads images read these too: training, embedding,
search, figures. Tars are opened by each process for itself, when it first needs them, and each read is one `pread`,
which threads and forked processes may do at the same time.
"""

import errno
import io
import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from typing import final

from moco.data.index import Index, Stamp, ensure, read_tar, to_bytes, write
from moco.data.remote import Unavailable, cache_folder, find, is_remote, open_copy, read

try:
    import resource
except ImportError:  # Windows, where no tar is read
    resource = None

HUGGING_FACE = "hf:"
"""Before the paths of rows of Hugging Face sets."""
_BUFFER = 2**16
_MOST, _FEWEST, _OTHERS = 1024, 16, 512  # tars that a process keeps open, and descriptors that it needs for the rest


def num_open() -> int:
    """Local tars that a process keeps open, of which each takes two descriptors: the tar's and its index's."""
    if resource is None:
        return _MOST
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if limit == resource.RLIM_INFINITY else max(_FEWEST, min(_MOST, (limit - _OTHERS) // 2))


def open_image(path: str) -> io.BufferedReader | io.BytesIO:
    """The file, to be read and closed.

    Raises:
        OSError: there is none, or it cannot be read.
        Unavailable: its tar is elsewhere and cannot be had.
        ValueError: its tar is none.
    """
    if path.startswith(HUGGING_FACE):
        from moco.data.hugging_face import read_row

        return io.BytesIO(read_row(path))
    begin = path.find(".tar/")
    while begin >= 0:
        tar, name = path[: begin + 4], path[begin + 5 :].encode("utf-8", "surrogateescape")
        if is_remote(tar):
            return io.BytesIO(_from_copy(tar, name, path))
        try:
            opened = _local(tar)
        except IsADirectoryError:  # a folder may be called so
            begin = path.find(".tar/", begin + 1)
            continue
        return io.BufferedReader(_Member(opened, *_place(opened.index, tar, name, path), path), _BUFFER)
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
    """Size and time of change of an image's file, or of the tar or set that holds it; empty of what is not there."""
    if path.startswith(HUGGING_FACE):
        from moco.data.hugging_face import facts_of_row

        return facts_of_row(path)
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
    except Unavailable:
        raise
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
        local.unlink(missing_ok=True)
    file = open_copy(tar)
    try:
        images, content = read_tar(file, tar)
        write(local, to_bytes(images, content, Stamp(place.size, os.fstat(file).st_mtime_ns)))
    finally:
        os.close(file)
    return Index(local)


def let_go() -> None:
    """Closes the tars that this process does not read from at this moment."""
    _index_elsewhere.cache_clear()
    _local.cache_clear()
    _facts_of_tar.cache_clear()


@final
class _Tar:
    """An open tar. It is closed when nothing uses it any more."""

    def __init__(self, path: str):
        self.index = index_of(path)
        self.file = os.open(path, os.O_RDONLY)

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


@lru_cache(maxsize=num_open())
def _local(path: str) -> _Tar:
    return _Tar(path)


@lru_cache(maxsize=num_open())
def _index_elsewhere(path: str) -> Index:
    return index_of(path)


def _from_copy(tar: str, name: bytes, path: str) -> bytes:
    """Content of an image in a remote tar. A copy is open only while it is read, so that it never stands in the way."""
    with _no_fault_of_an_image(tar):
        index = _index_elsewhere(tar)
    begin, size = _place(index, tar, name, path)
    with _no_fault_of_an_image(tar):
        file = open_copy(tar, index.stamp.sha256)
    try:
        return os.pread(file, size, begin)
    finally:
        os.close(file)


def _place(index: Index, tar: str, name: bytes, path: str) -> tuple[int, int]:
    place = index.find(name)
    if place is None:
        raise FileNotFoundError(errno.ENOENT, f"{tar} does not hold it", path)
    return place


@contextmanager
def _no_fault_of_an_image(tar: str) -> Generator[None]:
    try:
        yield
    except Unavailable:
        raise
    except OSError as error:
        raise Unavailable(
            f"{tar} cannot be had ({error.strerror or error}); see that it is there, and that {cache_folder()} can be"
            " written"
        ) from None
