"""Copies of remote shards in a folder of bounded size, from which the least recently used are removed.

Any number of processes share the folder. An open copy is locked (flock) and is never removed; a copy that is being
fetched has another name until it is complete. A process that waits for room has no copy open, so room for one shard is
enough for all to make progress, if slowly.
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
"""Largest size of all copies, unless MOCO_CACHE_GIB is set."""
FREE = 2**30
"""Bytes of the disk that are left free."""
PARTS = "[0-9a-f]*.part"
"""Copies that are being fetched: the shard's hash and its size, because room is counted before its bytes come."""
ATTEMPTS = 3
"""At reading a small file or a size."""
FETCHES = 5
"""Attempts at fetching a shard; if the last fails, the run stops."""
WAIT = 30.0
"""Seconds without any change in the folder, after which waiting for room ends with an error."""
_PAUSE = 2.0  # seconds before the second attempt, doubled before each further one


class Unavailable(OSError):
    """A shard that cannot be fetched now. Its images are not at fault, so a run stops instead of skipping them."""


class Place(NamedTuple):
    """A remote shard and its copy."""

    url: str
    size: int
    local: Path
    """Where its copy is or will be; the name changes when the original does."""


def cache_folder() -> Path:
    """Return $MOCO_CACHE, or ~/.cache/moco."""
    return Path(os.environ.get("MOCO_CACHE") or "~/.cache/moco").expanduser()


def read(url: str) -> bytes | None:
    """Read a small file; None if there is none.

    Raises:
        ValueError: this kind of URL cannot be read here.
        Unavailable: it cannot be reached.
    """
    try:
        return _attempt(url, lambda system, path: system.cat_file(path))
    except FileNotFoundError:
        return None


def glob(url: str) -> list[str]:
    """Return the URLs that match a pattern with `*`, `?` or `[...]`, sorted; errors as `read`."""
    return _attempt(url, lambda system, path: sorted(map(system.unstrip_protocol, system.glob(path))))


@lru_cache(maxsize=65536)
def find(url: str) -> Place:
    """Find out, once per process, a shard's size and where its copy goes. Errors as `read`, and FileNotFoundError."""
    info = _attempt(url, lambda system, path: system.info(path))
    size = info.get("size")
    if info.get("type") == "directory" or not isinstance(size, int):
        raise OSError(errno.EINVAL, f"{url} does not say its size; expected a file of known size", url)
    keys = ("size", "mtime", "LastModified", "last_modified", "ETag", "etag", "created")
    name = hashlib.sha256(json.dumps([url, *(str(info.get(key)) for key in keys)]).encode()).hexdigest()[:24]
    return Place(url, size, cache_folder() / "shards" / f"{name}.tar")


def room() -> float:
    """Return how many bytes all copies together may take.

    Raises:
        ValueError: MOCO_CACHE_GIB is not a number.
        OSError: the folder cannot be made.
    """
    folder = cache_folder() / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    return _allowed(folder, sum(_age_and_size(file)[1] for file in (*folder.glob("*.tar"), *folder.glob(PARTS))))


def _allowed(folder: Path, present: int) -> float:
    """Return the bound, or less if the disk has less free space beside the bytes that are present."""
    return min(_bound(), present + max(0, shutil.disk_usage(folder).free - FREE))


def _bound() -> float:
    setting = os.environ.get("MOCO_CACHE_GIB")
    try:
        bound = float(setting) if setting else GIB
    except ValueError:
        bound = -1
    if not bound > 0:
        raise ValueError(f"MOCO_CACHE_GIB is {setting!r}; expected a number of GiB above 0")
    return bound * 2**30


def open_copy(url: str, sha256: str | None = None) -> int:
    """Open the copy of a shard, which is fetched if need be, and lock it until the descriptor is closed.

    Close it before asking for another one: a process that waits for room waits for open copies.

    Args:
        url: of the shard.
        sha256: of the shard, if known; it is compared when the shard is fetched.

    Raises:
        ValueError: this kind of URL cannot be read here.
        Unavailable: it cannot be reached, comes damaged, or has no room beside the shards in use.
        OSError: it does not exist, or the folder of copies cannot be written.
    """
    place = find(url)
    while True:
        try:
            file = os.open(place.local, os.O_RDONLY)
        except FileNotFoundError:
            if (fetched := _fetch(place, sha256)) is not None:
                return fetched
            continue
        _lock(file, shared=True)
        if os.fstat(file).st_nlink:
            with suppress(OSError):  # the file of another user, which then only looks older than it is
                os.utime(file)
            return file
        os.close(file)  # removed before it was locked


