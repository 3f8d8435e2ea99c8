"""Images in tars, here or elsewhere."""

import errno
import io
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import final

from moco.data.places.addresses import is_remote
from moco.data.places.local_file import facts_of_file
from moco.data.places.remote import Unavailable, cache_folder, find, open_copy, read
from moco.data.places.tar_index import Index, Stamp, ensure, read_tar, to_bytes, write_index

try:
    import resource
except ImportError:  # Windows, where no tar is read
    resource = None

_BUFFER = 2**16
_MOST, _FEWEST, _OTHERS = 1024, 16, 512  # tars that a process keeps open, and descriptors that it needs for the rest


def num_open() -> int:
    """Return how many local tars a process keeps open; each takes two descriptors, for the tar and for its index."""
    if resource is None:
        return _MOST
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if limit == resource.RLIM_INFINITY else max(_FEWEST, min(_MOST, (limit - _OTHERS) // 2))


@lru_cache(maxsize=1024)
def facts_of_tar(tar: str) -> str:
    """Return what changes with a tar; empty if it does not exist."""
    try:
        return find(tar).local.name if is_remote(tar) else facts_of_file(tar)
    except Unavailable:
        raise
    except (OSError, ValueError):
        return ""


def index_of(tar: str) -> Index:
    """Return the index of a local or remote tar, which is made if need be. Errors as `open_image`."""
    if not is_remote(tar):
        return ensure(tar, cache_folder())
    place = find(tar)
    local = place.local.with_suffix(".index")
    with suppress(OSError, ValueError):
        return Index(local)
    # `moco pack` leaves an index beside each tar, which saves fetching the tar itself for now.
    if (packed := read(f"{tar}.index")) is not None:
        with suppress(ValueError):
            index = write_index(local, packed)
            if index.stamp.size == place.size:
                return index
        local.unlink(missing_ok=True)
    file = open_copy(tar)
    try:
        images, content = read_tar(file, tar)
        return write_index(local, to_bytes(images, content, Stamp(place.size, os.fstat(file).st_mtime_ns)))
    finally:
        os.close(file)


def let_go() -> None:
    """Close all tars but those that are being read from at this moment, and forget what is known of them."""
    _remote_index.cache_clear()
    _open_tar.cache_clear()
    facts_of_tar.cache_clear()


@final
class _Tar:
    """An open tar, which is closed when nothing uses it any more."""

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

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer) -> int:
        content = self._read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        return self._read(self._size)

    def _read(self, most: int) -> bytes:
        content = os.pread(self._tar.file, min(most, max(0, self._size - self._at)), self._begin + self._at)
        self._at += len(content)
        return content


@lru_cache(maxsize=num_open())
def _open_tar(path: str) -> _Tar:
    return _Tar(path)


@lru_cache(maxsize=num_open())
def _remote_index(path: str) -> Index:
    return index_of(path)


def open_member(tar: str, name: str, address: str) -> io.BufferedReader:
    """Open an image in a local tar; IsADirectoryError if the tar is a folder."""
    opened = _open_tar(tar)
    return io.BufferedReader(_Member(opened, *_find(opened.index, tar, name, address), address), _BUFFER)


def read_copy(tar: str, name: str, address: str) -> bytes:
    """Read an image in a remote tar. The copy is open only meanwhile, so that it can be removed when room is needed."""
    with _unavailable(tar):
        index = _remote_index(tar)
    begin, size = _find(index, tar, name, address)
    with _unavailable(tar):
        file = open_copy(tar, index.stamp.sha256)
    try:
        return os.pread(file, size, begin)
    finally:
        os.close(file)


def _find(index: Index, tar: str, name: str, address: str) -> tuple[int, int]:
    found = index.find(name.encode("utf-8", "surrogateescape"))
    if found is None:
        raise FileNotFoundError(errno.ENOENT, f"{tar} does not hold it", address)
    return found


@contextmanager
def _unavailable(tar: str) -> Generator[None]:
    """Raise the system's errors as `Unavailable`, because the image that is read is not at fault."""
    try:
        yield
    except Unavailable:
        raise
    except OSError as error:
        raise Unavailable(
            f"{tar} cannot be fetched ({error.strerror or error}); see that it is there, and that {cache_folder()} can"
            " be written"
        ) from None
