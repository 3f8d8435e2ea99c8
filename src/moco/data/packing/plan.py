"""Which image goes into which shard, and that one process alone writes them into a folder."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

from moco.data.images import Images
from moco.data.loader import epoch_order
from moco.data.places.addresses import name_in_tar
from moco.data.places.open import open_image
from moco.data.places.remote import Unavailable
from moco.data.places.tar_headers import BLOCK
from moco.data.sources.shards import PLAN
from moco.files import take_lock


class Item(NamedTuple):
    """An image that is to go into a shard."""

    path: str
    key: str
    label: int | None
    size: int


class Shard(NamedTuple):
    """What goes into a tar, in its order."""

    tar: Path
    items: list[Item]


def plan_of(images: Images, folder: Path, size: float) -> list[Shard]:
    """Which image goes where: a function of the images alone.

    Args:
        images: to be packed.
        folder: of the shards.
        size: bytes that a shard is filled up to.
    """
    keys, labels = keys_of(images.paths), None if images.labels is None else images.labels.tolist()
    shards: list[list[Item]] = [[]]
    filled = 0
    # Neighbours in a folder are alike. Shuffled, every shard is a sample of all images.
    for i in epoch_order(len(images), seed=0, epoch=0).tolist():
        item = Item(images.paths[i], keys[i], None if labels is None else labels[i], _size(images.paths[i]))
        needs = padded(item.size) + BLOCK * (1 if labels is None else 3)
        if shards[-1] and filled + needs > size:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += needs
    digits = max(4, len(str(len(shards) - 1)))
    return [Shard(folder / f"{number:0{digits}}.tar", items) for number, items in enumerate(shards)]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        pass
    try:
        with open_image(path) as file:
            return file.seek(0, os.SEEK_END)
    except Unavailable:
        raise
    except (OSError, ValueError):
        return 0  # its turn to be named unreadable comes


def begin(out: Path, plans: dict[str, list[Shard]]) -> BinaryIO:
    """Create the folder, or find it as it was begun; others are refused while the returned file is open.

    Raises:
        ValueError: it was begun with other images, or another process writes there.
        FileExistsError: it has something else in it.
    """
    digest = hashlib.sha256()
    for plan in plans.values():
        for shard in plan:
            digest.update(f"{shard.tar.name}\n".encode())
            for item in shard.items:
                digest.update(os.fsencode(f"{item.path}\n{item.key}\n{item.label}\n{item.size}\n"))
    plan, there = json.dumps({"format": 1, "plan": digest.hexdigest()}).encode(), out / PLAN
    if not there.is_file() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} has something else in it; expected a new folder, or one where this was begun")
    out.mkdir(parents=True, exist_ok=True)
    file = there.open("a+b")
    try:
        if not take_lock(file):
            raise ValueError(f"{out} is being written by another `moco pack`; wait for it, or give a new folder")
        file.seek(0)
        before = file.read()
        if not before:
            file.write(plan)
            file.flush()
            os.fsync(file.fileno())
        elif before != plan:
            raise ValueError(f"{out} was begun with other images or another shard size; expected a new folder")
    except BaseException:
        file.close()
        raise
    return file


def padded(size: int) -> int:
    """Bytes that so many take in a tar."""
    return size + -size % BLOCK


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
    """Return a name in the tar for each image: its relative path, in letters that every system and reader accepts.

    A name that would not be its own gets a hash of the path at its end. There is no dot in it, for at the first one
    readers of this layout part the key from the suffix.
    """
    # Of images that lie in shards already, the names there.
    names = [name_in_tar(path) for path in paths]
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
