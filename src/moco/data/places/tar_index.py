"""The index of a tar of images: name, offset, size and class of each, so that any of them takes one read.

It lies beside the tar as NAME.tar.index, or in the cache if that folder cannot be written. Little-endian throughout:

    8 bytes  MOCOIDX1
    8 bytes  length of the header
    header   JSON: the tar's size, time and SHA-256, class names, what is lost; padded to a multiple of 8
    n x 8    hash of the name, ascending
    n x 8    first byte of the image in the tar
    n x 8    its size
    n x 4    its class, -1 for none
    n x 4    where its name ends among the names
    names    one after the other
"""

import errno
import hashlib
import json
import mmap
import os
import stat
from bisect import bisect_left
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from moco.data.places.tar_headers import NO_END, Member, scan
from moco.files import write_atomically

SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif"))
"""Of files that are images, in lower case."""
MAGIC = b"MOCOIDX1"
LABELS = ("label", "cls")
"""The keys of KEY.json under which the class of the image KEY may be."""
THE_REST = "(the rest)"
"""Stands for lost images whose names are not known."""
_LONGEST_LABEL = 2**16  # bytes of a .cls or .json that are read


class Stamp(NamedTuple):
    """Which tar an index is of."""

    size: int
    time: int
    """Of its last change, in nanoseconds."""
    sha256: str | None = None
    """Of all its bytes, if they were all read."""


class Content(NamedTuple):
    """What an index says, in the order of the tar."""

    names: list[str]
    labels: list[int]
    """-1 for none."""
    classes: tuple[str, ...] | None
    """Names of the labels, if the tar has names and not numbers."""
    lost: tuple[str, ...]
    """Images that are known to be missing; only the first of them if the tar had no index before."""
    reason: str | None
    """Why they are missing."""


