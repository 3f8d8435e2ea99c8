"""A linear classifier on features that are at hand: many settings learn at once, and no test label has a say in which.

Softmax regression on standardised features. They are turned onto their principal axes, which changes neither the
problem nor its L2 penalty, and each axis learns at the inverse of its curvature bound (Böhning 1992, Multinomial
logistic regression algorithm: the Hessian is at most half the covariance). So a rate means the same for any encoder:
1 is as fast as is safe on all images at once.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from moco.embed import Embeddings
from moco.evaluate.contract import ROWS_AT_ONCE, accuracies, check_finite
from moco.scratch import HELD

Vectors = Float[Tensor, "n f"]
Labels = Int64[Tensor, " n"]

RATES = (1.0, 0.3, 0.1, 0.03)
DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
EPOCHS, MIN_STEPS, BATCH_SIZE, MOMENTUM = 20, 400, 1024, 0.9
SWEEP_BYTES = 2**29
"""Weights, gradients and scores of the pairs that learn at once; what does not fit learns afterwards."""
CURVATURE_ROWS = 2**16
"""Rows that the axes are found from; any axes give the same problem, good ones give it sooner."""


class Probe(NamedTuple):
    """A classifier's answers, and how it came about.

    Attributes:
        scores: of each test row for each class.
        lr: chosen, in units of the inverse curvature bound.
        weight_decay: chosen; the penalty is half of it times the squared weights, on standardised features.
        validation_top1: in percent, on the training rows that were held back for choosing; NaN if none could be.
    """

    scores: Float[Tensor, "m classes"]
    lr: float
    weight_decay: float
    validation_top1: float


class Settings(NamedTuple):
    """What may be asked for; None: the default, or all that there is to choose from."""

    lr: float | None = None
    weight_decay: float | None = None
    epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0


class Axes(NamedTuple):
    """Standardised features on their principal axes, and a last one that is 1.

    Attributes:
        mean: of the features.
        turn: standardises and rotates.
        curvature: mean square of the training rows along each axis.
    """

    mean: Float[Tensor, " f"]
    turn: Float[Tensor, "f f"]
    curvature: Float[Tensor, " f+1"]

    def __call__(self, vectors: Vectors) -> Float[Tensor, "n f+1"]:
        return F.pad((vectors.to(self.mean.device) - self.mean) @ self.turn, (0, 1), value=1.0)


class Inputs(NamedTuple):
    """Rows on their axes.

    Attributes:
        axes: of the rows.
        vectors: the rows before.
        turned: the rows after, where there is memory for all.
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
    """Accuracy of a linear classifier, its learning rate and weight decay chosen on held-back training images.

    Args:
        train: labelled embeddings to learn from; every tenth of each class is held back while choosing.
        test: labelled embeddings to classify.
        lr: not chosen but this, in units of the inverse curvature bound.
        weight_decay: not chosen but this.
        epochs: passes; not given: 20, or as many as make 400 steps.
        batch_size: rows per step; not given: 1024.
        seed: of what is held back and of the order.

    Returns:
        `top1`, `top5` and `validation_top1` in percent, `lr` and `weight_decay` as chosen.

    Raises:
        ValueError: one of the two has no labels, or they are of different encoders, or not finite.

    Example:
        >>> figures = moco.linear(moco.embed(encoder, "train/"), moco.embed(encoder, "test/"))     # doctest: +SKIP
        >>> sorted(figures)                                                                        # doctest: +SKIP
        ['lr', 'top1', 'top5', 'validation_top1', 'weight_decay']
    """
    for name, part in (("train", train), ("test", test)):
        if part.labels is None:
            raise ValueError(f"the {name} images have no labels; a probe needs class subfolders or a labelled data set")
    assert train.labels is not None and test.labels is not None
    found = probe(
        torch.from_numpy(train.vectors),
        torch.from_numpy(train.labels),
        torch.from_numpy(test.vectors),
        settings=Settings(lr, weight_decay, epochs, batch_size, seed),
    )
    return accuracies(found.scores, torch.from_numpy(test.labels)) | figures(found)


def figures(found: Probe) -> dict[str, float]:
    """What was chosen, by name."""
    return {"validation_top1": found.validation_top1, "lr": found.lr, "weight_decay": found.weight_decay}


@torch.inference_mode()
def probe(
    train: Vectors,
    labels: Labels,
    test: Float[Tensor, "m g"],
    *,
    settings: Settings = Settings(),  # noqa: B008 (a tuple)
    device: torch.device | None = None,
) -> Probe:
    """Chooses a pair of learning rate and weight decay, then learns from all rows; sees no test label.

    Args:
        train: features to learn from.
        labels: their classes.
        test: features to classify.
        settings: what is not left to choose.
        device: that does the work; not given: the CPU. Features stay where they are and go there in batches.

    Raises:
        ValueError: features of different lengths, or not finite.
    """
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            f"training features have {train.shape[1]} numbers, test features {test.shape[1]}; "
            "expected both of one encoder"
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
    """Which rows choose and do not learn: a tenth of each class, at least one; none of a class of one."""
    generator, held = torch.Generator().manual_seed(seed), torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        count = max(1, len(members) // 10) if len(members) > 1 else 0
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return held


def principal_axes(vectors: Vectors, device: torch.device) -> Axes:
    """The axes of these features; a feature that never changes is left out."""
    seen = vectors[:: math.ceil(len(vectors) / CURVATURE_ROWS)]
    width = seen.shape[1]

    def total(of: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
        """Sums over blocks in float64, in which all rows at once would take twice the features' own memory."""
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
    """Turned once if the result may be held: an epoch needs every row, and so does every pair that learns later."""
    if 4 * len(vectors) * len(axes.curvature) > HELD:
        return Inputs(axes, vectors, None)
    return Inputs(axes, vectors, torch.cat([axes(part) for part in vectors.split(ROWS_AT_ONCE)]))


def passes(num_rows: int, settings: Settings) -> tuple[int, int]:
    """Batches an epoch, and epochs."""
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
    """Classifiers on these rows, one a pair of (learning rate, weight decay), all learning from the same batches.

    SGD with momentum, the rate falling to 0 along a cosine.
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
    """Pairs that fit into `SWEEP_BYTES`: three numbers a weight, two a score."""
    batch = settings.batch_size or BATCH_SIZE
    return max(1, SWEEP_BYTES // (4 * num_classes * (3 * (num_features + 1) + 2 * batch)))


def _judged(
    inputs: Inputs, labels: Labels, rows: Int64[Tensor, " r"], weights: Float[Tensor, "p g classes"]
) -> list[tuple[float, float]]:
    """Accuracy in percent and, for those that are equal, minus the loss of each classifier; diverged ones come last."""
    right, loss = torch.zeros(2, len(weights), dtype=torch.float64)
    for which in rows.split(BATCH_SIZE):
        scores, wanted = (inputs(which) @ weights).cpu(), labels[which]  # p b classes
        right += (scores.argmax(dim=2) == wanted).sum(dim=1)
        loss -= scores.double().log_softmax(dim=2)[:, torch.arange(len(which)), wanted].sum(dim=1)
    return [
        (100 * float(hits) / len(rows), -float(lost)) if math.isfinite(lost) else (-1.0, -math.inf)
        for hits, lost in zip(right, loss, strict=True)
    ]
