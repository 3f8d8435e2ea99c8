"""What an image is called in a tar that we write."""

import hashlib
import os
import re

_KEPT = re.compile(r"[^A-Za-z0-9_+=@-]")
_LONGEST = 80  # letters of a key: with its suffix it has to fit the 100 of a plain tar header
MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"II+\0", "tif"),
    (b"II\0*", "tif"),
    (b"MM\0*", "tif"),
    (b"MM\0+", "tif"),
    (b"MM*\0", "tif"),
)
"""How files of a format begin; WebP is told by its ninth byte."""


def keys_of(paths: tuple[str, ...]) -> list[str]:
    """A name in the tar for each image: its path from where all are, of letters that every system and reader takes.

    A name that would not be its own gets a hash of the path at its end. There is no dot in it, for at the first one
    readers of this layout part the key from the suffix.
    """
    # Of images that lie in shards already, the names there.
    names = [path.rpartition(".tar/")[2] for path in paths]
    root = os.path.commonprefix([f"{name.rpartition('/')[0]}/" for name in names]).rpartition("/")[0] + "/"
    taken, keys = set[str](), [""] * len(paths)
    for i in sorted(range(len(paths)), key=paths.__getitem__):
        *given, base = names[i].removeprefix(root).lstrip("/").split("/")
        given.append(base.rpartition(".")[0] or base)
        key = "/".join(_KEPT.sub("_", piece) for piece in given)
        if key != "/".join(given) or key.lower() in taken or len(key) > _LONGEST:
            mark = hashlib.sha256(os.fsencode(paths[i])).hexdigest()[:10]
            key = f"{key[: _LONGEST - len(mark) - 1].rstrip('/')}-{mark}"
        taken.add(key.lower())
        keys[i] = key
    return keys


def suffix_of(content: bytes) -> str | None:
    """Suffix by what the file is, for its name may lie; None of what is no image that we read."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    return next((suffix for magic, suffix in MAGIC if content.startswith(magic)), None)
