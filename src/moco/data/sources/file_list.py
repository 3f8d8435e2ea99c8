"""A list of image files: CSV, TSV or Parquet, one image a row, with or without labels and splits."""

import csv
import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from moco.config import DataConfig
from moco.data.images import Splits
from moco.data.places import tar_index
from moco.data.places.addresses import is_remote
from moco.data.sources.listing import HELD_OUT, Listing, numbered, read_listing
from moco.packages import install

SUFFIXES = (".csv", ".tsv", ".parquet")
PATHS = ("path", "image", "file", "filename", "filepath")
"""What the column of paths may be called, in capitals or not; the first of these that is there is taken."""
LABELS = ("class", "label", "target")
"""Likewise that of labels; the first with anything in it is taken. In images.csv of `moco embed` `class` has names."""
SPLIT = "split"
"""Likewise that which says `train` or a name in `HELD_OUT`."""
_LOOKED_AT = 10  # first rows, of which one has to be a file where there is no header


def is_list(source: str) -> bool:
    """Whether it is a file with the suffix of a list."""
    return source.lower().endswith(SUFFIXES) and Path(source).expanduser().is_file()


def load_list(path: Path, config: DataConfig) -> Splits:
    """Images of a list; relative paths begin at the list's own folder.

    Columns are known by their names. A CSV without header has paths in its first column and, of two, labels in the
    second. Labels are names or whole numbers. Of several held-out splits the first in `HELD_OUT` is the test part.

    Raises:
        ValueError: it cannot be read or is empty, has no column of paths, has labels or splits in some rows only, a
            test class that training does not have, or too many files that cannot be read.
    """
    table = _table(path)
    files = list(map(partial(os.path.join, os.path.dirname(os.path.abspath(path))), table.paths))
    budget, known, parts = config.memory * 2**30, None, []
    for name, chosen in _parts(path, table.splits):
        numbers = None
        if table.labels:
            numbers, known = numbered(str(path), chosen(table.labels), known)
        # What is cached of training and of test images is kept apart by the name.
        images = read_listing(Listing(chosen(files), numbers, known), path / name, config, budget)
        budget -= images.nbytes
        parts.append(images)
    return Splits(parts[0], parts[1] if len(parts) == 2 else None)


def count_listed(path: Path) -> int:
    """Training images of a list, none of which is opened; errors as `load_list`."""
    table = _table(path)
    _, chosen = _parts(path, table.splits)[0]
    return len(chosen(table.paths))


class _Table(NamedTuple):
    """Columns of a list; None of those that it lacks."""

    paths: list[str]
    labels: list[str] | None
    splits: list[str] | None


def _table(path: Path) -> _Table:
    table = _from_parquet(path) if path.suffix.lower() == ".parquet" else _from_text(path)
    if not table.paths:
        raise ValueError(f"{str(path)!r} lists no images; expected a row for each")
    for name, values in (("path", table.paths), ("label", table.labels), (SPLIT, table.splits)):
        if values and not all(values):
            missing = [row for row, value in enumerate(values, 1) if not value]
            raise ValueError(
                f"{str(path)!r} has no {name} in {len(missing)} of its {len(values)} rows, the first is row"
                f" {missing[0]}; expected one in every row" + (", or no such column" if name != "path" else "")
            )
    if elsewhere := next((each for each in table.paths if is_remote(each)), None):
        raise ValueError(f"{str(path)!r} names {elsewhere!r}; expected files on this machine: download them first")
    return table


def _parts(path: Path, splits: list[str] | None) -> list[tuple[str, Callable[[Sequence[str]], list[str]]]]:
    """Name of the training and of the test part, and what picks its rows from a column."""
    if splits is None:
        return [("", list)]
    known = {value: value.strip().lower() for value in set(splits)}
    if wrong := sorted(value for value, name in known.items() if name not in ("train", *HELD_OUT)):
        raise ValueError(f"{str(path)!r} has the split {wrong[0]!r}; expected train, {', '.join(HELD_OUT)}")
    if "train" not in known.values():
        raise ValueError(f"{str(path)!r} has no row of the split train; expected some to train on")
    held_out = next((name for name in HELD_OUT if name in known.values()), None)
    names = list(map(known.__getitem__, splits))

    def choice(part: str) -> Callable[[Sequence[str]], list[str]]:
        return lambda column: list(compress(column, map(part.__eq__, names)))

    return [(part, choice(part)) for part in ("train", held_out) if part]


