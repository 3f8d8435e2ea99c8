"""The index of a tar of images: name, place, size and class of each, so that any is one read away.

It lies beside the tar as NAME.tar.index, or in the cache where that folder cannot be written. Little-endian throughout:

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
import threading
from bisect import bisect_left
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from moco.data.places.tar_headers import NO_END, Member, scan

SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif"))
"""Of files that are images, in lower case."""
MAGIC = b"MOCOIDX1"
LABELS = ("label", "cls")
"""Where KEY.json has the class of the image KEY."""
THE_REST = "(the rest)"
"""In place of the names of lost images, where there is none."""
_SIDE_CAR = 2**16  # bytes of a .cls or .json that are read


class Stamp(NamedTuple):
    """Which tar an index is of."""

    size: int
    time: int
    """Of its last change, in nanoseconds."""
    sha256: str | None = None
    """Of all its bytes, where they were all read."""


class Content(NamedTuple):
    """What an index says, in the order of the tar."""

    names: list[str]
    labels: list[int]
    """-1 for none."""
    classes: tuple[str, ...] | None
    """Names of the labels, where the tar has names and not numbers."""
    lost: tuple[str, ...]
    """Images that are known to be missing; of a tar that nobody had indexed before, the first of them."""
    reason: str | None
    """Why they are."""


@final
class Index:
    """An index file, mapped: processes share its memory.

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
        self._header: dict[str, Any] = json.loads(bytes(data[16:start]))
        count = int(self._header["images"])
        ends = [start + count * width for width in (0, 8, 16, 24, 28, 32)]
        if count < 0 or ends[-1] > len(data):
            raise ValueError(f"{str(path)!r} is cut off")
        # Views that give plain numbers, several times faster than numpy's.
        self._hashes = data[ends[0] : ends[1]].cast("Q")
        self._offsets = data[ends[1] : ends[2]].cast("Q")
        self._sizes = data[ends[2] : ends[3]].cast("Q")
        self._labels = data[ends[3] : ends[4]].cast("i")
        self._ends = data[ends[4] : ends[5]].cast("I")
        self._names = data[ends[5] :]
        self.stamp = Stamp(**self._header["tar"])

    def __len__(self) -> int:
        """Number of images."""
        return len(self._hashes)

    def find(self, name: bytes) -> tuple[int, int] | None:
        """First byte and size of the image of this name; None if there is none."""
        key = _hash(name)
        low = bisect_left(self._hashes, key)
        while low < len(self._hashes) and self._hashes[low] == key:
            if self._names[self._ends[low - 1] if low else 0 : self._ends[low]] == name:
                return self._offsets[low], self._sizes[low]
            low += 1
        return None

    def content(self) -> Content:
        """Everything in it.

        Raises:
            ValueError: it does not fit together, or reaches beyond its tar.
        """
        offsets, sizes = np.array(self._offsets), np.array(self._sizes)
        ends, names = np.array(self._ends), bytes(self._names)
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        limit = self.stamp.size
        if (offsets > limit).any() or (sizes > limit - np.minimum(offsets, limit)).any() or (starts > ends).any():
            raise ValueError("the index does not fit its tar")
        classes = self._header["classes"]
        labels, order = list(self._labels), np.argsort(offsets, kind="stable").tolist()
        if len(names) < int(ends[-1] if len(ends) else 0) or min(labels, default=0) < -1:
            raise ValueError("the index is damaged")
        if classes is not None and max(labels, default=-1) >= len(classes):
            raise ValueError("the index has labels without a class")
        return Content(
            names=[names[starts[i] : ends[i]].decode("utf-8", "surrogateescape") for i in order],
            labels=[labels[i] for i in order],
            classes=None if classes is None else tuple(map(str, classes)),
            lost=tuple(map(str, self._header["lost"])),
            reason=self._header["reason"],
        )


def to_bytes(images: list[Member], content: Content, stamp: Stamp) -> bytes:
    """An index file. `images` are those of `content`."""
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
    text = json.dumps(header).encode()  # ASCII: what is no UTF-8 is escaped
    text += b" " * (-len(text) % 8)
    ends = np.cumsum([len(encoded[i]) for i in order])
    return b"".join(
        [
            MAGIC,
            len(text).to_bytes(8, "little"),
            text,
            hashes[order].tobytes(),
            np.array([images[i].offset for i in order], dtype="<u8").tobytes(),
            np.array([images[i].size for i in order], dtype="<u8").tobytes(),
            np.array([content.labels[i] for i in order], dtype="<i4").tobytes(),
            ends.astype("<u4").tobytes(),
            *(encoded[i] for i in order),
        ]
    )