@final
class Index:
    """An index file, mapped into memory, which processes share.

    Raises:
        ValueError: it is not an index, or a damaged one.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | Path):
        with open(path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        start = int.from_bytes(data[8:16], "little") + 16
        if data[:8] != MAGIC or start > len(data):
            raise ValueError(f"{str(path)!r} is no index of a tar")
        try:
            header: dict[str, Any] = json.loads(bytes(data[16:start]))
            self.stamp = Stamp(**header["tar"])
            self._classes = None if header["classes"] is None else tuple(map(str, header["classes"]))
            self._lost, self._reason = tuple(map(str, header["lost"])), header["reason"]
            count = int(header["images"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise ValueError(f"{str(path)!r} is damaged") from None
        ends = [start + count * width for width in (0, 8, 16, 24, 28, 32)]
        if count < 0 or ends[-1] > len(data):
            raise ValueError(f"{str(path)!r} is cut off")
        # Views that give plain numbers, several times faster than numpy's.
        columns = [data[begin:end] for begin, end in zip(ends[:-1], ends[1:], strict=True)]
        self._hashes, self._offsets, self._sizes = (column.cast("Q") for column in columns[:3])
        self._labels, self._ends = columns[3].cast("i"), columns[4].cast("I")
        self._names = data[ends[-1] :]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._hashes)

    def find(self, name: bytes) -> tuple[int, int] | None:
        """Return first byte and size of the image of this name; None if there is none."""
        key = _hash(name)
        low = bisect_left(self._hashes, key)
        while low < len(self._hashes) and self._hashes[low] == key:
            if self._names[self._ends[low - 1] if low else 0 : self._ends[low]] == name:
                return self._offsets[low], self._sizes[low]
            low += 1
        return None

    def content(self) -> Content:
        """Return everything in it.

        Raises:
            ValueError: it is inconsistent, or reaches beyond its tar.
        """
        offsets, sizes = np.array(self._offsets), np.array(self._sizes)
        ends, names = np.array(self._ends), bytes(self._names)
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        limit = self.stamp.size
        if (offsets > limit).any() or (sizes > limit - np.minimum(offsets, limit)).any() or (starts > ends).any():
            raise ValueError("the index does not fit its tar")
        labels, order = list(self._labels), np.argsort(offsets, kind="stable").tolist()
        if len(names) < int(ends[-1] if len(ends) else 0) or min(labels, default=0) < -1:
            raise ValueError("the index is damaged")
        if self._classes is not None and max(labels, default=-1) >= len(self._classes):
            raise ValueError("the index has labels without a class")
        return Content(
            names=[names[starts[i] : ends[i]].decode("utf-8", "surrogateescape") for i in order],
            labels=[labels[i] for i in order],
            classes=self._classes,
            lost=self._lost,
            reason=self._reason,
        )


def to_bytes(images: list[Member], content: Content, stamp: Stamp) -> bytes:
    """Return an index file; `images` are those of `content`."""
    header = {
        "format": 1,
        "images": len(images),
        "tar": stamp._asdict(),
        "classes": content.classes,
        "lost": content.lost,
        "reason": content.reason,
    }
    encoded = [name.encode("utf-8", "surrogateescape") for name in content.names]
    hashes = np.array([_hash(name) for name in encoded], dtype="<u8")
    order = np.argsort(hashes, kind="stable").tolist()
    text = json.dumps(header).encode()  # ASCII: everything else is escaped
    text += b" " * (-len(text) % 8)
    columns = (
        hashes[order],
        np.array([images[i].offset for i in order], dtype="<u8"),
        np.array([images[i].size for i in order], dtype="<u8"),
        np.array([content.labels[i] for i in order], dtype="<i4"),
        np.cumsum([len(encoded[i]) for i in order]).astype("<u4"),
    )
    names = (encoded[i] for i in order)
    return b"".join([MAGIC, len(text).to_bytes(8, "little"), text, *(each.tobytes() for each in columns), *names])


def write_index(path: Path, content: bytes) -> Index:
    """Write an index file and open it.

    Raises:
        ValueError: the content is not an index.
        OSError: it cannot be written.
    """
    write_atomically(path, lambda file: file.write(content))
    return Index(path)


def read_tar(file: int, path: str, before: Content | None = None) -> tuple[list[Member], Content]:
    """Find the images of a tar and what its index is to say, from its headers and label files.

    A class is that of KEY.cls (a number or a name) or KEY.json (its `label` or `cls`), KEY ending at the first dot of
    the file's name: https://github.com/webdataset/webdataset. Of two files of one name the later one counts, as when a
    tar is unpacked.

    Args:
        file: descriptor of the open tar.
        path: for messages.
        before: an earlier index of the same tar, which knows what has been cut off.

    Raises:
        ValueError: as `scan`.
    """
    members, why, cut = scan(file, path)
    images, label_of, unsafe = dict[str, Member](), dict[str, int | str](), list[str]()
    for member in members:
        base = member.name.rpartition("/")[2]
        suffix = base.rpartition(".")[2].lower()
        if base.startswith("."):  # such as those that macOS adds
            continue
        if suffix in SUFFIXES:
            if ".." in member.name.split("/") or member.name.startswith("/") or "\0" in member.name:
                unsafe.append(member.name)
            else:
                images[member.name] = member
        elif suffix == "cls" or (suffix == "json" and _key(member.name) not in label_of):
            label = _label(os.pread(file, min(member.size, _LONGEST_LABEL), member.offset))
            if label is not None:
                label_of[_key(member.name)] = label
    labels = [label_of.get(_key(name), -1) for name in images]
    if why and label_of and images and labels[-1] == -1:  # cut off between an image and its label
        cut, _ = images.popitem()
        labels.pop()
    classes = None
    if any(isinstance(label, str) for label in labels):
        classes = tuple(sorted({str(label) for label in labels if label != -1}))
        number_of = {name: number for number, name in enumerate(classes)}
        labels = [-1 if label == -1 else number_of[str(label)] for label in labels]
    lost = tuple(name for name in before.names if name not in images) if before and why else ()
    if why and not lost:
        lost = (cut,) if cut and _is_image(cut) else () if why == NO_END else (THE_REST,)
    if unsafe:
        lost, why = (*lost, *unsafe), why or "its name leads out of the tar"
    return list(images.values()), Content(list(images), [int(label) for label in labels], classes, lost, why)


def ensure(path: str, cache: Path) -> Index:
    """Return the index of a local tar: the one there is if it is of the tar as it is now, else a new one.

    Args:
        path: of the tar.
        cache: folder for the index if that of the tar cannot be written.

    Raises:
        ValueError: as `scan`.
        OSError: the tar cannot be read, or no index can be written.
    """
    if not hasattr(os, "pread"):
        raise ValueError(f"{path!r}: tars of images are read on Linux and macOS only; unpack it into a folder")
    mode = os.stat(path).st_mode  # before it is opened, which would wait for the writer of a pipe
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder", path)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a file", path)
    name = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:24]
    beside, in_cache, before = Path(f"{path}.index"), cache / "indexes" / f"{name}.index", None
    file = os.open(path, os.O_RDONLY)
    try:
        status = os.fstat(file)
        for place in (beside, in_cache):
            with suppress(OSError, ValueError):
                index = Index(place)
                if index.stamp.size == status.st_size and index.stamp.time == status.st_mtime_ns:
                    return index
                before = before or index.content()
        images, content = read_tar(file, path, before)
    finally:
        os.close(file)
    new = to_bytes(images, content, Stamp(status.st_size, status.st_mtime_ns))
    try:
        return write_index(beside, new)
    except OSError:
        return write_index(in_cache, new)


def _is_image(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.rpartition(".")[2].lower() in SUFFIXES and not base.startswith(".")


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _label(content: bytes) -> int | str | None:
    """Return the class in a .cls or .json; None if it has none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = content.decode("utf-8", "replace").strip()
    if isinstance(value, dict):
        value = next((value[name] for name in LABELS if name in value), None)
    if not isinstance(value, int | str) or isinstance(value, bool) or value == "":
        return None
    if isinstance(value, int):
        return value if 0 <= value < 2**31 else None
    return int(value) if value.isascii() and value.isdigit() and len(value) < 10 else value
