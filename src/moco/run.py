"""The run folder: what is in it, how it is named, read, and written so that nothing is ever lost.

config.yaml           every setting in force
environment.json      versions and machine
metrics.csv           one row every few steps
results.json          raw pixels, untrained and trained encoder, side by side
report.html           all of this on one page; curves.png, views.svg, neighbours.png and .svg, map.svg, similarities.svg
pictures.json         which images the pictures show, and how many
explore/              vectors and map that `moco explore` has made
checkpoints/last.ckpt everything that training goes on from; best.ckpt: where held-out kNN was best
encoder.safetensors   the trained backbone, and config.json: how to build and feed it
log.txt               what was said
"""

import csv
import errno
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moco.config import PretrainConfig, to_yaml
from moco.recipes import load_recipe


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Either the whole new file is there afterwards, or the old one untouched; also after a crash or on a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with disk_full_named(path), os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def disk_full_named(path: Path) -> Generator[None]:
    try:
        yield
    except Exception as error:
        # torch.save raises an error of its own in place of the system's.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"{cause.strerror}; what was saved before is whole: make room and go on; could not write"
            raise OSError(cause.errno, what, str(path)) from None
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Makes a rename itself durable; not every file system can, and the file is whole either way."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Run:
    """One training run on disk.

    Attributes:
        path: the folder.
        config: the settings in force.
    """

    path: Path
    config: PretrainConfig

    @staticmethod
    def create(path: Path, config: PretrainConfig) -> "Run":
        """A new, empty run.

        Raises:
            FileExistsError: there is something there already.
        """
        Run.refuse_taken(path)
        run = Run(path, config)
        run.begin()
        return run

    def begin(self) -> None:
        """Makes the folder, over what a process left that was killed before its first checkpoint."""
        self.last.parent.mkdir(parents=True, exist_ok=True)
        self.remove_partial()
        self.write_text("config.yaml", to_yaml(self.config))

    @staticmethod
    def refuse_taken(path: Path) -> None:
        """Raises the error of `create`, before anything is computed."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(
                f"{path} exists already; continue that run with `moco pretrain --resume {path}`, or give another --out"
            )

    @staticmethod
    def open(path: str | Path) -> "Run":
        """An existing run.

        Raises:
            FileNotFoundError: there is no run there.
        """
        path = Path(path)
        if not (path / "config.yaml").is_file():
            raise FileNotFoundError(f"{path} is no run: it holds no config.yaml; expected a folder that pretrain made")
        return Run(path, load_recipe(str(path / "config.yaml")))

    def refuse_code(self) -> None:
        """Before the settings of a run that anybody may have written decide what is imported.

        Raises:
            ValueError: they name code.
        """
        name = self.config.views.recipe
        if ":" in name:
            raise ValueError(
                f"{self.path} names code to import, views.recipe {name!r}, which is not done unasked; if you trust it, "
                f"name it too: --views.recipe {name}"
            )

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def results(self) -> dict[str, dict[str, float]]:
        """Accuracies in percent, of raw pixels and of the untrained and the trained encoder, as far as known."""
        path = self.path / "results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The rows of metrics.csv; a value that was not taken at a step is absent."""
        path = self.path / "metrics.csv"
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]

    def write_text(self, name: str, text: str) -> None:
        write_atomically(self.path / name, lambda file: file.write(text.encode()))

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def remove_partial(self) -> None:
        """Removes what a killed process had begun to write; nothing else may be writing the run."""
        for folder in (self.path, self.last.parent):
            for partial in folder.glob(".*.partial"):
                partial.unlink(missing_ok=True)

    @contextmanager
    def logged(self) -> Generator[None]:
        """What the library says goes into log.txt, too."""
        logger, handler = logging.getLogger("moco"), _LogFile(self.path / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        level = logger.level
        logger.addHandler(handler)
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)
            with suppress(OSError):  # only ever after a write that failed
                handler.close()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A disk that is full stops training at the next checkpoint, not for the sake of a log line."""


class MetricsWriter:
    """Appends rows to metrics.csv; a row is in the file as soon as it is written.

    Args:
        path: the file; made with its header if it is not there.
        columns: names, the first of which is `step`.
        keep_until: rows of later steps are cut: a resumed run writes them again.
        active: false on all ranks but the first, which then write nothing.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], *, keep_until: int, active: bool = True):
        self._path, self._file = path, None
        if not active:
            return
        rows: list[dict[str, str]] = []
        if path.is_file():
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                # A row that a crash cut short has no value in its last columns, or none that reads as a number.
                rows = [row for row in csv.DictReader(file) if _is_whole(row) and int(row["step"]) <= keep_until]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, lambda file: file.write(text.getvalue().encode()))
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")

    def write(self, row: dict[str, float]) -> None:
        if self._file:
            with disk_full_named(self._path):
                self._writer.writerow(row)
                self._file.flush()

    def sync(self) -> None:
        """Before a checkpoint that counts on these rows."""
        if self._file:
            with disk_full_named(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            with suppress(OSError):  # rows are flushed as they are written: this fails only after a write that did
                self._file.close()


def _is_whole(row: dict[str, str]) -> bool:
    return None not in row.values() and (row.get("step") or "").isdigit()
