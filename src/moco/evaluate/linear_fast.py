"""A linear classifier on precomputed features: many settings are trained at once, and selected without test labels.

Softmax regression on standardised features. They are rotated onto their principal axes, which changes neither the
problem nor its L2 penalty, and each axis learns at the inverse of its curvature bound (Böhning 1992, Multinomial
logistic regression algorithm: the Hessian is at most half the covariance). So a learning rate means the same for any
encoder: 1 is the largest that is safe on full batches.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from moco.embeddings.table import Embeddings
from moco.evaluate.contract import ROWS_AT_ONCE, accuracies, check_finite, labels_of_tables
from moco.files import HELD_IN_MEMORY

Vectors = Float[Tensor, "n f"]
Labels = Int64[Tensor, " n"]

RATES = (1.0, 0.3, 0.1, 0.03)
DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
EPOCHS, MIN_STEPS, BATCH_SIZE, MOMENTUM = 20, 400, 1024, 0.9
SWEEP_BYTES = 2**29
"""Most bytes for weights, gradients and scores of the pairs trained at once; pairs that do not fit come afterwards."""
CURVATURE_ROWS = 2**16
"""Rows from which the axes are computed; any axes give the same problem, good ones converge faster."""


class Probe(NamedTuple):
    """The scores of a classifier, and the settings that were selected for it.

    Attributes:
        scores: score of each test row for each class.
        lr: selected learning rate, in units of the inverse curvature bound.
        weight_decay: selected weight decay; the penalty is half of it times the squared weights, on standardised
            features.
        validation_top1: accuracy in percent on the training rows held out for selection; NaN if there were none.
    """

    scores: Float[Tensor, "m classes"]
    lr: float
    weight_decay: float
    validation_top1: float


class Settings(NamedTuple):
    """Settings of a probe; None: the default, or selected among all candidates."""

    lr: float | None = None
    weight_decay: float | None = None
    epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0


class Axes(NamedTuple):
    """Transform of features onto standardised principal axes, with a constant 1 appended.

    Attributes:
        mean: mean of the features.
        turn: matrix that standardises and rotates.
        curvature: mean square of the training rows along each axis.
    """

    mean: Float[Tensor, " f"]
    turn: Float[Tensor, "f f"]
    curvature: Float[Tensor, " f+1"]

    def __call__(self, vectors: Vectors) -> Float[Tensor, "n f+1"]:
        return F.pad((vectors.to(self.mean.device) - self.mean) @ self.turn, (0, 1), value=1.0)


class Inputs(NamedTuple):
    """Rows transformed onto their axes.

    Attributes:
        axes: the transform.
        vectors: the rows before it.
        turned: the rows after it, if there is memory for all.
    """

    axes: Axes
    vectors: Vectors
    turned: Float[Tensor, "n g"] | None

    def __call__(self, which: Int64[Tensor, " r"]) -> Float[Tensor, "r g"]:
        return self.axes(self.vectors[which]) if self.turned is None else self.turned[which.to(self.turned.device)]


def linear(
    train: Embeddings,
    test: Embeddings,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy of a linear classifier whose learning rate and weight decay are selected on held-out training images.

    Args:
        train: labelled embeddings to train on; a tenth of each class is held out for the selection.
        test: labelled embeddings to classify.
        lr: learning rate in units of the inverse curvature bound; not given: selected.
        weight_decay: weight decay; not given: selected.
        epochs: passes over the training rows; not given: 20, or as many as make 400 steps.
        batch_size: rows per step; not given: 1024.
        seed: seed of what is held out and of the order.

    Returns:
        `top1`, `top5` and `validation_top1` in percent, and the `lr` and `weight_decay` that were used.

    Raises:
        ValueError: `train` or `test` has no labels, they come from different encoders, or features are not finite.

    Example:
        >>> figures = moco.linear(moco.embed(encoder, "train/"), moco.embed(encoder, "test/"))     # doctest: +SKIP
        >>> sorted(figures)                                                                        # doctest: +SKIP
        ['lr', 'top1', 'top5', 'validation_top1', 'weight_decay']
    """
    labels, test_labels = labels_of_tables(train, test, "a probe")
    settings = Settings(lr, weight_decay, epochs, batch_size, seed)
    best = probe(torch.from_numpy(train.vectors), labels, torch.from_numpy(test.vectors), settings=settings)
    return accuracies(best.scores, test_labels) | figures(best)


