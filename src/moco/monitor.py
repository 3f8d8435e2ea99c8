"""What is measured during training: kNN and health, with the code of `moco evaluate`, and the metrics of each step."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moco import dist
from moco.config import PretrainConfig
from moco.data import ArrayImages, Images, Splits, some_of, with_labels
from moco.embed import features, pixels
from moco.encoder import ImageEncoder
from moco.evaluate import HeldOut, held_out
from moco.evaluate.contract import accuracies
from moco.evaluate.health import measure, two_crops, view_features
from moco.evaluate.knn import few_label_accuracy, projected, shared_scores
from moco.model import Output
from moco.views import TwoViews, view_specs

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
MAX_BANK, MAX_QUERIES = 50_000, 5_000
"""Most training images that vote and most images that are classified during training, evenly spaced in a larger set. At
the end, the first limit holds for both."""
HEALTH = ("effective_rank", "alignment", "uniformity")
"""Columns of metrics.csv that need no labels."""
MAX_SEEN, MIN_SEEN, MAX_HELD = 1_000, 256, 2**28
"""Images whose two views measure health: a quarter of all, within the first two bounds. Crops of files are kept in
memory, as many as fit into `MAX_HELD` bytes."""
FIXED_EPOCH = -1
"""Epoch of those two views: the same each time, and one that no training step has."""
AT_ONCE = 256
"""Images per forward pass, whatever the number of processes: the last bit of a sum depends on it."""
MAX_CLASSES_FEW = 100
"""Few-label accuracy is only measured up to this number of classes."""


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
        """Return the means over all ranks; the only place where the host waits for the device."""
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

    def level(self) -> None:
        """Replace the sums by their mean over ranks, so that what is saved does not depend on the number of ranks."""
        self.sums.copy_(dist.all_reduce_sum(self.sums) / dist.world_size())

    def finite(self) -> bool:
        """Whether every value so far is finite; waits for the device."""
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
    """Standard deviation of unit vectors per dimension, times sqrt(d): 1 if even on the sphere, 0 if collapsed."""
    return keys.std(dim=0).mean() * math.sqrt(keys.shape[1])


def shared(images: Images, work: Callable[[Images], Tensor], width: int, device: torch.device) -> Tensor:
    """Apply `work` to all images; each rank takes a share, and all get the rows of all images in order, on the CPU.

    Args:
        images: the same on all ranks.
        work: turns images, at least one, into float32 rows.
        width: length of a row.
        device: device through which ranks communicate.
    """
    total = len(images)
    return dist.in_shares(
        lambda which: work(images if len(which) == total else images.select(which)),
        total,
        width,
        at_once=AT_ONCE,
        device=device,
    )


@dataclass(frozen=True)
class Monitor:
    """KNN and health of an encoder during training.

    All ranks have to call a method together. They share the work, and all get the results.

    Args:
        config: settings of the run.
        watched: images that vote and images that are classified during training; None without labels.
        final: likewise for the results before and after training: the test images if there are any.
        seen: training images whose two views measure health; their labels are not used.
        views: how the two views are made: as for training.
        encoder: shares its backbone with the model in training.
        projector: the head of the model in training.
    """

    config: PretrainConfig
    watched: HeldOut | None
    final: HeldOut | None
    seen: Images
    views: TwoViews
    encoder: ImageEncoder
    projector: nn.Module

    def look(self) -> dict[str, float]:
        """KNN and health; draws no random numbers, and leaves the encoder unchanged."""
        return self.knn() | self.health()

    def health(self) -> dict[str, float]:
        """Effective rank, alignment and uniformity of the features of two views that never change."""
        return dist.first(self._health)

    def _health(self) -> dict[str, float]:
        seen = self.seen if isinstance(self.seen, ArrayImages) else self._crops
        precision = self.config.engine.precision
        found = measure(*view_features(self.encoder, seen, self.views, epoch=FIXED_EPOCH, precision=precision))
        return {name: found[name] for name in HEALTH}

    @cached_property
    def _crops(self) -> Tensor:
        """Crops of image files, which are read only once."""
        assert not isinstance(self.seen, ArrayImages)
        return two_crops(self.seen, torch.arange(len(self.seen)), self.views, epoch=FIXED_EPOCH)

    def knn(self) -> dict[str, float]:
        """KNN top-1 in percent, of features and of projections."""
        if self.watched is None:
            return {}
        held, (bank, queries) = self.watched, [self._features(images) for images in self.watched]
        seen = (projected(self.projector, vectors) for vectors in (bank, queries))
        return {
            "knn_top1": self._accuracy(bank, queries, held),
            "knn_projection_top1": self._accuracy(*seen, held),
        }

    def measure(self) -> dict[str, float]:
        """Accuracies of the encoder on the images of the final results."""
        if self.final is None:
            return {}
        held, (bank, queries) = self.final, [self._features(images) for images in self.final]
        return self._table_row(bank, queries, held)

    def measure_pixels(self) -> dict[str, float]:
        """Accuracies of raw pixels, plain or with the training mean subtracted, whichever is better."""
        if self.final is None:
            return {}
        held, size = self.final, min(self.encoder.input_size, 32)
        width = self.encoder.channels * size * size
        bank, queries = (shared(images, lambda part: pixels(part, size=size), width, self._device) for images in held)
        plain, centre = self._table_row(bank, queries, held), bank.mean(dim=0)
        moved = self._table_row(bank - centre, queries - centre, held)
        return {name: max(plain[name], moved[name]) for name in plain}

    @property
    def _device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    def _features(self, images: Images) -> Tensor:
        encoder, precision = self.encoder, self.config.engine.precision

        def work(part: Images) -> Tensor:
            return features(encoder, part, batch_size=AT_ONCE, precision=precision)

        return shared(images, work, encoder.num_features, self._device)

    def _accuracy(self, bank: Tensor, queries: Tensor, held: HeldOut) -> float:
        """KNN top-1 in percent; each rank asks about a share, on its device."""
        watch = self.config.monitor
        k, temperature = watch.knn_k, watch.knn_temperature
        scores = shared_scores(bank, held.train_labels, queries, k=k, temperature=temperature, device=self._device)
        return accuracies(scores, held.test_labels)["top1"]

    def _table_row(self, bank: Tensor, queries: Tensor, held: HeldOut) -> dict[str, float]:
        labels, asked = held.train_labels, held.test_labels
        row = {"knn_top1": self._accuracy(bank, queries, held)}
        counts = torch.bincount(labels)
        smallest = int(counts[counts > 0].min())

        def few() -> dict[str, float]:
            vectors = bank.to(self._device), queries.to(self._device)
            return {
                name: few_label_accuracy(vectors[0], labels, vectors[1], asked, labels_per_class=number)
                for name, number in (("one_label", 1), ("five_labels", 5))
                if number <= smallest
            }

        return row | (dist.first(few) if len(counts) <= MAX_CLASSES_FEW else {})


def build_monitor(config: PretrainConfig, splits: Splits, encoder: ImageEncoder, projector: nn.Module) -> Monitor:
    """Build a monitor for these images; without labels, it measures health only."""
    train, size = splits.train, config.views.size
    most = max(MIN_SEEN, min(MAX_SEEN, len(train) // 4))
    if not isinstance(train, ArrayImages):
        most = min(most, max(1, MAX_HELD // (2 * train.channels * size * size)))
    seen, views = some_of(train, most), TwoViews(view_specs(config.views), size, config.seed)
    labelled = with_labels(train)
    if labelled.labels is None or len(labelled) < 20:
        return Monitor(config, None, None, seen, views, encoder, projector)
    final = HeldOut(*(some_of(images, MAX_BANK) for images in held_out(splits)))
    watched = held_out(splits, use_test=config.monitor.split == "test")
    # The published protocol classifies all test images; fewer are enough to choose `best`.
    asked = watched.test if config.monitor.split == "test" else some_of(watched.test, MAX_QUERIES)
    watched = HeldOut(some_of(watched.train, MAX_BANK), asked)
    return Monitor(config, watched, final, seen, views, encoder, projector)
