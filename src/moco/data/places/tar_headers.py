"""What is in an uncompressed tar, and where: only its headers are read.

The formats are those of POSIX.1-1988 (ustar), POSIX.1-2001 (pax) and GNU tar. Python's tarfile takes three to four
times as long to index a tar (benchmarks/shards.py), and reads as much into memory as a damaged header asks for.
"""

import os
from contextlib import suppress
from typing import NamedTuple, NoReturn

BLOCK = 512
"""Everything in a tar is padded to a multiple of so many bytes."""
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
"""How compressed files begin."""
NO_END = "it has no end mark"
"""Why reading stopped in a tar that was cut off between two files, or written without an end mark."""
_ZERO = bytes(BLOCK)
_LONGEST = 2**20  # bytes of a name or of a pax header; a longer one is damaged


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int
    """Byte of the tar at which its content begins."""
    size: int


class Scan(NamedTuple):
    """The regular files of a tar, in its order."""

    members: list[Member]
    lost: str | None
    """Why reading stopped before the end; None for a complete tar."""
    cut: str | None
    """Name of the member whose content is incomplete."""


def scan(file: int, path: str) -> Scan:
    """Read the headers of a tar.

    Args:
        file: descriptor of the open tar; its position is neither used nor moved.
        path: for messages.

    Raises:
        ValueError: it is compressed, not a tar, or holds a sparse file.
        OSError: reading fails.
    """
    size, at, found = os.fstat(file).st_size, 0, list[Member]()
    long_name: bytes | None = None
    long_size: int | None = None
    if hasattr(os, "posix_fadvise"):
        # Otherwise the kernel reads ahead what lies between the headers: the whole file.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    while True:
        head = os.pread(file, BLOCK, at)
        if head == _ZERO:
            return Scan(found, None, None)
        is_header = len(head) == BLOCK and _is_header(head)
        if at == 0 and not is_header:
            _refuse(head, path)
        if len(head) < BLOCK:
            return Scan(found, "it ends within a header" if head else NO_END, None)
        kind, begin = head[156:157], at + BLOCK
        is_extension = kind in b"xgLK"  # a header that says more about the next member
        length = _number(head[124:136]) if long_size is None or is_extension else long_size
        if not is_header or length < 0:
            return Scan(found, f"it is damaged at byte {at:,}", None)
        name = (_name(head) if long_name is None else long_name).decode("utf-8", "surrogateescape")
        if begin + length > size:
            return Scan(found, "it is cut off", None if is_extension else name)
        at = begin + -(-length // BLOCK) * BLOCK
        if is_extension:
            if kind in b"xL" and length <= _LONGEST:
                content = os.pread(file, length, begin)
                if kind == b"L":
                    long_name = content.rstrip(b"\0")
                else:
                    long_name, long_size = _pax(content, long_name, long_size)
            continue
        if kind == b"S":
            raise ValueError(f"{path!r} holds a sparse file, {name!r}; expected plain files: pack the images anew")
        if kind in b"07\0" and not name.endswith("/"):
            found.append(Member(name, begin, length))
        long_name = long_size = None


def _refuse(head: bytes, path: str) -> NoReturn:
    for magic, how in COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(
                f"{path!r} is compressed ({how}); expected a plain tar, of which any image can be read alone: take the"
                " compression off, which saves nothing on images"
            )
    if not head:
        raise ValueError(f"{path!r} is empty; expected a tar: get it anew")
    raise ValueError(f"{path!r} is no tar; expected an uncompressed tar of images")


def _is_header(head: bytes) -> bool:
    """Whether the checksum is right: the sum of all bytes, those of the checksum itself taken as spaces."""
    return sum(head) - sum(head[148:156]) + 8 * 32 == _number(head[148:156])


def _number(field: bytes) -> int:
    """Return the value of octal digits, or of GNU's binary numbers, which have the first bit set; -1 if neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.replace(b"\0", b" ").strip() or b"0", 8)
    except ValueError:
        return -1


def _name(head: bytes) -> bytes:
    name = head[:100].partition(b"\0")[0]
    if head[257:263] == b"ustar\0" and head[345]:  # GNU tar, whose magic is `ustar  `, keeps other things there
        return head[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _pax(content: bytes, name: bytes | None, size: int | None) -> tuple[bytes | None, int | None]:
    """Update a name and a size from records of the form "length keyword=value newline"."""
    at = 0
    with suppress(ValueError):  # a damaged record and those after it are ignored
        while (space := content.find(b" ", at)) > at and (length := int(content[at:space])) > 0:
            keyword, _, value = content[space + 1 : at + length - 1].partition(b"=")
            if keyword == b"path":
                name = value
            elif keyword == b"size":
                size = int(value)
            at += length
    return name, size