def _fetch(place: Place, sha256: str | None) -> int | None:
    """Return the new copy, open and locked; None if another process has fetched it meanwhile."""
    folder = place.local.parent
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{place.local.stem}.{place.size}.part"

    def get(system: Any, path: str) -> None:
        system.get_file(path, str(part))
        if (size := part.stat().st_size) != place.size:
            raise OSError(errno.EIO, f"it came as {size:,} of {place.size:,} bytes")

    with _locked(place.local.with_suffix(".lock")):
        if place.local.exists():
            return None
        with _locked(folder / "room.lock"):
            _make_room(folder, place)
            part.touch()
        try:
            logging.getLogger("moco").debug("fetching %s", place.url)
            _attempt(place.url, get, FETCHES)
            with part.open("rb") as content:
                if sha256 and hashlib.file_digest(content, "sha256").hexdigest() != sha256:
                    raise Unavailable(
                        f"{place.url} came with other bytes than were packed; put there what `moco pack` has written"
                    )
            file = os.open(part, os.O_RDONLY)
            _lock(file, shared=True)  # before others see it and can remove it
            part.replace(place.local)
            return file
        finally:
            part.unlink(missing_ok=True)


def _make_room(folder: Path, place: Place) -> None:
    """Remove copies, the least recently used first, until another one fits."""
    before, deadline = -1, 0.0
    while True:
        for part in folder.glob(PARTS):  # left by processes that were killed: others hold the lock
            _remove(part, folder / f"{part.name.partition('.')[0]}.lock")
        parts = list(folder.glob(PARTS))
        coming = sum(int(part.name.split(".")[1]) for part in parts)
        copies = sorted((*_age_and_size(file), file) for file in folder.glob("*.tar"))
        used = sum(size for _, size, _ in copies)
        present = used + sum(_age_and_size(part)[1] for part in parts)
        limit = _allowed(folder, present) - coming - place.size
        for _, size, file in copies:
            if used > limit and _remove(file, file):
                used -= size
                # Not if a process holds it: one that fetches this shard again would lose what protects its part.
                _remove(file.with_suffix(".lock"), file.with_suffix(".lock"))
        if used <= limit:
            return
        # There may be room once the others have fetched their shards: give up only if nothing changes.
        if coming or used != before:
            before, deadline = used, time.monotonic() + WAIT
        elif time.monotonic() >= deadline:
            raise Unavailable(
                f"no room for {place.url} ({place.size / 2**30:.3g} GiB) beside the shards in use"
                f" ({used / 2**30:.3g} GiB): of {_bound() / 2**30:.3g} GiB that MOCO_CACHE_GIB allows, or on the disk"
                f" of {folder}; raise it or set MOCO_CACHE to a folder on a larger disk"
            )
        time.sleep(0.1)


def _age_and_size(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except FileNotFoundError:  # another process has finished or removed it meanwhile
        return 0, 0
    return status.st_mtime_ns, status.st_size


def _remove(file: Path, lock: Path) -> bool:
    """Remove a file unless another process holds its lock, which may be the file itself; whether it is gone."""
    try:
        handle = os.open(lock, os.O_RDWR | (os.O_CREAT if lock != file else 0), 0o666)
    except FileNotFoundError:
        return True
    try:
        _lock(handle, wait=False)
        if not os.fstat(handle).st_nlink:  # removed before it was locked; there may be another of that name
            return lock == file
        file.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def _lock(file: int, *, shared: bool = False, wait: bool = True) -> None:
    """Lock until the descriptor and its copies in forked processes are closed; OSError if not `wait` and it is held."""
    import fcntl  # Windows lacks it, and this module is imported there

    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


@contextmanager
def _locked(path: Path) -> Generator[None]:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _lock(file)
        if os.fstat(file).st_nlink:
            break
        os.close(file)  # removed before it was locked
    try:
        yield
    finally:
        os.close(file)


def _system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it; fsspec makes a new one in each forked process."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(f"{url} needs fsspec; pip install fsspec") from None
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{url} cannot be read here ({why}); s3:// needs pip install s3fs, gs:// gcsfs") from None


def _attempt(url: str, work: Callable[[Any, str], Any], attempts: int = ATTEMPTS) -> Any:
    """Call `work(file system, path)` until it succeeds; what libraries raise instead becomes `Unavailable`."""
    (system, path), why = _system(url), ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(_PAUSE * 2 ** (attempt - 1))
        try:
            return work(system, path)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "there is no such file", url) from None
        except PermissionError as error:
            why = " ".join(str(error).split())
            raise Unavailable(f"access to {url} is denied ({why}); see to its permissions, or sign in") from None
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
    raise Unavailable(
        f"{url} cannot be fetched, {attempts} times tried ({why}); give the command again when it can be"
        " reached, a training run's with --resume"
    )
