"""A folder of images -> tar shards in the WebDataset layout, each with an index beside it.

OUT/0000.tar ...     KEY.jpg with the image's own bytes, KEY.cls with the number of its class
OUT/0000.tar.index   what is where (moco.data.index)
OUT/classes.json     the names of the class numbers
OUT/pack.json        which shards there are, once all are written

Images with training and test parts become OUT/train and OUT/test.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, final

from moco.config import DataConfig
from moco.data import BadImage, Images, Splits, load_data
from moco.data.packing.plan import Shard, begin, padded, plan_of, suffix_of
from moco.data.places.array_rows import is_row
from moco.data.places.open import read_image
from moco.data.places.remote import Unavailable
from moco.data.places.tar_headers import BLOCK, Member, scan
from moco.data.places.tar_index import Content, Index, Stamp, to_bytes, write
from moco.data.sources.shards import CLASSES, MANIFEST
from moco.data.unreadable import report_bad

SHARD_SIZE = 512
"""MiB that a shard has, about."""
_STREAMED = 1e-9  # GiB of decoded images to hold: none
_RECORD = 20 * BLOCK  # what tar fills its files up to

Report = Callable[[int, int], None]


class Packed(NamedTuple):
    """What was written."""

    folder: Path
    shards: int
    images: int
    size: int
    """Bytes of all shards."""
    unreadable: tuple[str, ...]
    """Files that are in no shard."""


def pack(
    images: str | Path | Images | Splits,
    out: str | Path,
    *,
    shard_size: float = SHARD_SIZE,
    workers: int | None = None,
    max_bad: float = 0.01,
    on_progress: Report | None = None,
) -> Packed:
    """Writes images into tar shards, in an order that is shuffled once and for all.

    Killed at any moment, the same call goes on: shards that are there are read and compared with their SHA-256, the
    others written. Every shard is read back before it gets its name. The same images give the same bytes.

    Args:
        images: a folder, other shards, or what `load_data` gives, as files.
        out: a new folder, or one where this was begun.
        shard_size: MiB that a shard is filled up to; a larger image has a shard to itself.
        workers: shards written at a time; not given: as many as there are cores.
        max_bad: largest fraction of unreadable images that is left out.
        on_progress: called with (images done, images in all), from several threads, one at a time.

    Returns:
        Where they are, how many, and what is not in them.

    Raises:
        ValueError: no images or too many unreadable ones, images in memory, or a folder that was begun with other
            images or is being written by another process.
        FileExistsError: a folder with something else in it.
        OSError: the disk has no room, or gives back other bytes than were written.

    Example:
        >>> moco.pack("photos/", "shards/").shards                                           # doctest: +SKIP
        12
    """
    if not shard_size > 0:
        raise ValueError(f"shard_size is {shard_size}; expected MiB above 0")
    out, parts = Path(out), _files(images, max_bad)
    folders = {part: out / part if len(parts) > 1 else out for part in parts}
    plans = {part: plan_of(found, folders[part], shard_size * 2**20) for part, found in parts.items()}
    shards = [shard for plan in plans.values() for shard in plan]
    with begin(out, plans):
        _check_room(out, shards)
        for part, found in parts.items():
            folders[part].mkdir(exist_ok=True)
            if found.classes is not None and found.labels is not None:
                write(folders[part] / CLASSES, json.dumps(found.classes, indent=0).encode())
        work = _Work(sum(len(shard.items) for shard in shards), max_bad, on_progress)
        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            futures = [pool.submit(_make, shard, work) for shard in shards]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                work.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        report_bad(work.bad, work.total, max_bad)
        told = {part: [str(shard.tar.relative_to(out)) for shard in plan] for part, plan in plans.items()}
        counts = {part: len(found) for part, found in parts.items()}
        left_out = tuple(sorted(bad.path for bad in work.bad))
        told = {"format": 1, "shards": told, "images": counts, "unreadable": left_out}
        write(out / MANIFEST, json.dumps(told, indent=1).encode())
        size = sum(shard.tar.stat().st_size for shard in shards)
        return Packed(out, len(shards), work.total - len(work.bad), size, left_out)


@final
class _Work:
    """What the threads have in common."""

    def __init__(self, total: int, max_bad: float, on_progress: Report | None):
        self.total, self._max_bad, self._on_progress = total, max_bad, on_progress
        self.bad: list[BadImage] = []
        self.stop = threading.Event()
        self._done, self._lock = 0, threading.Lock()

    def failed(self, bad: BadImage) -> None:
        with self._lock:
            self.bad.append(bad)
            if len(self.bad) > self._max_bad * self.total:
                self.stop.set()

    def did(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._on_progress:
                self._on_progress(self._done, self.total)


def _files(images: str | Path | Images | Splits, max_bad: float) -> dict[str, Images]:
    """The parts, as files that have not been decoded."""
    if isinstance(images, str | Path):
        settings = {"source": str(images), "memory": _STREAMED, "max_bad": max_bad}
        images = load_data(DataConfig.model_validate(settings))
    splits = images if isinstance(images, Splits) else Splits(images, None)
    parts = {"train": splits.train} | ({} if splits.test is None else {"test": splits.test})
    found = {}
    for part, each in parts.items():
        if each.in_memory is not None or is_row(each.paths[0]):
            raise ValueError(f"the {len(each)} images are arrays, not image files; expected a folder of images")
        found[part] = each
    return found


def _check_room(out: Path, shards: list[Shard]) -> None:
    waiting = [shard for shard in shards if not shard.tar.exists()]
    need = sum(padded(item.size) + 3 * BLOCK for shard in waiting for item in shard.items) + len(waiting) * _RECORD
    free = shutil.disk_usage(out).free
    if need > free:
        raise OSError(
            errno.ENOSPC, f"the shards take {need / 2**30:.3g} GiB, and {out} has room for {free / 2**30:.3g} GiB"
        )


def _make(shard: Shard, work: _Work) -> None:
    """Writes a shard, or finds that it is there as it should be."""
    if (kept := _kept(shard)) is not None:
        for item in shard.items:
            if item.key not in kept:
                work.failed(BadImage(item.path, "it could not be read when its shard was written"))
        work.did(len(shard.items))
        return
    part, images, members = shard.tar.with_name(f".{shard.tar.name}.part"), list[Member](), list[Member]()
    labels: list[int] = []
    digest = hashlib.sha256()
    try:
        with part.open("wb") as file:
            for item in shard.items:
                if work.stop.is_set():
                    return
                try:
                    content, suffix = _image(item.path)
                except BadImage as bad:
                    work.failed(bad)
                else:
                    images.append(_add(file, digest, f"{item.key}.{suffix}", content))
                    members.append(images[-1])
                    labels.append(-1 if item.label is None else item.label)
                    if item.label is not None:
                        members.append(_add(file, digest, f"{item.key}.cls", str(item.label).encode()))
                work.did(1)
            end = bytes(2 * BLOCK)
            end += bytes(-(file.tell() + len(end)) % _RECORD)
            file.write(end)
            digest.update(end)
            file.flush()
            os.fsync(file.fileno())
        stamp = _read_back(part, members, digest.hexdigest())
        index = to_bytes(images, Content([image.name for image in images], labels, None, (), None), stamp)
        write(Path(f"{shard.tar}.index"), index)
        part.replace(shard.tar)
    except Unavailable:
        work.stop.set()
        raise
    except OSError as error:
        work.stop.set()
        raise OSError(error.errno, f"{shard.tar} could not be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def _image(path: str) -> tuple[bytes, str]:
    """An image's bytes and suffix. What only has an image's name is none: a set may name any file of this machine."""
    try:
        content = read_image(path)
    except Unavailable:
        raise
    except (OSError, ValueError) as error:
        raise BadImage(path, getattr(error, "strerror", None) or str(error)) from None
    suffix = suffix_of(content)
    if suffix is None:
        raise BadImage(path, "not an image in a known format")
    return content, suffix


def _kept(shard: Shard) -> set[str] | None:
    """Keys in a finished shard; None if there is none, or its bytes are not those that were written."""
    try:
        index = Index(f"{shard.tar}.index")
        with shard.tar.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != index.stamp.sha256:
                return None
        return {name.rpartition(".")[0] for name in index.content().names}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _add(file: io.BufferedWriter, digest: "hashlib._Hash", name: str, content: bytes) -> Member:
    header = tarfile.TarInfo(name)  # nobody's, of 1970: the same images give the same bytes
    header.size = len(content)
    member = Member(name, file.tell() + BLOCK, len(content))
    for each in (header.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % BLOCK)):
        file.write(each)
        digest.update(each)
    return member


def _read_back(part: Path, members: list[Member], sha256: str) -> Stamp:
    with part.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
        same = hashlib.file_digest(file, "sha256").hexdigest() == sha256
        if not same or scan(file.fileno(), str(part)) != (members, None, None):
            raise OSError(errno.EIO, "what is read back is not what was written; check the disk")
        status = os.fstat(file.fileno())
    return Stamp(status.st_size, status.st_mtime_ns, sha256)
