"""What is watched while training: kNN by the same code as `moco evaluate`, the numbers of the step, the curves."""

import io
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from moco import dist
from moco.config import PretrainConfig
from moco.data import BadImage, Images, Splits, resized
from moco.embed import features, pixels
from moco.encoder import ImageEncoder
from moco.evaluate import HeldOut, held_out
from moco.evaluate.knn import few_label_accuracy, knn_accuracy
from moco.figures import Neighbours, curves, neighbours
from moco.model import Output
from moco.run import Run, write_atomically
from moco.variants import loss_range

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
    "images_per_second",
    "data_wait",
    "train_seconds",
    "cpu_seconds",
)
TIMES = ("images_per_second", "data_wait", "train_seconds", "cpu_seconds")
"""Columns that differ from run to run; all others are equal to the last bit."""
MAX_BANK, MAX_QUERIES = 50_000, 5_000
"""Images that vote and that are asked about while training; evenly spaced ones of a larger set. At the end as many of
both as vote."""
MAX_PICTURED, NUM_PICTURED, NUM_NEIGHBOURS = 5_000, 5, 5
"""Images that neighbours are looked for among; queries drawn, and neighbours of each at either end."""
MAX_CLASSES_FEW = 100
"""Few-label accuracy is taken for at most so many classes."""


class Meter:
    """Means of a step's numbers since they were last read; they stay on the device until then."""

    def __init__(self, device: torch.device):
        # Apple's GPUs have no float64; means over a few steps bear it.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(5, dtype=dtype, device=device)
        self.count = 0

    def add(self, out: Output, spread: Tensor) -> None:
        self.sums += torch.stack([out.loss.detach(), out.positive, out.negative, out.accuracy, spread])
        self.count += 1

    def read(self) -> dict[str, float]:
        """The means over all ranks; the only place where the host waits for the device."""
        mean = dist.all_reduce_sum(self.sums) / (self.count * dist.world_size())
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

    def finite(self) -> bool:
        """Whether every number so far is one; waits for the device."""
        return bool(self.sums.isfinite().all())

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums, "count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        self.sums.copy_(state["sums"])
        self.count = state["count"]


class Clock:
    """Wall-clock and processor seconds of training alone, over all parts of a resumed run."""

    def __init__(self) -> None:
        self._wall = self._cpu = 0.0
        self._started = self._marked = time.perf_counter()
        self._started_cpu = time.process_time()
        self._step: int | None = None

    def start(self) -> None:
        """Counts from now on; what lies before was something else."""
        self._started = self._marked = time.perf_counter()
        self._started_cpu = time.process_time()

    def read(self, step: int, batch_size: int, waited: float) -> dict[str, float]:
        """Times so far, and the speed since they were last read."""
        since, before = time.perf_counter() - self._marked, self._step
        self._marked, self._step = time.perf_counter(), step
        speed = {} if before is None else {"images_per_second": (step - before) * batch_size / since}
        return self.state() | speed | {"data_wait": 100 * min(1.0, waited / since)}

    def state(self) -> dict[str, float]:
        self._wall += time.perf_counter() - self._started
        self._cpu += time.process_time() - self._started_cpu
        self._started, self._started_cpu = time.perf_counter(), time.process_time()
        return {"train_seconds": self._wall, "cpu_seconds": self._cpu}

    def restore(self, state: dict[str, float]) -> None:
        self._wall, self._cpu = state["train_seconds"], state["cpu_seconds"]


def spread(keys: Tensor) -> Tensor:
    """Standard deviation of unit vectors per dimension, times sqrt(d): 1 if even on the sphere, 0 if collapsed."""
    return keys.std(dim=0).mean() * math.sqrt(keys.shape[1])


