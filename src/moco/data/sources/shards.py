"""Images in tar shards, here or anywhere that has a URL: which shards there are, and what is in them.

Any one image is read alone by its path (`moco.data.places.open`), so shards are shuffled, shared out and resumed as a
folder is.
"""

import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from glob import glob
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from moco.config import DataConfig
from moco.data.images import FileImages, Images, Splits
from moco.data.places import remote
from moco.data.places.addresses import is_remote
from moco.data.places.tar_index import SUFFIXES, Content
from moco.data.places.tars import index_of, let_go
from moco.data.sources.listing import HELD_OUT, Listing, read_listing
from moco.data.unreadable import BadImage, report_bad

MANIFEST, PLAN, CLASSES = "pack.json", ".plan.json", "classes.json"
"""Beside packed shards: which there are, and the names of the class numbers."""
_AT_ONCE = 16  # shards asked for at a time
_BRACES = re.compile(r"\{([^{}]*)\}")
_MAGIC = re.compile(r"[*?\[]")


def is_shards(source: str) -> bool:
    """Whether it is a tar, a pattern of tars, a URL, or a folder that holds tars and no images of its own."""
    if is_remote(source):
        return True
    folder = Path(source).expanduser()
    if folder.is_dir():
        return bool(_tars(folder) or _tars(folder / "train"))
    return bool(re.search(r"\.(tar(\.\w+)?|tgz)$", source))


def load_shards(source: str, config: DataConfig) -> Splits:
    """Images of `shards/{0000..0099}.tar`, one tar, a glob, a folder of tars, or any of these as a URL.

    A folder may have `train/` and `test/`; a URL of one needs the `pack.json` of `moco pack`. Class numbers are named
    by a `classes.json` beside the shards, if there is one. Images of an incomplete shard that are not there count as
    unreadable.

    Raises:
        ValueError: a shard is missing, compressed or no tar, or too many images cannot be read.
    """
    train, test = _parts(source)
    images = _load(source, train, config, None, config.memory * 2**30)
    if not test:
        return Splits(images, None)
    return Splits(images, _load(source, test, config, images.classes, config.memory * 2**30 - images.nbytes))


def expand(pattern: str) -> list[str]:
    """All names of a pattern with `{0000..0099}` or `{a,b}`, in order.

    Example:
        >>> expand("s3://b/{08..10}.tar")
        ['s3://b/08.tar', 's3://b/09.tar', 's3://b/10.tar']
    """
    pieces = _BRACES.split(pattern)
    choices = [[piece] if number % 2 == 0 else _choices(piece) for number, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in product(*choices)]


def _parts(source: str) -> tuple[list[str], list[str]]:
    """Shards of the training and of the test images."""
    if re.search(r"\.(tgz|tar\.\w+)$", source):
        raise ValueError(
            f"{source!r} is compressed; expected plain tars, of which any image can be read alone: take the compression"
            " off, which saves nothing on images"
        )
    if source.endswith(".tar") and not Path(source).expanduser().is_dir():
        return _named(source), []
    if is_remote(source):
        return _manifest(source.rstrip("/"))
    folder = Path(source).expanduser()
    if direct := _tars(folder):
        train, test = direct, []
    else:
        held_out = (_tars(folder / name) for name in HELD_OUT)
        train, test = _tars(folder / "train"), next((tars for tars in held_out if tars), [])
    if train:
        _refuse_part(folder, {*train, *test})
    return train, test


def _refuse_part(folder: Path, there: set[str]) -> None:
    """Refuses a part of what `moco pack` was to write or has written."""
    if (folder / MANIFEST).is_file():
        try:
            named = json.loads((folder / MANIFEST).read_bytes())["shards"]
            lacking = sorted(name for names in named.values() for name in names if str(folder / name) not in there)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / MANIFEST} cannot be read ({' '.join(str(error).split())})") from None
        if lacking:
            raise ValueError(
                f"{str(folder)!r} lacks {len(lacking)} of the shards that its {MANIFEST} names, the first is "
                f"{lacking[0]!r}; copy them there, or give a pattern of those that you want"
            )
    elif (folder / PLAN).is_file():
        raise ValueError(f"{str(folder)!r} is not packed to its end; the same `moco pack` command goes on with it")


