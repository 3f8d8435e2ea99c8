"""KNN and health during training, with the code of `moco evaluate`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from moco.config import PretrainConfig
from moco.data import Images, Splits, some_of, with_labels
from moco.embeddings.features import features, pixels
from moco.evaluate import HeldOut, held_out
from moco.evaluate.contract import accuracies
from moco.evaluate.health import measure, two_crops, view_features
from moco.evaluate.knn import few_label_accuracy, projected, shared_scores
from moco.method.encoder import ImageEncoder
from moco.parallel import collectives, consensus
from moco.views.specs import view_specs
from moco.views.two_views import TwoViews

MAX_BANK, MAX_QUERIES = 50_000, 5_000
"""Most training images that vote and most images that are classified during training, evenly spaced in a larger set. At
the end, the first limit holds for both."""
HEALTH = ("effective_rank", "alignment", "uniformity")
"""Columns of metrics.csv that need no labels."""
MAX_VIEWED, MIN_VIEWED, MAX_BYTES = 1_000, 256, 2**28
"""Images whose two views measure health: a quarter of all, within the first two bounds. Crops of files are kept in
memory, as many as fit into `MAX_BYTES`."""
FIXED_EPOCH = -1
"""Epoch of those two views: the same each time, and one that no training step has."""
AT_ONCE = 256
"""Images per forward pass, whatever the number of processes: the last bit of a sum depends on it."""
MAX_CLASSES_FEW = 100
"""Few-label accuracy is only measured up to this number of classes."""


@dataclass(frozen=True)
class Monitor:
    """KNN and health of an encoder during training.

    All processes must call a method together. They divide the work, and all get the results.

    Args:
        config: settings of the run.
        during: images that vote and images that are classified during training; None without labels.
        final: likewise for the results before and after training: the test images if there are any.
        viewed: training images whose two views measure health; their labels are not used.
        views: how the two views are made: as for training.
        encoder: shares its backbone with the model in training.
        projector: the head of the model in training.
    """

    config: PretrainConfig
    during: HeldOut | None
    final: HeldOut | None
    viewed: Images
    views: TwoViews
    encoder: ImageEncoder
    projector: nn.Module

    def knn_and_health(self) -> dict[str, float]:
        """Measure kNN and health; draws no random numbers, and leaves the encoder unchanged."""
        return self.knn() | self.health()

    def health(self) -> dict[str, float]:
        """Measure effective rank, alignment and uniformity of the features of two views that never change."""
        return consensus.first(self._health)

    def _health(self) -> dict[str, float]:
        images = self._crops if self.viewed.in_memory is None else self.viewed
        precision = self.config.engine.precision
        figures = measure(*view_features(self.encoder, images, self.views, epoch=FIXED_EPOCH, precision=precision))
        return {name: figures[name] for name in HEALTH}

    @cached_property
    def _crops(self) -> Tensor:
        """Crops of image files, which are read only once."""
        return two_crops(self.viewed, torch.arange(len(self.viewed)), self.views, epoch=FIXED_EPOCH)

    def knn(self) -> dict[str, float]:
        """Measure kNN top-1 in percent, of features and of projections."""
        if self.during is None:
            return {}
        bank, queries = (self._features(images) for images in self.during)
        projections = (projected(self.projector, vectors) for vectors in (bank, queries))
        return {
            "knn_top1": self._accuracy(bank, queries, self.during),
            "knn_projection_top1": self._accuracy(*projections, self.during),
        }

    def accuracies(self) -> dict[str, float]:
        """Measure the accuracies of the encoder on the images of the final results."""
        if self.final is None:
            return {}
        bank, queries = (self._features(images) for images in self.final)
        return self._table_row(bank, queries, self.final)

    def accuracies_of_pixels(self) -> dict[str, float]:
        """Measure those of raw pixels, plain or with the training mean subtracted, whichever is better."""
        if self.final is None:
            return {}
        size = min(self.encoder.input_size, 32)
        width = self.encoder.channels * size * size
        bank, queries = (
            in_parts(images, lambda part: pixels(part, size=size), width, self._device) for images in self.final
        )
        plain, centre = self._table_row(bank, queries, self.final), bank.mean(dim=0)
        centred = self._table_row(bank - centre, queries - centre, self.final)
        return {name: max(plain[name], centred[name]) for name in plain}

    @property
    def _device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    def _features(self, images: Images) -> Tensor:
        encoder, precision = self.encoder, self.config.engine.precision

        def forward(part: Images) -> Tensor:
            return features(encoder, part, batch_size=AT_ONCE, precision=precision)

        return in_parts(images, forward, encoder.num_features, self._device)

    def _accuracy(self, bank: Tensor, queries: Tensor, images: HeldOut) -> float:
        """Return kNN top-1 in percent; each process classifies a part of the queries, on its device."""
        k, temperature = self.config.monitor.knn_k, self.config.monitor.knn_temperature
        scores = shared_scores(bank, images.train_labels, queries, k=k, temperature=temperature, device=self._device)
        return accuracies(scores, images.test_labels)["top1"]

    def _table_row(self, bank: Tensor, queries: Tensor, images: HeldOut) -> dict[str, float]:
        labels, row = images.train_labels, {"knn_top1": self._accuracy(bank, queries, images)}
        counts = torch.bincount(labels)
        smallest = int(counts[counts > 0].min())

        def few_labels() -> dict[str, float]:
            train, test = bank.to(self._device), queries.to(self._device)
            return {
                name: few_label_accuracy(train, labels, test, images.test_labels, labels_per_class=number)
                for name, number in (("one_label", 1), ("five_labels", 5))
                if number <= smallest
            }

        return row | (consensus.first(few_labels) if len(counts) <= MAX_CLASSES_FEW else {})


def build_monitor(config: PretrainConfig, splits: Splits, encoder: ImageEncoder, projector: nn.Module) -> Monitor:
    """Build a monitor for these images; without labels, it measures health only."""
    train, size = splits.train, config.views.size
    most = max(MIN_VIEWED, min(MAX_VIEWED, len(train) // 4))
    if train.in_memory is None:
        most = min(most, max(1, MAX_BYTES // (2 * train.channels * size * size)))
    viewed, views = some_of(train, most), TwoViews(view_specs(config.views), size, config.seed)
    labelled, during, final = with_labels(train), None, None
    if labelled.labels is not None and len(labelled) >= 20:
        final = HeldOut(*(some_of(images, MAX_BANK) for images in held_out(splits)))
        bank, queries = held_out(splits, use_test=config.monitor.split == "test")
        # The published protocol classifies all test images; fewer are enough to choose `best`.
        queries = queries if config.monitor.split == "test" else some_of(queries, MAX_QUERIES)
        during = HeldOut(some_of(bank, MAX_BANK), queries)
    return Monitor(config, during, final, viewed, views, encoder, projector)


def in_parts(images: Images, work: Callable[[Images], Tensor], width: int, device: torch.device) -> Tensor:
    """Turn images into rows; each process works on a part, and all get the rows of all images in order, on the CPU.

    Args:
        images: the same in all processes.
        work: turns images, at least one, into float32 rows.
        width: length of a row.
        device: device through which processes communicate.
    """
    total = len(images)
    return collectives.in_shares(
        lambda which: work(images if len(which) == total else images.select(which)),
        total,
        width,
        at_once=AT_ONCE,
        device=device,
    )