@dataclass(frozen=True)
class Monitor:
    """kNN of an encoder in training.

    Args:
        config: of the run.
        watched: images that vote and images that are asked about; None without labels.
        final: the same for the last table: the test images where there are any.
        encoder: shares its backbone with the model that is trained.
        projector: likewise.
    """

    config: PretrainConfig
    watched: HeldOut | None
    final: HeldOut | None
    encoder: ImageEncoder
    projector: nn.Module

    def knn(self) -> dict[str, float]:
        """KNN top-1 in percent, of features and of projections."""
        if self.watched is None:
            return {}
        bank, queries = (self._features(images) for images in self.watched)
        return {
            "knn_top1": self._accuracy(bank, queries, self.watched),
            "knn_projection_top1": self._accuracy(self._project(bank), self._project(queries), self.watched),
        }

    def measure(self) -> dict[str, float]:
        """Accuracies of the encoder on the images of the final table."""
        if self.final is None:
            return {}
        return self._table_row(*(self._features(images) for images in self.final), self.final)

    def measure_pixels(self) -> dict[str, float]:
        """The same for raw pixels, plain or with the training mean subtracted: the better of both, each time."""
        if self.final is None:
            return {}
        size = min(self.encoder.input_size, 32)
        bank, queries = (pixels(images, size=size) for images in self.final)
        plain = self._table_row(bank, queries, self.final)
        centre = bank.mean(dim=0)
        moved = self._table_row(bank - centre, queries - centre, self.final)
        return {name: max(plain[name], moved[name]) for name in plain}

    def _features(self, images: Images) -> Tensor:
        return features(self.encoder, images, precision=self.config.engine.precision)

    @torch.inference_mode()
    def _project(self, vectors: Tensor) -> Tensor:
        parameter = next(self.projector.parameters())
        was_training = self.projector.training
        self.projector.eval()
        projected = [self.projector(part.to(parameter)).float().cpu() for part in vectors.split(4096)]
        self.projector.train(was_training)
        return torch.cat(projected)

    def _accuracy(self, bank: Tensor, queries: Tensor, held: HeldOut) -> float:
        watch = self.config.monitor
        k, temperature = watch.knn_k, watch.knn_temperature
        return knn_accuracy(bank, held.train_labels, queries, held.test_labels, k=k, temperature=temperature)["top1"]

    def _table_row(self, bank: Tensor, queries: Tensor, held: HeldOut) -> dict[str, float]:
        labels, asked = held.train_labels, held.test_labels
        row = {"knn_top1": self._accuracy(bank, queries, held)}
        counts = torch.bincount(labels)
        smallest = int(counts[counts > 0].min())
        if len(counts) <= MAX_CLASSES_FEW:
            for name, number in (("one_label", 1), ("five_labels", 5)):
                if number <= smallest:
                    row[name] = few_label_accuracy(bank, labels, queries, asked, labels_per_class=number)
        return row


def build_monitor(config: PretrainConfig, splits: Splits, encoder: ImageEncoder, projector: nn.Module) -> Monitor:
    """A monitor for these images; without labels one that has nothing to say."""
    if splits.train.labels is None or len(splits.train) < 20:
        return Monitor(config, None, None, encoder, projector)
    final = HeldOut(*(_evenly(images, MAX_BANK) for images in held_out(splits)))
    watched = held_out(splits, use_test=config.monitor.split == "test")
    # The published protocol asks about all test images; the choice of `best` can do with fewer.
    asked = watched.test if config.monitor.split == "test" else _evenly(watched.test, MAX_QUERIES)
    return Monitor(config, HeldOut(_evenly(watched.train, MAX_BANK), asked), final, encoder, projector)


def _evenly(images: Images, most: int) -> Images:
    if len(images) <= most:
        return images
    return images.select(torch.linspace(0, len(images) - 1, most).long())


def draw_neighbours(run: Run, monitor: Monitor, images: Images) -> None:
    """Writes neighbours.png: a few images with those that the encoder finds most and least like them."""
    bank = _evenly(images, MAX_PICTURED) if monitor.final is None else _evenly(monitor.final.train, MAX_PICTURED)
    asked = bank if monitor.final is None else _evenly(monitor.final.test, MAX_QUERIES)
    chosen = asked.select(torch.linspace(0, len(asked) - 1, 2 * NUM_PICTURED + 1).long()[1::2])
    vectors, queries = (
        F.normalize(features(monitor.encoder, each, precision=monitor.config.engine.precision), dim=1)
        for each in (bank, chosen)
    )
    rows = []
    for number, similarity in enumerate(queries @ vectors.T):
        order = similarity.argsort(descending=True)
        order = order[1:] if asked is bank else order  # not the query itself
        near, far = order[:NUM_NEIGHBOURS].tolist(), order[-NUM_NEIGHBOURS:].tolist()
        titled = [[(_picture(bank, i), f"{_class(bank, i)}{similarity[i]:.2f}") for i in part] for part in (near, far)]
        rows.append(Neighbours(_picture(chosen, number), _class(chosen, number).rstrip(), *titled))
    _write_figure(neighbours(rows), run.path / "neighbours.png")


def _picture(images: Images, index: int) -> np.ndarray:
    try:
        size = max(16, min(128, *images.decode(index).shape[1:]))
    except BadImage:  # it has been named; `resized` makes it black
        size = 16
    return resized(images, [index], size=size)[0].movedim(0, 2).numpy()


def _class(images: Images, index: int) -> str:
    if images.labels is None or images.classes is None:
        return ""
    return images.classes[int(images.labels[index])][:12] + " "


def draw_curves(run: Run) -> None:
    """Writes curves.png from metrics.csv."""
    chance, floor = loss_range(run.config.model, run.config.batch_size)
    levels = {
        who: row["knn_top1"] for who, row in run.results.items() if who != "trained encoder" and "knn_top1" in row
    }
    figure = curves(run.metrics, chance=chance, floor=floor, baselines=levels)
    _write_figure(figure, run.path / "curves.png")


def _write_figure(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, lambda file: file.write(buffer.getvalue()))