def figures(best: Probe) -> dict[str, float]:
    """Return the selected settings and their validation accuracy, by name."""
    return {"validation_top1": best.validation_top1, "lr": best.lr, "weight_decay": best.weight_decay}


@torch.inference_mode()
def probe(
    train: Vectors,
    labels: Labels,
    test: Float[Tensor, "m g"],
    *,
    settings: Settings = Settings(),  # noqa: B008 (a tuple)
    device: torch.device | None = None,
) -> Probe:
    """Select a learning rate and weight decay, then train on all rows; no test label is used.

    Args:
        train: features to train on.
        labels: their classes.
        test: features to classify.
        settings: settings that are fixed rather than selected.
        device: device to use; not given: the CPU. Features stay where they are and are moved there in batches.

    Raises:
        ValueError: features have different lengths, or are not finite.
    """
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            f"training features have {train.shape[1]} dimensions, test features {test.shape[1]}; "
            "expected both from the same encoder: embed them again"
        )
    for name, part in (("training", train), ("test", test)):
        check_finite(part, name)
    axes = principal_axes(train, device or torch.device("cpu"))
    inputs = on_axes(axes, train)
    num_classes = int(labels.max()) + 1
    rates = RATES if settings.lr is None else (settings.lr,)
    decays = DECAYS if settings.weight_decay is None else (settings.weight_decay,)
    pairs = [(rate, decay) for decay in decays for rate in rates]
    held = held_back(labels, settings.seed)
    chosen, validation = pairs[len(pairs) // 2], math.nan
    if held.any():
        asked, learned = held.nonzero()[:, 0], (~held).nonzero()[:, 0]
        size = _at_once(train.shape[1], num_classes, settings)
        found = []
        for start in range(0, len(pairs), size):
            some = pairs[start : start + size]
            weights = fit(inputs, labels, learned, some, num_classes=num_classes, settings=settings)
            found += zip(_judged(inputs, labels, asked, weights), some, strict=True)
        (validation, _), chosen = max(found, key=lambda each: each[0])
    everything = torch.arange(len(train))
    weights = fit(inputs, labels, everything, [chosen], num_classes=num_classes, settings=settings)
    scores = torch.cat([(axes(part) @ weights[0]).cpu() for part in test.split(BATCH_SIZE)])
    return Probe(scores, *chosen, validation)


def held_back(labels: Labels, seed: int) -> Tensor:
    """Which rows are held out for selection: a tenth of each class, at least one; none of a class with one row."""
    generator, held = torch.Generator().manual_seed(seed), torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        count = max(1, len(members) // 10) if len(members) > 1 else 0
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return held


def principal_axes(vectors: Vectors, device: torch.device) -> Axes:
    """Return the principal axes of these features; a constant feature is ignored."""
    seen = vectors[:: math.ceil(len(vectors) / CURVATURE_ROWS)]
    width = seen.shape[1]

    def total(of: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
        """Sum over blocks in float64; all rows at once would take twice the memory of the features."""
        for part in seen.split(ROWS_AT_ONCE):
            start = start + of(part.cpu().double())
        return start

    mean = total(lambda part: part.sum(dim=0), torch.zeros(width, dtype=torch.float64)) / len(seen)
    square = total(lambda part: (part - mean).square().sum(dim=0), torch.zeros(width, dtype=torch.float64))
    spread = (square / len(seen)).sqrt()
    largest = torch.maximum(seen.amax(dim=0), -seen.amin(dim=0)).cpu().double()
    scale = torch.where(spread > 1e-6 * (1e-6 + largest), 1 / spread, 0.0)

    def products(part: Tensor) -> Tensor:
        standard = (part - mean) * scale
        return standard.T @ standard

    covariance = total(products, torch.zeros(width, width, dtype=torch.float64)) / len(seen)
    curvature, rotation = torch.linalg.eigh(covariance)
    return Axes(
        mean.float().to(device),
        (scale[:, None] * rotation).float().to(device),
        F.pad(curvature.clamp(min=0), (0, 1), value=1.0).float().to(device),
    )


def on_axes(axes: Axes, vectors: Vectors) -> Inputs:
    """Transform all rows once if they fit in memory, as every epoch needs every row."""
    if 4 * len(vectors) * len(axes.curvature) > HELD_IN_MEMORY:
        return Inputs(axes, vectors, None)
    return Inputs(axes, vectors, torch.cat([axes(part) for part in vectors.split(ROWS_AT_ONCE)]))


def passes(num_rows: int, settings: Settings) -> tuple[int, int]:
    """Return the number of batches per epoch, and of epochs."""
    parts = math.ceil(num_rows / (settings.batch_size or BATCH_SIZE))
    return parts, settings.epochs or max(EPOCHS, math.ceil(MIN_STEPS / parts))


def fit(
    inputs: Inputs,
    labels: Labels,
    rows: Int64[Tensor, " r"],
    pairs: list[tuple[float, float]],
    *,
    num_classes: int,
    settings: Settings,
) -> Float[Tensor, "p g classes"]:
    """Train classifiers on these rows, one per pair of (learning rate, weight decay), all on the same batches.

    Uses SGD with momentum; the learning rate follows a cosine down to 0.
    """
    curvature = inputs.axes.curvature
    device, num_axes = curvature.device, len(curvature)
    rates, decays = (torch.tensor(column, device=device) for column in zip(*pairs, strict=True))
    decay = decays.expand(num_axes, -1).clone()
    decay[-1] = 0  # the biases
    rate = (rates / (curvature[:, None] / 2 + decay).clamp(min=1e-12))[:, :, None]  # f+1 p 1
    decay = decay[:, :, None]
    weights = torch.zeros(num_axes, len(pairs), num_classes, device=device)
    velocity = torch.zeros_like(weights)
    generator = torch.Generator().manual_seed(settings.seed)
    parts, epochs = passes(len(rows), settings)
    for epoch in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for part, which in enumerate(order.tensor_split(parts)):
            batch = inputs(which)
            wanted = F.one_hot(labels[which].to(device), num_classes).to(batch)
            errors = (batch @ weights.flatten(1)).unflatten(1, weights.shape[1:]).softmax(dim=2)
            errors = errors.sub_(wanted[:, None]).div_(len(which))  # gradient of the mean cross-entropy
            gradient = (batch.T @ errors.flatten(1)).view_as(weights).addcmul_(weights, decay)
            velocity.mul_(MOMENTUM).addcmul_(gradient, rate)
            left = 0.5 * (1 + math.cos(math.pi * (epoch * parts + part) / (epochs * parts)))
            weights.sub_(velocity, alpha=left)
    return weights.transpose(0, 1)


def _at_once(num_features: int, num_classes: int, settings: Settings) -> int:
    """Return the number of pairs that fit into `SWEEP_BYTES`: three values per weight, two per score."""
    batch = settings.batch_size or BATCH_SIZE
    return max(1, SWEEP_BYTES // (4 * num_classes * (3 * (num_features + 1) + 2 * batch)))


def _judged(
    inputs: Inputs, labels: Labels, rows: Int64[Tensor, " r"], weights: Float[Tensor, "p g classes"]
) -> list[tuple[float, float]]:
    """Accuracy in percent of each classifier and, to break ties, minus its loss; diverged ones come last."""
    right, loss = torch.zeros(2, len(weights), dtype=torch.float64)
    for which in rows.split(BATCH_SIZE):
        scores, wanted = (inputs(which) @ weights).cpu(), labels[which]  # p b classes
        right += (scores.argmax(dim=2) == wanted).sum(dim=1)
        loss -= scores.double().log_softmax(dim=2)[:, torch.arange(len(which)), wanted].sum(dim=1)
    return [
        (100 * float(hits) / len(rows), -float(lost)) if math.isfinite(lost) else (-1.0, -math.inf)
        for hits, lost in zip(right, loss, strict=True)
    ]
