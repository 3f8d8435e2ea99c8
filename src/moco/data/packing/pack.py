"""Write images into tar shards in the WebDataset layout, each with an index beside it.

OUT/0000.tar ...     KEY.jpg with the image's own bytes, KEY.cls with the number of its class
OUT/0000.tar.index   its index (moco.data.places.tar_index)
OUT/classes.json     the names of the class numbers
OUT/pack.json        the names of all shards, written last

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
from moco.data.places.addresses import array_row
from moco.data.places.open import read_image
from moco.data.places.remote import Unavailable
from moco.data.places.tar_headers import BLOCK, Member, scan
from moco.data.places.tar_index import Content, Index, Stamp, to_bytes, write_index
from moco.data.sources.shards import CLASSES, MANIFEST
from moco.data.unreadable import report_bad
from moco.files import write_atomically

SHARD_SIZE = 512
"""Approximate size of a shard in MiB."""
_STREAMED = 1e-9  # GiB of decoded images to hold: none
_RECORD = 20 * BLOCK  # tar pads its files to a multiple of it

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
    """Write images into tar shards, in a shuffled order that depends on their number alone.

    If it is killed at any moment, the same call goes on: finished shards are compared with their SHA-256, the others
    are written. Every shard is read back before it gets its name. The same images give the same bytes.

    Args:
        images: a folder, other shards, or what `load_data` returns, as files.
        out: a new folder, or one where this was begun.
        shard_size: MiB that a shard is filled up to; a larger image has a shard to itself.
        workers: shards written at a time; by default one for each core.
        max_bad: largest fraction of unreadable images that is left out.
        on_progress: called with (images done, images in all), from several threads, one at a time.

    Returns:
        Where the shards are, how many, and which images are missing.

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
    out, parts = Path(out), _as_files(images, max_bad)
    folders = {part: out / part if len(parts) > 1 else out for part in parts}
    plans = {part: plan_of(found, folders[part], shard_size * 2**20) for part, found in parts.items()}
    shards = [shard for plan in plans.values() for shard in plan]
    progress = _Progress(sum(len(shard.items) for shard in shards), max_bad, on_progress)
    with begin(out, plans):
        _check_room(out, shards)
        for part, found in parts.items():
            folders[part].mkdir(exist_ok=True)
            if found.classes is not None and found.labels is not None:
                _write_json(folders[part] / CLASSES, found.classes, indent=0)
        _write_all(shards, progress, workers)
        report_bad(progress.bad, progress.total, max_bad)
        unreadable = tuple(sorted(bad.path for bad in progress.bad))
        manifest = {
            "format": 1,
            "shards": {part: [str(shard.tar.relative_to(out)) for shard in plan] for part, plan in plans.items()},
            "images": {part: len(found) for part, found in parts.items()},
            "unreadable": unreadable,
        }
        _write_json(out / MANIFEST, manifest, indent=1)
    size = sum(shard.tar.stat().st_size for shard in shards)
    return Packed(out, len(shards), progress.total - len(unreadable), size, unreadable)


@final
class _Progress:
    """What all threads count together, and whether they are to stop."""

    def __init__(self, total: int, max_bad: float, on_progress: Report | None):
        self.total, self._max_bad, self._on_progress = total, max_bad, on_progress
        self.bad: list[BadImage] = []
        self.stop = threading.Event()
        self._done, self._lock = 0, threading.Lock()

    def add(self, bad: BadImage | None) -> None:
        """Count an image that is in its shard, or is not because it is bad."""
        with self._lock:
            if bad:
                self.bad.append(bad)
                if len(self.bad) > self._max_bad * self.total:
                    self.stop.set()
            self._done += 1
            if self._on_progress:
                self._on_progress(self._done, self.total)


def _as_files(images: str | Path | Images | Splits, max_bad: float) -> dict[str, Images]:
    """Return the parts of the images, as files that are not decoded."""
    if isinstance(images, str | Path):
        settings = {"source": str(images), "memory": _STREAMED, "max_bad": max_bad}
        images = load_data(DataConfig.model_validate(settings))
    splits = images if isinstance(images, Splits) else Splits(images, None)
    found = {}
    for part, each in {"train": splits.train, "test": splits.test}.items():
        if each is not None and (each.in_memory is not None or array_row(each.paths[0])):
            raise ValueError(f"the {len(each)} images are arrays, not image files; expected a folder of images")
        if each is not None:
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


def _write_json(path: Path, content: object, *, indent: int) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=indent).encode()))


def _write_all(shards: list[Shard], progress: _Progress, workers: int | None) -> None:
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        futures = [pool.submit(_write_unless_finished, shard, progress) for shard in shards]
        try:
            for future in futures:
                future.result()
        except BaseException:
            progress.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _write_unless_finished(shard: Shard, progress: _Progress) -> None:
    if (keys := _keys_of_finished(shard)) is not None:
        for item in shard.items:
            why = "it could not be read when its shard was written"
            progress.add(None if item.key in keys else BadImage(item.path, why))
        return
    part = shard.tar.with_name(f".{shard.tar.name}.part")
    try:
        _write(shard, part, progress)
    except Unavailable:
        progress.stop.set()
        raise
    except OSError as error:
        progress.stop.set()
        raise OSError(error.errno, f"{shard.tar} could not be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def _write(shard: Shard, part: Path, progress: _Progress) -> None:
    """Write a shard under another name, read it back, write its index, and give it its name."""
    images, members, labels = list[Member](), list[Member](), list[int]()
    digest = hashlib.sha256()
    with part.open("wb") as file:
        for item in shard.items:
            if progress.stop.is_set():
                return
            try:
                content, suffix = _image(item.path)
            except BadImage as bad:
                progress.add(bad)
                continue
            images.append(_add(file, digest, f"{item.key}.{suffix}", content))
            members.append(images[-1])
            labels.append(-1 if item.label is None else item.label)
            if item.label is not None:
                members.append(_add(file, digest, f"{item.key}.cls", str(item.label).encode()))
            progress.add(None)
        end = bytes(2 * BLOCK + -(file.tell() + 2 * BLOCK) % _RECORD)
        file.write(end)
        digest.update(end)
        file.flush()
        os.fsync(file.fileno())
    stamp = _read_back(part, members, digest.hexdigest())
    index = to_bytes(images, Content([image.name for image in images], labels, None, (), None), stamp)
    write_index(Path(f"{shard.tar}.index"), index)
    part.replace(shard.tar)


def _image(path: str) -> tuple[bytes, str]:
    """Return an image's bytes and suffix; raise BadImage for other files, because a list may name any file."""
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


def _keys_of_finished(shard: Shard) -> set[str] | None:
    """Return the keys in a finished shard; None if there is none, or its bytes are not those that were written."""
    try:
        index = Index(f"{shard.tar}.index")
        with shard.tar.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != index.stamp.sha256:
                return None
        return {name.rpartition(".")[0] for name in index.content().names}
    except (OSError, ValueError):
        return None


def _add(file: io.BufferedWriter, digest: "hashlib._Hash", name: str, content: bytes) -> Member:
    header = tarfile.TarInfo(name)  # without owner, and of 1970, so that the same images give the same bytes
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
