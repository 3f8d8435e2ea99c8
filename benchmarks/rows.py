"""Rows of results/: what was measured, on what, at which commit."""

import contextlib
import csv
import datetime
import platform
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent.parent / "results"


def where() -> dict[str, object]:
    """The columns that every row begins with."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "processor": _processor(),
        "torch": torch.__version__,
    }


def append(name: str, row: dict[str, object]) -> None:
    """Adds a row to results/NAME.csv; a new file gets its header."""
    path = RESULTS / f"{name}.csv"
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _commit() -> str:
    with contextlib.suppress(OSError):
        root = RESULTS.parent
        name = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, cwd=root).stdout.strip()
        # Rows that were just added make no other program of this commit.
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "src", "benchmarks"], cwd=root).returncode
        return name + ("-dirty" if changed else "")
    return ""


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