def read_tar(file: int, path: str, before: Content | None = None) -> tuple[list[Member], Content]:
    """The images of a tar and what their index says, from its headers and label files.

    A class is that of KEY.cls (a number or a name) or KEY.json (its `label` or `cls`), KEY ending at the first dot of
    the file's name: https://github.com/webdataset/webdataset. Of two files of one name the later one counts, as it does
    when a tar is unpacked.

    Args:
        file: descriptor of the open tar.
        path: for messages.
        before: an earlier index of the same tar, which knows what a cut has lost.

    Raises:
        ValueError: as `tar.scan`.
    """
    members, why, cut = scan(file, path)
    images, found = dict[str, Member](), dict[str, int | str]()
    unsafe = []
    for member in members:
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        kind = suffix.rpartition(".")[2].lower()
        if base.startswith("."):  # what macOS adds, for one
            continue
        if _is_image(base):
            if ".." in member.name.split("/") or member.name.startswith("/") or "\0" in member.name:
                unsafe.append(member.name)
            else:
                images[member.name] = member
        elif kind == "cls" or (kind == "json" and f"{folder}/{stem}" not in found):
            label = _label(os.pread(file, min(member.size, _SIDE_CAR), member.offset))
            if label is not None:
                found[f"{folder}/{stem}"] = label
    kept = list(images.values())
    known = [found.get(_key(member.name), -1) for member in kept]
    if why and found and kept and known[-1] == -1:  # cut off between an image and its label
        cut = kept.pop().name
        images.pop(cut), known.pop()
    classes = None
    if any(isinstance(label, str) for label in known):
        classes = tuple(sorted({str(label) for label in known if label != -1}))
        place = {name: number for number, name in enumerate(classes)}
        known = [-1 if label == -1 else place[str(label)] for label in known]
    lost = tuple(name for name in before.names if name not in images) if before and why else ()
    if why and not lost:
        lost = (cut,) if cut and _is_image(cut) else () if why == NO_END else (THE_REST,)
    if unsafe:
        lost, why = (*lost, *unsafe), why or "its name leads out of the tar"
    return kept, Content([m.name for m in kept], [int(label) for label in known], classes, lost, why)


def ensure(path: str, cache: Path) -> Index:
    """The index of a local tar: the one there is if it is of this tar as it is now, else a new one.

    Args:
        path: of the tar.
        cache: folder for the index if that of the tar cannot be written.

    Raises:
        ValueError: as `tar.scan`.
        OSError: the tar cannot be read, or an index be written anywhere.
    """
    if not hasattr(os, "pread"):
        raise ValueError(f"{path!r}: tars of images are read on Linux and macOS only; unpack it into a folder")
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        folder = stat.S_ISDIR(status.st_mode)
        raise IsADirectoryError(errno.EISDIR, "a folder", path) if folder else OSError(errno.EINVAL, "not a file", path)
    name = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:24]
    places, before = [Path(f"{path}.index"), cache / "indexes" / f"{name}.index"], None
    file = os.open(path, os.O_RDONLY)
    try:
        status = os.fstat(file)
        for place in places:
            with suppress(OSError, ValueError, KeyError, TypeError):
                index = Index(place)
                if index.stamp.size == status.st_size and index.stamp.time == status.st_mtime_ns:
                    return index
                before = before or index.content()
        images, content = read_tar(file, path, before)
    finally:
        os.close(file)
    made = to_bytes(images, content, Stamp(status.st_size, status.st_mtime_ns))
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write(place, made)
            return Index(place)
        except OSError:
            if place is places[-1]:
                raise
    raise AssertionError


def write(path: Path, content: bytes) -> None:
    """A file that is there as a whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _is_image(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.rpartition(".")[2].lower() in SUFFIXES and not base.startswith(".")


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _label(content: bytes) -> int | str | None:
    """A class from what a .cls or .json holds; None if it says none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = content.decode("utf-8", "replace").strip()
    if isinstance(value, dict):
        value = next((value[name] for name in LABELS if name in value), None)
    if isinstance(value, bool | float | list) or value is None or value == "":
        return None
    if isinstance(value, int):
        return value if 0 <= value < 2**31 else None
    return int(value) if value.isascii() and value.isdigit() and len(value) < 10 else value
