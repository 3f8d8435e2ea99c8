"""Decoded images, shrunk, in one memory-mapped file: made once, read at random by this run and later ones."""

import contextlib
import errno
import functools
import hashlib
import itertools
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64, UInt8
from torch import Tensor

from moco.data.decode import check_header, decode_shrunk
from moco.data.places.open import facts_of
from moco.data.unreadable import BadImage
from moco.files import wait_for_lock
from moco.views.crops import Box, shrink_of

VERSION = 1
"""Of the files and of what is done to the pixels; another number makes every cache anew."""
CHUNK = 256
"""Images after which a cache that is being made is safe on the disk."""
SAMPLED = 500
"""Images whose headers say how much room all will take."""


@final
@dataclass(frozen=True, eq=False)
class Cached:
    """Some images of a cache."""

    file: str
    rows: Int64[Tensor, "n 3"]
    """First byte, height and width of each image; its pixels lie row by row, the channels of each together."""
    channels: int

    def pixels(self, index: int) -> UInt8[np.ndarray, "c h w"]:
        """Return a copy of one image."""
        start, height, width = self.rows[index].tolist()
        flat = _mapped(self.file)[start : start + height * width * self.channels]
        return np.array(flat).reshape(height, width, self.channels).transpose(2, 0, 1)

    def select(self, chosen: Int64[Tensor, " k"]) -> "Cached":
        """Return the images at these positions, in this order."""
        return Cached(self.file, self.rows[chosen], self.channels)


@functools.lru_cache(maxsize=8)
def _mapped(file: str) -> UInt8[np.ndarray, " b"]:
    # A plain view of the mapping, whose slices are made five times as fast as its own.
    return np.asarray(np.memmap(file, np.uint8, "r"))


def cached(
    paths: Sequence[str], source: Path, *, folder: Path, side: int, channels: int
) -> tuple[Cached, dict[int, BadImage]]:
    """Return the cache of these files; make, finish or replace it if it is missing, incomplete or outdated.

    It holds for the files' names, sizes and times of change. Several processes may ask at once: one makes it, or where
    the file system has no locks, one of each machine. Call inside `quiet_pillow`.

    Args:
        paths: image files.
        source: folder that they are of; the cache of other files of it, at the same `side`, is replaced.
        folder: where caches are kept.
        side: what longer short sides are shrunk to, in pixels (bilinear, antialiased).
        channels: 1 or 3.

    Returns:
        The cache, and what could not be read, by position; there the cache has no pixels.

    Raises:
        ValueError: the folder cannot be written to, or has not enough room.
    """
    of_source = hashlib.sha256(f"{VERSION},{side},{channels},{source}".encode("utf-8", "surrogateescape")).hexdigest()
    place = folder.expanduser() / f"{source.name[:40]}-{of_source[:12]}"
    stem = place / _digest(paths)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _alone(place / "lock") as alone:
            rows, bad = _whole(stem, len(paths), channels), {}
            if rows is None:
                bad = (_make if alone else _make_apart)(paths, stem, side=side, channels=channels)
                rows = _whole(stem, len(paths), channels)
                _mapped.cache_clear()  # of this name there may have been another file
            for other in place.iterdir():
                if other.name != "lock" and not other.name.startswith(stem.name):
                    shutil.rmtree(other, ignore_errors=True) if other.is_dir() else other.unlink(missing_ok=True)
    except OSError as error:
        hint = "it goes on from there once there is room" if error.errno == errno.ENOSPC else "choose another folder"
        raise ValueError(f"data.cache {str(place)!r} cannot be written ({error.strerror}); {hint}") from None
    assert rows is not None
    _mapped(f"{stem}.pixels")  # now, for reading processes to inherit: a later run may take the file away
    for position in np.flatnonzero(rows[:, 1] == 0).tolist():
        why = f"it was not when {str(place)!r} was made; remove that folder to try again"
        bad.setdefault(position, BadImage(paths[position], why))
    return Cached(f"{stem}.pixels", torch.from_numpy(rows), channels), bad


