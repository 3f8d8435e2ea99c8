"""The run folder: its files, and how they are read and written so that nothing is ever lost.

config.yaml           all settings
environment.json      versions and machine
metrics.csv           one row every few steps
results.json          accuracies of raw pixels, the untrained and the trained encoder
report.html           all of this on one page; curves.png, views.svg, neighbours.png and .svg, map.svg, similarities.svg
pictures.json         which images the pictures show, and how many
explore/              vectors and map computed by `moco explore`
checkpoints/last.ckpt everything needed to resume training; best.ckpt: where held-out kNN was best
encoder.safetensors   the trained backbone, and config.json: how to build it and prepare its images
log.txt               the log
"""

import csv
import json
import logging
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco.config import PretrainConfig, to_yaml
from moco.files import write_atomically
from moco.recipes import load_recipe


@dataclass(frozen=True)
class Run:
    """A training run on disk.

    Attributes:
        path: folder of the run.
        config: settings of the run.
    """

    path: Path
    config: PretrainConfig

    @staticmethod
    def create(path: Path, config: PretrainConfig) -> "Run":
        """Create a new, empty run.

        Raises:
            FileExistsError: `path` exists already and is not an empty folder.
        """
        Run.refuse_taken(path)
        run = Run(path, config)
        run.begin()
        return run

    def begin(self) -> None:
        """Create the folder, over what a process killed before its first checkpoint has left."""
        self.last.parent.mkdir(parents=True, exist_ok=True)
        self.remove_partial()
        self.write_text("config.yaml", to_yaml(self.config))

    @staticmethod
    def refuse_taken(path: Path) -> None:
        """Raise the error of `create` early, before anything is computed."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(
                f"{path} exists already; continue that run with `moco pretrain --resume {path}`, or give another --out"
            )

    @staticmethod
    def open(path: str | Path) -> "Run":
        """Open an existing run.

        Raises:
            FileNotFoundError: there is no run at `path`.
        """
        path = Path(path)
        if not (path / "config.yaml").is_file():
            raise FileNotFoundError(
                f"{path} is not a run: it has no config.yaml; expected a folder that pretrain wrote"
            )
        return Run(path, load_recipe(str(path / "config.yaml")))

    def refuse_code(self) -> None:
        """Refuse settings that name code to import, because a run may come from anyone.

        Raises:
            ValueError: the settings name code.
        """
        name = self.config.views.recipe
        if ":" in name:
            raise ValueError(
                f"{self.path} names code to import, views.recipe {name!r}, which needs your consent; if you trust it, "
                f"add --views.recipe {name}"
            )

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def results(self) -> dict[str, dict[str, float]]:
        """Accuracies in percent of raw pixels, the untrained and the trained encoder; empty if not measured yet."""
        path = self.path / "results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The rows of metrics.csv; values that were not measured at a step are absent."""
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
        """Remove files that a killed process left incomplete; no other process may be writing to the run."""
        for folder in (self.path, self.last.parent):
            for partial in folder.glob(".*.partial"):
                partial.unlink(missing_ok=True)

    @contextmanager
    def logged(self) -> Generator[None]:
        """Within it, the library's log is also written to log.txt."""
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
            with suppress(OSError):  # fails only after a write that failed
                handler.close()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore the error: a full disk stops training at the next checkpoint, not because of a log line."""
