"""What every protocol is given and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from moco.config import DataConfig, EvaluateConfig
from moco.data import Images, Splits, with_labels
from moco.encoder import ImageEncoder
from moco.views import ViewSpec

Report = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""
COMMON = frozenset({"seed", "accelerator", "precision"})
"""Settings that every protocol takes."""
ROWS_AT_ONCE = 8192
"""Rows of features that are looked at together, so that features in a file are never in memory as a whole."""


class HeldOut(NamedTuple):
    """Labelled images that answer or are learned from, and labelled images that are asked about."""

    train: Images
    test: Images

    @property
    def train_labels(self) -> Int64[Tensor, " n"]:
        return labels_of(self.train)

    @property
    def test_labels(self) -> Int64[Tensor, " m"]:
        return labels_of(self.test)


class Task(NamedTuple):
    """One measurement to be made.

    Attributes:
        encoder: on the device that is to do the work, in eval mode, nothing of it trainable. A protocol that trains it
            trains a copy.
        projector: features -> projections, on the same device; None where the source has none.
        splits: all images, as they were loaded; labels may be absent.
        settings: with every choice that does not depend on the protocol made (accelerator, precision).
        report: where a protocol says how far it is.
        views: those that the encoder was trained on, where they are known.
        data: how the images are read; of it count the memory that decoded ones may take, the reading processes and how
            many files may be unreadable.
    """

    encoder: ImageEncoder
    projector: nn.Module | None
    splits: Splits
    settings: EvaluateConfig
    report: Report
    views: tuple[ViewSpec, ViewSpec] | None = None
    data: DataConfig = DataConfig()

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    def labelled(self) -> HeldOut:
        """The images by parts, with as many training labels as the settings allow.

        Raises:
            ValueError: there are no labels, or too few images.
        """
        train, test = held_out(self.splits)
        if self.settings.labels < 1:
            train = train.select(balanced(labels_of(train), self.settings.labels, self.settings.seed))
        return HeldOut(train, test)


@dataclass(frozen=True)
class Outcome:
    """What a protocol found.

    Attributes:
        figures: by name; accuracies in percent.
        scores: of each test image for each class, where there are such; the higher the likelier.
        notes: in words, for people.
        labels: of the images that the scores are of; None: those of all test images.
        settings: as they were in force, those too that were not given; None: those of the task.
    """

    figures: dict[str, float]
    scores: Float[Tensor, "m classes"] | None = None
    notes: tuple[str, ...] = ()
    labels: Int64[Tensor, " m"] | None = None
    settings: EvaluateConfig | None = None


Measure = Callable[[Task], Outcome]


@dataclass(frozen=True)
class Protocol:
    """A way to measure an encoder.

    Attributes:
        measure: does it.
        takes: settings that it looks at besides those that all do; another one that is given is refused.
        default_form: the form that is taken for an encoder where none is named; None: there are no forms.
        fp32: forms that are in fp32 unless another precision is given, as what was published was.
        wants_projector: whatever the settings say.
        in_shares: whether several processes that measure by these settings share the work and find what one does;
            not given: they never do.
    """

    measure: Measure
    takes: frozenset[str] = frozenset(EvaluateConfig.model_fields) - COMMON
    default_form: Callable[[ImageEncoder], str] | None = None
    fp32: frozenset[str] = frozenset()
    wants_projector: bool = False
    in_shares: Callable[[EvaluateConfig], bool] = lambda settings: False

    def refuse_others(self, name: str, settings: EvaluateConfig) -> None:
        """Settings that would change nothing.

        Raises:
            ValueError: one was given; which, and what the protocol of this name takes.
        """
        for other in replaced(settings):
            if other not in self.takes | COMMON:
                own = [f"--{each}" for each in EvaluateConfig.model_fields if each in self.takes]
                raise ValueError(
                    f"--{other} is nothing that --protocol {name} looks at; it takes {', '.join([*own, ''])}--seed, "
                    "--accelerator and --precision"
                )


def replaced(settings: EvaluateConfig) -> list[str]:
    """Settings that were given and are not what they would be anyway, in the order of their section."""
    return [
        name
        for name, field in EvaluateConfig.model_fields.items()
        if name in settings.model_fields_set and getattr(settings, name) != field.default
    ]


def labels_of(images: Images) -> Int64[Tensor, " n"]:
    """The class numbers.

    Raises:
        ValueError: there are none.
    """
    if images.labels is None:
        raise ValueError(
            "these images have no labels, which this protocol needs; give class subfolders or a labelled set with "
            "--data, or use --protocol health, which needs none"
        )
    return images.labels


def held_out(splits: Splits, *, use_test: bool = True) -> HeldOut:
    """Images that answer and images that are asked about.

    Args:
        splits: of a data set.
        use_test: ask about the test part where there is one; else about every tenth training image.

    Raises:
        ValueError: there are no labels, or too few images to hold any out.
    """
    train, test = with_labels(splits.train), splits.test
    labels_of(train)
    if use_test and test is not None and test.labels is not None:
        return HeldOut(train, test)
    if len(train) < 20:
        raise ValueError(f"{len(train)} labelled images are too few to hold some out; expected at least 20")
    asked = list(range(0, len(train), 10))
    answering = [index for index in range(len(train)) if index % 10]
    return HeldOut(train.select(answering), train.select(asked))


def balanced(labels: Int64[Tensor, " n"], fraction: float, seed: int) -> Int64[Tensor, " s"]:
    """A subset with the same number of images of each class, at least one; in the order of the images.

    A larger fraction of the same seed contains every smaller one.

    Args:
        labels: of all images.
        fraction: of all images to keep; a class that has fewer than its share is kept whole.
        seed: which images.
    """
    generator = torch.Generator().manual_seed(seed)
    members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    share = max(1, round(fraction * len(labels) / len(members)))
    chosen = [each[torch.randperm(len(each), generator=generator)[:share]] for each in members]
    return torch.cat(chosen).sort().values


def accuracies(scores: Float[Tensor, "m classes"], labels: Int64[Tensor, " m"]) -> dict[str, float]:
    """`top1` and `top5` in percent."""
    ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices.cpu()
    hits = ranked == labels[:, None]
    return {"top1": 100 * hits[:, 0].double().mean().item(), "top5": 100 * hits.any(dim=1).double().mean().item()}


def confusion(scores: Float[Tensor, "m classes"], labels: Int64[Tensor, " m"]) -> Int64[Tensor, "classes classes"]:
    """How many test images of the class of the row were taken for the class of the column."""
    number = max(scores.shape[1], int(labels.max()) + 1)
    pairs = labels * number + scores.argmax(dim=1).cpu()
    return torch.bincount(pairs, minlength=number * number).view(number, number)


def check_finite(vectors: Float[Tensor, "n f"] | np.ndarray, part: str) -> None:
    """That features are numbers.

    Raises:
        ValueError: some are infinite or not a number; which `part` they are of.
    """
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        block = vectors[start : start + ROWS_AT_ONCE]
        finite = np.isfinite(block).all() if isinstance(block, np.ndarray) else block.isfinite().all()
        if not bool(finite):
            raise ValueError(f"some {part} features are not finite numbers; look for a collapsed or damaged encoder")