def _digest(paths: Sequence[str]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(os.fsencode(path) + b"\0" + facts_of(path).encode("utf-8", "surrogateescape") + b"\0")
    return found.hexdigest()[:16]


@contextlib.contextmanager
def _alone(file: Path) -> Generator[bool]:
    """Wait for other processes that make the same cache; return false if other machines cannot be kept out."""
    with file.open("wb") as lock:
        if wait_for_lock(lock):
            yield True
            return
    of_machine = hashlib.sha256(f"{Path.home()},{file.absolute()}".encode("utf-8", "surrogateescape")).hexdigest()
    with Path(tempfile.gettempdir(), f"moco-{of_machine[:12]}.lock").open("wb") as lock:
        wait_for_lock(lock)
        yield False


def _whole(stem: Path, count: int, channels: int) -> Int64[np.ndarray, "n 3"] | None:
    """Rows of a finished cache whose pixels are all there."""
    try:
        rows = np.fromfile(f"{stem}.rows", np.int64).reshape(-1, 3)
        size = os.path.getsize(f"{stem}.pixels")
    except (OSError, ValueError):
        return None
    return rows if len(rows) == count and size == _end(rows, channels) else None


def _end(rows: Int64[np.ndarray, "n 3"], channels: int) -> int:
    return int(rows[-1, 0] + rows[-1, 1] * rows[-1, 2] * channels) if len(rows) else 0


def _make(paths: Sequence[str], stem: Path, *, side: int, channels: int) -> dict[int, BadImage]:
    """Write pixels and rows, each chunk of pixels before its rows, so that every row has its pixels."""
    log, bad = logging.getLogger("moco"), {}
    part_pixels, part_rows = Path(f"{stem}.pixels.part"), Path(f"{stem}.rows.part")
    part_rows.touch()
    part_pixels.touch()
    known = np.fromfile(part_rows, np.int64)
    known = known[: len(known) // 3 * 3].reshape(-1, 3)
    if part_pixels.stat().st_size < _end(known, channels):
        known = known[:0]
    done, end = len(known), _end(known, channels)
    _check_room(paths[done:], stem.parent, side=side, channels=channels)
    log.info("caching %d images in %s%s", len(paths), stem.parent, f", from number {done} on" if done else "")
    with part_pixels.open("r+b") as pixels, part_rows.open("r+b") as rows, ThreadPoolExecutor() as pool:
        pixels.truncate(end)
        rows.truncate(known.nbytes)
        pixels.seek(end)
        rows.seek(known.nbytes)
        for start in range(done, len(paths), CHUNK):
            chunk = paths[start : start + CHUNK]
            read = list(pool.map(functools.partial(_shrunk, side=side, channels=channels), chunk))
            bad |= {start + i: each for i, each in enumerate(read) if isinstance(each, BadImage)}
            shapes = [(0, 0) if isinstance(each, BadImage) else each.shape[:2] for each in read]
            starts = itertools.accumulate((h * w * channels for h, w in shapes), initial=end)
            new = np.array([(at, *shape) for at, shape in zip(starts, shapes, strict=False)], np.int64)
            for each in read:
                if not isinstance(each, BadImage):
                    pixels.write(each.data)
            _sync(pixels)
            rows.write(new.tobytes())
            _sync(rows)
            end = _end(new, channels)
    os.replace(part_pixels, f"{stem}.pixels")
    os.replace(part_rows, f"{stem}.rows")
    log.info("cached: %.1f GiB", end / 2**30)
    return bad


def _make_apart(paths: Sequence[str], stem: Path, *, side: int, channels: int) -> dict[int, BadImage]:
    """As `_make` in a folder of this machine's own, for others may be making the same."""
    log = logging.getLogger("moco")
    log.warning("%s has no file locks: machines that need this cache now each make it, one is kept", stem.parent)
    own = stem.parent / f"{stem.name}.{socket.gethostname()}"
    own.mkdir(exist_ok=True)
    bad = _make(paths, own / stem.name, side=side, channels=channels)
    if _whole(stem, len(paths), channels) is None:  # what others may read from already stays
        for kind in ("pixels", "rows"):
            os.replace(own / f"{stem.name}.{kind}", f"{stem}.{kind}")
    shutil.rmtree(own, ignore_errors=True)
    return bad


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _shrunk(path: str, *, side: int, channels: int) -> UInt8[np.ndarray, "h w c"] | BadImage:
    try:
        read = decode_shrunk(path, channels, lambda height, width: shrink_of([Box(0, 0, height, width)], side))
    except BadImage as bad:
        return bad
    pixels, short = torch.from_numpy(read.pixels), min(read.height, read.width)
    if short > side:
        new = (read.height * side // short, read.width * side // short)
        pixels = F.interpolate(pixels[None], size=new, mode="bilinear", antialias=True)[0]
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def _check_room(paths: Sequence[str], place: Path, *, side: int, channels: int) -> None:
    sizes = []
    for path in paths[:: max(1, len(paths) // SAMPLED)]:
        with contextlib.suppress(BadImage):
            height, width = check_header(path)
            scale = min(1.0, side / min(height, width))
            sizes.append(height * width * scale**2 * channels)
    needed, free = len(paths) * sum(sizes) / max(1, len(sizes)), shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(
            f"data.cache {str(place)!r} has {free / 2**30:.1f} GiB free; expected about {needed / 2**30:.1f} for "
            f"{len(paths)} images: choose another folder, or lower --data.cache_side {side}"
        )
