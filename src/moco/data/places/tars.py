"""Images in tars, here or elsewhere."""

import errno
import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from typing import final

from moco.data.places.local_file import facts_of_file
from moco.data.places.remote import Unavailable, cache_folder, find, is_remote, open_copy, read
from moco.data.places.tar_index import Index, Stamp, ensure, read_tar, to_bytes, write

try:
    import resource
except ImportError:  # Windows, where no tar is read
    resource = None

BUFFER = 2**16

_MOST, _FEWEST, _OTHERS = 1024, 16, 512  # tars that a process keeps open, and descriptors that it needs for the rest


def num_open() -> int:
    """Local tars that a process keeps open, of which each takes two descriptors: the tar's and its index's."""
    if resource is None:
        return _MOST
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if limit == resource.RLIM_INFINITY else max(_FEWEST, min(_MOST, (limit - _OTHERS) // 2))


@lru_cache(maxsize=1024)
def facts_of_tar(tar: str) -> str:
    try:
        return find(tar).local.name if is_remote(tar) else facts_of_file(tar)
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
    open_tar.cache_clear()
    facts_of_tar.cache_clear()


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
class TarMember(io.RawIOBase):
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
def open_tar(path: str) -> _Tar:
    return _Tar(path)


@lru_cache(maxsize=num_open())
def _index_elsewhere(path: str) -> Index:
    return index_of(path)


def read_copy(tar: str, name: bytes, path: str) -> bytes:
    """Content of an image in a remote tar. A copy is open only while it is read, so that it never stands in the way."""
    with _no_fault_of_an_image(tar):
        index = _index_elsewhere(tar)
    begin, size = place_of(index, tar, name, path)
    with _no_fault_of_an_image(tar):
        file = open_copy(tar, index.stamp.sha256)
    try:
        return os.pread(file, size, begin)
    finally:
        os.close(file)


def place_of(index: Index, tar: str, name: bytes, path: str) -> tuple[int, int]:
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
