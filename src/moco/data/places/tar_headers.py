"""What is in an uncompressed tar and where: its headers alone are read, the files in it are not.

The formats are those of POSIX.1-1988 (ustar), POSIX.1-2001 (pax) and GNU tar. Python's tarfile reads them too, several
times slower (benchmarks/shards.py).
"""

import os
from typing import NamedTuple

BLOCK = 512
"""Bytes that everything in a tar is padded to a multiple of."""
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
"""How compressed files begin."""
NO_END = "it has no end mark"
"""Said of a tar that is cut off between two files, or was written so."""
_ZERO = bytes(BLOCK)
_LONGEST = 2**20  # bytes of a name or of a pax header; more is damage


class Member(NamedTuple):
    """A plain file in a tar."""

    name: str
    offset: int
    """Byte of the tar at which its content begins."""
    size: int


class Scan(NamedTuple):
    """The plain files of a tar, in its order."""

    members: list[Member]
    lost: str | None
    """Why reading stopped before the end, in words; None of a whole tar."""
    cut: str | None
    """Name of the member whose content is not all there."""


def scan(file: int, path: str) -> Scan:
    """Reads the headers of a tar.

    Args:
        file: descriptor of the open tar; its position is neither used nor moved.
        path: for messages.

    Raises:
        ValueError: it is compressed, no tar, or of a kind that cannot be read member by member.
        OSError: reading fails.
    """
    size, at, found = os.fstat(file).st_size, 0, list[Member]()
    long_name: bytes | None = None
    long_size: int | None = None
    if hasattr(os, "posix_fadvise"):
        # Else the kernel reads ahead what lies between the headers: the whole file.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    while True:
        head = os.pread(file, BLOCK, at)
        if at == 0:
            _refuse(head, path)
        if head == _ZERO:
            return Scan(found, None, None)
        if len(head) < BLOCK:
            return Scan(found, NO_END if not head else "it ends within a header", None)
        if not _is_header(head):
            return Scan(found, f"it is damaged at byte {at:,}", None)
        kind, begin = head[156:157], at + BLOCK
        length = _number(head[124:136]) if long_size is None or kind in b"xgLK" else long_size
        if length < 0:
            return Scan(found, f"it is damaged at byte {at:,}", None)
        name = long_name if long_name is not None else _name(head)
        if begin + length > size:
            return Scan(found, "it is cut off", None if kind in b"xgLK" else name.decode("utf-8", "surrogateescape"))
        at = begin + -(-length // BLOCK) * BLOCK
        if kind in b"xgLK":
            if kind in b"xL" and length <= _LONGEST:
                content = os.pread(file, length, begin)
                if kind == b"L":
                    long_name = content.rstrip(b"\0")
                else:
                    long_name, long_size = _pax(content, long_name, long_size)
            continue
        if kind == b"S":
            raise ValueError(f"{path!r} holds a sparse file, {name!r}; expected plain files: pack the images anew")
        if kind in b"07\0" and not name.endswith(b"/"):
            found.append(Member(name.decode("utf-8", "surrogateescape"), begin, length))
        long_name = long_size = None


def _refuse(head: bytes, path: str) -> None:
    for magic, how in COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(
                f"{path!r} is compressed ({how}); expected a plain tar, of which any image can be read alone: take the"
                " compression off, which saves nothing on images"
            )
    if not head:
        raise ValueError(f"{path!r} is empty; expected a tar: get it anew")
    if head != _ZERO and not (len(head) == BLOCK and _is_header(head)):
        raise ValueError(f"{path!r} is no tar; expected an uncompressed tar of images")


def _is_header(head: bytes) -> bool:
    """The sum of its bytes, those of the sum itself taken as spaces, stands in it."""
    try:
        return sum(head) - sum(head[148:156]) + 8 * 32 == _number(head[148:156])
    except ValueError:
        return False


def _number(field: bytes) -> int:
    """Octal digits; or binary, which GNU marks by the first bit, from 8 GiB on. -1 of anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.replace(b"\0", b" ").strip() or b"0", 8)
    except ValueError:
        return -1


def _name(head: bytes) -> bytes:
    name = head[:100].partition(b"\0")[0]
    if head[257:263] == b"ustar\0" and head[345]:  # GNU, whose mark goes on with spaces, keeps other things there
        return head[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _pax(content: bytes, name: bytes | None, size: int | None) -> tuple[bytes | None, int | None]:
    """Name and size that records of the form "length keyword=value newline" give to the next member."""
    at = 0
    while (space := content.find(b" ", at)) > at:
        try:
            length = int(content[at:space])
            keyword, _, value = content[space + 1 : at + length - 1].partition(b"=")
            if keyword == b"path":
                name = value
            elif keyword == b"size":
                size = int(value)
        except ValueError:
            break
        if length <= 0:
            break
        at += length
    return name, size