def _from_text(path: Path) -> _Table:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data:
        raise ValueError(f"{str(path)!r} is not UTF-8 text; save the list as UTF-8")
    # A path may be any bytes, which then name the file; all else is text.
    text = data.decode("utf-8-sig", "surrogateescape")
    try:
        rows = list(filter(None, csv.reader(io.StringIO(text, newline=""), _dialect(path), strict=True)))
    except csv.Error as error:
        raise ValueError(
            f"{str(path)!r} is not a list in CSV ({error}); save it anew, names with quotes quoted"
        ) from None
    if len(set(map(len, rows))) > 1:
        number, row = next((number, row) for number, row in enumerate(rows, 1) if len(row) != len(rows[0]))
        raise ValueError(
            f"{str(path)!r} has {len(row)} columns in row {number} and {len(rows[0])} in the first; expected as many in"
            " every row: put names that have commas into quotes"
        )
    if not rows:
        return _Table([], None, None)
    head = [name.strip().lower() for name in rows[0]]
    if not set(PATHS).intersection(head):
        _refuse_no_paths(path, rows)
        head = ["path", "label"] if len(head) == 2 else ["path"]
    else:
        rows = rows[1:]
    columns = {name: list(map(itemgetter(head.index(name)), rows)) for name in (*PATHS, *LABELS, SPLIT) if name in head}
    table = _chosen(columns)
    for name, values in (("path", table.paths), ("label", table.labels), (SPLIT, table.splits)):
        _refuse_no_text(path, values or [], at=os.path.dirname(path) if name == "path" else None)
    return table


def _dialect(path: Path) -> type[csv.Dialect]:
    return csv.excel_tab if path.suffix.lower() == ".tsv" else csv.excel


def _chosen(columns: dict[str, list[str]]) -> _Table:
    paths = next(columns[name] for name in PATHS if name in columns)
    labels = next((columns[name] for name in LABELS if name in columns and any(columns[name])), None)
    return _Table(paths, labels, columns.get(SPLIT))


def _refuse_no_paths(path: Path, rows: list[list[str]]) -> None:
    """Refuses a list whose first row is neither a header that is known nor the first of the images."""
    first, folder = rows[0][0], os.path.dirname(path)
    is_image = first.rpartition(".")[2].lower() in tar_index.SUFFIXES or os.path.isfile(os.path.join(folder, first))
    if not (is_image and any(os.path.isfile(os.path.join(folder, row[0])) for row in rows[:_LOOKED_AT])):
        raise ValueError(
            f"{str(path)!r} has no column of paths, its first row is {', '.join(rows[0])[:60]!r}; expected a column"
            f" {', '.join(PATHS[:-1])} or {PATHS[-1]}, or no header and files that are there in the first column"
        )


def _refuse_no_text(path: Path, values: list[str], *, at: str | None) -> None:
    """Refuses what is no UTF-8, but for names of files that are there, in the folder `at`."""
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        odd = next(value for value in values if not value.isascii() and _has_bytes(value))
        if at is None or not os.path.lexists(os.path.join(at, odd)):
            raise ValueError(f"{str(path)!r} is not UTF-8 text at {odd!a}; save the list as UTF-8") from None


def _has_bytes(value: str) -> bool:
    return any("\udc80" <= letter <= "\udcff" for letter in value)


def _from_parquet(path: Path) -> _Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{str(path)!r} needs an extra: run {install('parquet')}") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = {name.strip().lower(): name for name in reversed(file.schema_arrow.names)}
            wanted = [name for name in (*PATHS, *LABELS, SPLIT) if name in names]
            if not set(PATHS).intersection(wanted):
                raise ValueError(
                    f"{str(path)!r} has no column of paths, it has {', '.join(names.values())[:200] or 'none'};"
                    f" expected {', '.join(PATHS[:-1])} or {PATHS[-1]}"
                )
            table = file.read(columns=[names[name] for name in wanted])
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{str(path)!r} cannot be read as Parquet ({' '.join(str(error).split())})") from None
    columns = {}
    for name in wanted:
        column = table[names[name]]
        values = column.to_pylist()
        kinds = set(map(type, values)) - {type(None)}
        if not kinds <= ({int, str, bool} if name in LABELS else {str}):
            raise ValueError(
                f"{str(path)!r} has {column.type} in the column {names[name]!r}; expected text"
                + (" or whole numbers" if name in LABELS else "")
            )
        columns[name] = ["" if value is None else str(value) for value in values]
    return _chosen(columns)