def _tars(folder: Path) -> list[str]:
    """Of a folder of shards; none of a folder of images that a tar happens to be in."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".")]
    except OSError:
        return []
    tars = sorted(str(folder / name) for name in names if name.endswith(".tar") and (folder / name).is_file())
    other = any((folder / name).is_dir() or name.rpartition(".")[2].lower() in SUFFIXES for name in names)
    return [] if other else tars


def _named(pattern: str) -> list[str]:
    found = []
    for each in expand(pattern if is_remote(pattern) else os.path.expanduser(pattern)):
        if not _MAGIC.search(each):
            found.append(each)
        elif is_remote(each):
            found += remote.glob(each)
        else:
            found += sorted(glob(each))
    if not found:
        raise ValueError(f"no file is called as in {pattern!r}; expected tars: check the pattern")
    return found


def _manifest(folder: str) -> tuple[list[str], list[str]]:
    try:
        content = remote.read(f"{folder}/{MANIFEST}")
        told = json.loads(content) if content is not None else None
        if told is not None:
            parts = {part: [f"{folder}/{name}" for name in names] for part, names in told["shards"].items()}
            return parts["train"], parts.get("test", [])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}/{MANIFEST} cannot be read ({' '.join(str(error).split())})") from None
    raise ValueError(
        f"{folder!r} has no {MANIFEST}; expected a folder that `moco pack` wrote, or a pattern such as"
        f" {folder}/{{0000..0099}}.tar"
    )


def _choices(inside: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers is None:
        return inside.split(",") if "," in inside else ["{" + inside + "}"]
    first, last = numbers.groups()
    if int(first) > int(last):
        raise ValueError(f"{{{inside}}} counts down; expected the smaller number first")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


class _Named(NamedTuple):
    """Images of all shards: their paths, and classes by name or by number."""

    paths: list[str]
    labels: list[str | int]
    lost: list[BadImage]


def _load(source: str, tars: list[str], config: DataConfig, known: tuple[str, ...] | None, budget: float) -> Images:
    let_go()  # a tar may have changed since it was opened
    named = _gather(tars, _contents(tars))
    total = len(named.paths) + len(named.lost)
    if not named.paths:
        raise ValueError(f"no images in {source!r}; expected files ending in {', '.join(sorted(SUFFIXES))}")
    report_bad(named.lost, total, config.max_bad)
    labels, classes = _classes(tars[0], named.labels, known)
    if is_remote(tars[0]) and not config.cache:
        # To look at each header would be to fetch everything before the first step.
        tensor = None if labels is None else torch.tensor(labels)
        images = FileImages(tuple(named.paths), tensor, classes, (), config.channels)
    else:
        # Training and test images of one source are kept apart.
        part = Path(source, tars[0].rpartition("/")[0].rpartition("/")[2])
        images = read_listing(Listing(named.paths, labels, classes), part, config, budget)
    return replace(images, skipped=(*(each.path for each in named.lost), *images.skipped))


def _contents(tars: list[str]) -> list[Content]:
    def read(tar: str) -> Content | OSError:
        try:
            return index_of(tar).content()
        except OSError as error:
            return error

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = list(pool.map(read, tars))
    failed = [(tar, answer) for tar, answer in zip(tars, answers, strict=True) if isinstance(answer, OSError)]
    if failed:
        why = failed[0][1].strerror or str(failed[0][1])
        raise ValueError(f"{len(failed)} of {len(tars)} shards cannot be opened; the first is {failed[0][0]!r}: {why}")
    return [answer for answer in answers if isinstance(answer, Content)]


def _gather(tars: list[str], contents: list[Content]) -> _Named:
    named, log = _Named([], [], []), logging.getLogger("moco")
    for tar, content in zip(tars, contents, strict=True):
        named.paths.extend(f"{tar}/{name}" for name in content.names)
        names = content.classes
        named.labels.extend(content.labels if names is None else (names[i] if i >= 0 else -1 for i in content.labels))
        if content.reason:
            log.warning("%r: %s; the %d images before are used", tar, content.reason, len(content.names))
        named.lost.extend(BadImage(f"{tar}/{name}", content.reason or "it is not there") for name in content.lost)
    return named


def _classes(
    tar: str, labels: list[str | int], known: tuple[str, ...] | None
) -> tuple[list[int] | None, tuple[str, ...] | None]:
    """Class numbers and their names; `known` are those of the training images."""
    missing = sum(label == -1 for label in labels)
    if missing:
        if missing < len(labels):
            log = logging.getLogger("moco")
            log.warning("%d of %d images have no label; the labels of the others are not used", missing, len(labels))
        return None, None
    folder = tar.rpartition("/")[0]
    if any(isinstance(label, str) for label in labels):
        classes = known or tuple(sorted({str(label) for label in labels}))
        place = {name: number for number, name in enumerate(classes)}
        if unknown := sorted({str(label) for label in labels} - set(classes)):
            raise ValueError(f"{folder!r} has the class {unknown[0]!r}, which training does not have; leave it out")
        return [place[str(label)] for label in labels], classes
    numbers = [int(label) for label in labels]
    classes = known or _class_names(folder) or tuple(str(number) for number in range(max(numbers) + 1))
    if max(numbers) >= len(classes):
        raise ValueError(f"{folder!r} has the class number {max(numbers)}; expected less than {len(classes)}")
    return numbers, classes


def _class_names(folder: str) -> tuple[str, ...] | None:
    try:
        if is_remote(folder):
            content = remote.read(f"{folder}/{CLASSES}")
        else:
            path = Path(folder) / CLASSES
            content = path.read_bytes() if path.is_file() else None
        return None if content is None else tuple(map(str, json.loads(content)))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder}/{CLASSES} cannot be read ({' '.join(str(error).split())})") from None
