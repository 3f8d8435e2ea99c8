"""Write a folder of embeddings so that no row is lost or duplicated, whenever the process is killed."""

import csv
import io
import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, final

import numpy as np

from moco.data import BadImage
from moco.embeddings.table import FILES, HEADS, IMAGES, META, UNREADABLE, VECTORS, Meta, read_meta
from moco.files import disk_full_named, take_lock, write_atomically

SYNC_EVERY = 5.0
"""Seconds between syncs of everything so far to disk."""


@final
class Writer:
    """Write a table; after a crash, resume from the last sync to disk.

    Args:
        folder: a new or empty folder, or one with the same table, unfinished.
        meta: description of the table, without rows.

    Raises:
        ValueError: the folder holds another table, or a damaged one.
        FileExistsError: the folder holds something else.
    """

    def __init__(self, folder: Path, meta: Meta):
        _begin(folder, meta)
        for name in (VECTORS, *HEADS):
            (folder / name).touch()
        self._folder, self._files = folder, {name: (folder / name).open("r+b") for name in (VECTORS, *HEADS)}
        try:
            self._resume()
        except BaseException:
            self._close()
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        with suppress(OSError):  # what was synced is safe in any case
            if kind is not None and not self.meta.complete:
                self.sync()
        self._close()

    def _resume(self) -> None:
        """Cut off what was written after the last sync."""
        folder = self._folder
        if not take_lock(self._files[VECTORS]):
            raise ValueError(f"{folder} is being written by another process; wait for it, or give another --out")
        remove_partial_files(folder)
        self.meta = read_meta(folder)
        if self.meta.complete:
            raise ValueError(f"{folder} is finished, so no rows can be added; give another --out")
        for name, file in self._files.items():
            size = (self.meta.written or {}).get(name, 0)
            if os.fstat(file.fileno()).st_size < size:
                raise ValueError(f"{folder / name} is shorter than {META} says; delete {folder} and embed again")
            file.truncate(size)
            file.seek(size)
            if not size:
                file.write(_head(name, 0, self.meta.columns))

    def _close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):
                file.close()

    def add(
        self,
        vectors: np.ndarray,
        paths: Sequence[str],
        labels: Sequence[int] | None,
        unreadable: Sequence[BadImage],
        *,
        done: int,
    ) -> None:
        """Add rows, and images without a row; all images before `done` have then been processed."""
        meta, classes = self.meta, self.meta.classes
        rows = (
            (path, "", "") if labels is None else (path, labels[row], classes[labels[row]] if classes else "")
            for row, path in enumerate(paths)
        )
        with disk_full_named(self._folder):
            self._files[VECTORS].write(np.ascontiguousarray(vectors, dtype="<f4").data)
            self._files[IMAGES].write(_csv(rows))
            self._files[UNREADABLE].write(_csv((bad.path, bad.reason) for bad in unreadable))
        counts = {"rows": meta.rows + len(vectors), "unreadable": meta.unreadable + len(unreadable), "done": done}
        self.meta = meta.model_copy(update=counts)
        if time.monotonic() - self._synced >= SYNC_EVERY:
            self.sync()

    def sync(self) -> None:
        """Sync everything added so far to disk."""
        with disk_full_named(self._folder):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        written = {name: file.tell() for name, file in self._files.items()}
        self.meta = self.meta.model_copy(update={"written": written})
        _write_meta(self._folder, self.meta)
        self._synced = time.monotonic()

    def finish(self) -> None:
        """Complete the table; no more rows will be added."""
        self._files[VECTORS].seek(0)
        self._files[VECTORS].write(_head(VECTORS, self.meta.rows, self.meta.columns))
        self._files[VECTORS].seek(0, os.SEEK_END)
        self.sync()
        self.meta = self.meta.model_copy(update={"complete": True, "written": None})
        _write_meta(self._folder, self.meta)


def read_begun(folder: Path, new: Meta) -> Meta | None:
    """Return the description of the table in a folder, or None if there is none.

    Raises:
        ValueError: it is not the table that `new` describes; the message says in what they differ.
    """
    if not (folder / META).is_file():
        return None
    old = read_meta(folder)
    what = {"encoder": "another encoder", "images": "other images (names, order, labels or pixels)"}
    for name, before in old.settings:
        now = getattr(new.settings, name)
        if now != before:
            difference = what.get(name, f"{name} {before}, now it is {now}")
            raise ValueError(f"{folder} was begun with {difference}; give the same again, or another --out")
    if (old.start, old.stop, old.columns) != (new.start, new.stop, new.columns):
        raise ValueError(f"{folder} is for other rows of the table; use as many processes again, or another --out")
    return old


def remove_partial_files(folder: Path) -> None:
    """Remove files that a killed process left incomplete."""
    for name in FILES:
        for partial in folder.glob(f".{name}.*.partial"):
            partial.unlink(missing_ok=True)


def join(folders: Sequence[Path], out: Path) -> None:
    """Join the finished folders of several processes, in the order of their rows, into one table."""
    metas = [read_meta(folder) for folder in folders]
    rows, columns = sum(meta.rows for meta in metas), metas[0].columns
    for name in (VECTORS, *HEADS):

        def write(to: BinaryIO, name: str = name) -> None:
            to.write(_head(name, rows, columns))
            for folder in folders:
                with (folder / name).open("rb") as file:
                    file.seek(len(_head(name, 0, columns)))
                    shutil.copyfileobj(file, to, 2**20)

        write_atomically(out / name, write)
    unreadable, stop = sum(meta.unreadable for meta in metas), metas[-1].stop
    whole = {"rows": rows, "unreadable": unreadable, "start": 0, "stop": stop, "done": stop}
    _write_meta(out, metas[0].model_copy(update=whole))


def _begin(folder: Path, meta: Meta) -> None:
    """Create the folder; an existing one must hold the same table."""
    if read_begun(folder, meta):
        return
    if folder.exists() and (not folder.is_dir() or any(not each.name.startswith(".") for each in folder.iterdir())):
        raise FileExistsError(f"{folder} exists and holds no embeddings; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    _write_meta(folder, meta)


def _write_meta(folder: Path, meta: Meta) -> None:
    text = json.dumps(meta.model_dump(), indent=2) + "\n"
    write_atomically(folder / META, lambda file: file.write(text.encode()))


def _head(name: str, rows: int, columns: int) -> bytes:
    """Return the header of a file; that of vectors has a fixed length, because numpy leaves room for more rows."""
    if name != VECTORS:
        return (",".join(HEADS[name]) + "\n").encode()
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, columns)})
    return file.getvalue()


def _csv(rows: Iterable[Sequence[str | int]]) -> bytes:
    """Return rows as CSV with quoted text, for any name; names that are not UTF-8 keep their bytes."""
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
