"""What a row of metrics.csv holds, how it is measured and written."""

import csv
import io
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco.files import disk_full_named, write_atomically
from moco.method.model import Output
from moco.parallel import collectives

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "lr",
    "key_momentum",
    "positive",
    "negative",
    "pretext_accuracy",
    "queue_fill",
    "spread",
    "knn_top1",
    "knn_projection_top1",
    "effective_rank",
    "alignment",
    "uniformity",
    "images_per_second",
    "data_wait",
    "train_seconds",
    "cpu_seconds",
)
TIMES = ("images_per_second", "data_wait", "train_seconds", "cpu_seconds")
"""Columns that differ from run to run; all others are equal to the last bit."""


class Meter:
    """Means of the training metrics since they were last read; they stay on the device until then."""

    def __init__(self, device: torch.device):
        # Apple's GPUs have no float64; float32 is enough for means over a few steps.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(5, dtype=dtype, device=device)
        self.count = 0

    def add(self, out: Output, spread: Tensor) -> None:
        self.sums += torch.stack([out.loss.detach(), out.positive, out.negative, out.accuracy, spread])
        self.count += 1

    def read(self) -> dict[str, float]:
        """Return the means over all processes; only here does the host wait for the device."""
        mean = collectives.all_reduce_sum(self.sums) / (self.count * collectives.world_size())
        loss, positive, negative, accuracy, spread = mean.tolist()
        self.sums.zero_()
        self.count = 0
        return {
            "loss": loss,
            "positive": positive,
            "negative": negative,
            "pretext_accuracy": 100 * accuracy,
            "spread": spread,
        }

    def level(self) -> None:
        """Replace the sums by their mean over processes, so that what is saved does not depend on their number."""
        self.sums.copy_(collectives.all_reduce_sum(self.sums) / collectives.world_size())

    def finite(self) -> bool:
        """Return whether every value so far is finite; wait for the device."""
        return bool(self.sums.isfinite().all())

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums, "count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        self.sums.copy_(state["sums"])
        self.count = state["count"]


class Clock:
    """Wall-clock and CPU seconds spent training, over all parts of a resumed run."""

    def __init__(self) -> None:
        self._wall = self._cpu = self._started = self._marked = self._started_cpu = 0.0
        self._runs = False
        self._step: int | None = None

    def start(self) -> None:
        """Count from now on; time since the last reading was not spent training."""
        self._started = self._marked = time.perf_counter()
        self._started_cpu = time.process_time()
        self._runs = True

    def read(self, step: int, batch_size: int, waited: float) -> dict[str, float]:
        """Return the times so far, and the speed since they were last read."""
        since, before = time.perf_counter() - self._marked, self._step
        self._marked, self._step = time.perf_counter(), step
        speed = {} if before is None else {"images_per_second": (step - before) * batch_size / since}
        return self.state() | speed | {"data_wait": 100 * min(1.0, waited / since)}

    def state(self) -> dict[str, float]:
        if self._runs:
            self._wall += time.perf_counter() - self._started
            self._cpu += time.process_time() - self._started_cpu
            self._started, self._started_cpu = time.perf_counter(), time.process_time()
        return {"train_seconds": self._wall, "cpu_seconds": self._cpu}

    def restore(self, state: dict[str, float]) -> None:
        self._wall, self._cpu = state["train_seconds"], state["cpu_seconds"]


def spread(keys: Tensor) -> Tensor:
    """Return the deviation of unit vectors per dimension, times sqrt(d): 1 if even on the sphere, 0 if collapsed."""
    return keys.std(dim=0).mean() * math.sqrt(keys.shape[1])


class MetricsWriter:
    """A writer of rows to metrics.csv, each flushed at once.

    Args:
        path: the file; created with its header if it does not exist.
        columns: names of the columns, the first of which is `step`.
        keep_until: rows of later steps are removed, because a resumed run writes them again.
        active: false in all processes but the first, which alone writes.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], *, keep_until: int, active: bool = True):
        self._path, self._file = path, None
        if not active:
            return
        rows: list[dict[str, str]] = []
        if path.is_file():
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                # A row that a crash cut short has no value in its last columns, or one that is not a number.
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
        """Sync the rows to disk, before a checkpoint that relies on them."""
        if self._file:
            with disk_full_named(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            with suppress(OSError):  # rows are flushed as they are written: this fails only after a failed write
                self._file.close()


def _is_whole(row: dict[str, str]) -> bool:
    return None not in row.values() and (row.get("step") or "").isdigit()
