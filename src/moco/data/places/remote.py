"""Shards from elsewhere: each is fetched whole into a folder of bounded size, and the longest unused ones go first.

Any number of processes share the folder. A file that is open here is locked (flock) and is never removed; a file that
is being fetched has another name until it is whole. Nobody who waits for room has a file open, so that room for one
shard is enough for all of them to get on, if slowly.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

GIB = 64.0
"""Of shards kept at once, if MOCO_CACHE_GIB does not say otherwise."""
FREE = 2**30
"""Bytes of the disk that are left alone."""
PARTS = "[0-9a-f]*.part"  # not what an index is called while it is written, which begins with a dot
ATTEMPTS = 3
"""At a question, which somebody waits for."""
FETCHES = 5
"""Attempts at a shard; when the last fails, the run stops."""
WAIT = 30.0
"""Seconds in which nothing gets smaller or is fetched, after which there is no room."""
_PAUSE = 2.0  # seconds before the second attempt, doubled before each further one


class Unavailable(OSError):
    """A shard that cannot be had here and now. Its images are not at fault: who reads them stops and says so."""


class Place(NamedTuple):
    """A shard elsewhere and here."""

    url: str
    size: int
    local: Path
    """Where its copy is or will be; the name changes when the original does."""


def cache_folder() -> Path:
    """$MOCO_CACHE, or ~/.cache/moco."""
    return Path(os.environ.get("MOCO_CACHE") or "~/.cache/moco").expanduser()


def is_remote(path: str) -> bool:
    """Whether it is a URL."""
    return "://" in path


def read(url: str) -> bytes | None:
    """A small file; None if there is none.

    Raises:
        ValueError: there is no way to that kind of place.
        Unavailable: it cannot be reached.
    """
    system, path = _system(url)
    try:
        return _attempt(url, lambda: system.cat_file(path))
    except FileNotFoundError:
        return None


def glob(url: str) -> list[str]:
    """URLs that fit a pattern with `*`, `?` or `[...]`, sorted; errors as `read`."""
    system, path = _system(url)
    return sorted(system.unstrip_protocol(each) for each in _attempt(url, lambda: system.glob(path)))


@lru_cache(maxsize=65536)
def find(url: str) -> Place:
    """Size of a shard and where its copy goes; asked once a process. Errors as `read`, and FileNotFoundError."""
    system, path = _system(url)
    info = _attempt(url, lambda: system.info(path))
    size = info.get("size")
    if info.get("type") == "directory" or not isinstance(size, int):
        raise OSError(errno.EINVAL, f"{url} does not say its size; expected a file of known size", url)
    told = [str(info.get(key)) for key in ("size", "mtime", "LastModified", "last_modified", "ETag", "etag", "created")]
    name = hashlib.sha256(json.dumps([url, *told]).encode()).hexdigest()[:24]
    return Place(url, size, cache_folder() / "shards" / f"{name}.tar")


def room() -> float:
    """Bytes that shards may take here in all.

    Raises:
        ValueError: MOCO_CACHE_GIB is no number.
        OSError: there can be no folder for them.
    """
    folder = cache_folder() / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    there = [*folder.glob("*.tar"), *folder.glob(PARTS)]
    return _allowed(folder, sum(_age_and_size(file)[1] for file in there))


def _allowed(folder: Path, there: int) -> float:
    """Bytes of the bound, or what is there and what the disk has besides."""
    return min(_bound(), there + max(0, shutil.disk_usage(folder).free - FREE))


def open_copy(url: str, sha256: str | None = None) -> int:
    """Descriptor of the local copy of a shard, which is fetched if it is not there. It is locked until it is closed.

    Close it before asking for another: who waits for room waits for the copies that are open.

    Args:
        url: of the shard.
        sha256: of the shard, where it is known; it is compared when the shard is fetched.

    Raises:
        ValueError: there is no way to that kind of place.
        Unavailable: it cannot be reached, comes damaged, or the shards in use leave it no room.
        OSError: it is not there, or the folder of copies cannot be written.
    """
    place = find(url)
    while True:
        try:
            file = os.open(place.local, os.O_RDONLY)
        except FileNotFoundError:
            fetched = _fetch(place, sha256)
            if fetched is None:
                continue
            return fetched
        _lock(file, shared=True)
        if os.fstat(file).st_nlink:
            with suppress(OSError):  # somebody else's file; then it only looks older than it is
                os.utime(file)
            return file
        os.close(file)  # removed between the two calls


def _fetch(place: Place, sha256: str | None) -> int | None:
    """The new copy, open and locked before anybody else can remove it; None if another process has brought it."""
    folder = place.local.parent
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(place.local.with_suffix(".lock")):
        if place.local.exists():
            return None
        # Its size stands in its name, so that whoever counts knows what it will take.
        part = folder / f"{place.local.stem}.{place.size}.part"
        with _locked(folder / "room.lock"):
            _make_room(folder, place)
            part.touch()
        try:
            logging.getLogger("moco").debug("fetching %s", place.url)
            _attempt(place.url, lambda: _bring(place, part), FETCHES)
            file = os.open(part, os.O_RDONLY)
            _lock(file, shared=True)
            with open(file, "rb", closefd=False) as content:
                if sha256 and hashlib.file_digest(content, "sha256").hexdigest() != sha256:
                    os.close(file)
                    raise Unavailable(
                        f"{place.url} came with other bytes than were packed; put there what `moco pack` has written"
                    )
            part.replace(place.local)
            return file
        finally:
            part.unlink(missing_ok=True)


def _bring(place: Place, part: Path) -> None:
    system, path = _system(place.url)
    system.get_file(path, str(part))
    if (got := part.stat().st_size) != place.size:
        raise OSError(errno.EIO, f"it came as {got:,} of {place.size:,} bytes")


def _make_room(folder: Path, place: Place) -> None:
    """Removes copies, the longest unused first, until another fits."""
    before, deadline = -1, 0.0
    while True:
        for part in folder.glob(PARTS):
            _remove(part, folder / f"{part.name.partition('.')[0]}.lock")
        parts = list(folder.glob(PARTS))
        coming, here = (
            sum(int(part.name.split(".")[1]) for part in parts),
            sum(_age_and_size(part)[1] for part in parts),
        )
        kept = sorted((*_age_and_size(file), file) for file in folder.glob("*.tar"))
        used = sum(size for _, size, _ in kept)
        free = _allowed(folder, used + here) - coming - place.size
        for _, size, file in kept:
            if used <= free:
                break
            if _remove(file, file):
                used -= size
                # Not while somebody has it: who fetches this one anew would lose what keeps others from its part.
                _remove(file.with_suffix(".lock"), file.with_suffix(".lock"))
        if used <= free:
            return
        # What others fetch comes to an end, and then there may be room: only where nothing happens it is no use.
        if coming or used != before:
            before, deadline = used, time.monotonic() + WAIT
        elif time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    raise Unavailable(
        f"no room for {place.url} ({place.size / 2**30:.3g} GiB) beside the shards in use ({used / 2**30:.3g} GiB): of"
        f" {_bound() / 2**30:.3g} GiB that MOCO_CACHE_GIB allows, or on the disk of {folder}; raise it or set"
        " MOCO_CACHE to a folder on a larger disk"
    )


def _age_and_size(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except FileNotFoundError:  # another process has finished or removed it meanwhile
        return 0, 0
    return status.st_mtime_ns, status.st_size


def _bound() -> float:
    given = os.environ.get("MOCO_CACHE_GIB")
    try:
        bound = float(given) if given else GIB
    except ValueError:
        bound = -1
    if not bound > 0:
        raise ValueError(f"MOCO_CACHE_GIB is {given!r}; expected a number of GiB above 0")
    return bound * 2**30


def _remove(file: Path, lock: Path) -> bool:
    """Removes a file that nobody has locked."""
    try:
        handle = os.open(lock, os.O_RDWR | (os.O_CREAT if lock != file else 0), 0o666)
    except FileNotFoundError:
        return True
    try:
        _lock(handle, wait=False)
        if not os.fstat(handle).st_nlink:  # removed between the two calls; there may be another of that name
            return lock == file
        file.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def _lock(file: int, *, shared: bool = False, wait: bool = True) -> None:
    """Until the descriptor and its copies in forked processes are closed; raises OSError instead of waiting."""
    import fcntl  # not on Windows, which can do without shards from elsewhere, not without this module

    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


@contextmanager
def _locked(path: Path) -> Generator[None]:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _lock(file)
        if os.fstat(file).st_nlink:
            break
        os.close(file)
    try:
        yield
    finally:
        os.close(file)


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there. A new one in a forked process: fsspec sees to that."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(f"{url} needs fsspec; pip install fsspec") from None
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{url} cannot be read here ({why}); s3:// needs pip install s3fs, gs:// gcsfs") from None


def _attempt(url: str, work: Callable[[], Any], attempts: int = ATTEMPTS) -> Any:
    """Networks fail for a moment now and then; what each library raises then differs, and becomes `Unavailable`."""
    for attempt in range(attempts):
        try:
            return work()
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "there is no such file", url) from None
        except PermissionError as error:
            why = " ".join(str(error).split())
            raise Unavailable(f"access to {url} is denied ({why}); see to its permissions, or sign in") from None
        except Exception as error:
            if attempt == attempts - 1:
                why = " ".join(f"{type(error).__name__}: {error}".split())
                raise Unavailable(
                    f"{url} cannot be fetched, {attempts} times tried ({why}); give the command again when it can be"
                    " reached, a training run's with --resume"
                ) from None
        time.sleep(_PAUSE * 2**attempt)
    raise AssertionError
