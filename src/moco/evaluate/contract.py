"""What every protocol receives and returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from moco.config import DataConfig, EvaluateConfig
from moco.data import Images, Splits, with_labels
from moco.embeddings.table import Embeddings
from moco.messages import closest
from moco.method.encoder import ImageEncoder
from moco.views.specs import ViewSpec

Report = Callable[[str, int, int], None]
"""Called with what is being done, how much is done and how much there is."""
COMMON = frozenset({"seed", "accelerator", "precision"})
"""Settings that every protocol takes."""
ROWS_AT_ONCE = 8192
"""Rows of features processed together, so that features in a file are never in memory all at once."""


class HeldOut(NamedTuple):
    """Labelled images to train on (or that vote), and labelled images to test on."""

    train: Images
    test: Images

    @property
    def train_labels(self) -> Int64[Tensor, " n"]:
        return labels_of(self.train)

    @property
    def test_labels(self) -> Int64[Tensor, " m"]:
        return labels_of(self.test)


class Task(NamedTuple):
    """An evaluation to run.

    Attributes:
        encoder: on the device to use, in eval mode and frozen. A protocol that trains it trains a copy.
        projector: features -> projections, on the same device; None if the source has none.
        splits: all images, as loaded; labels may be absent.
        settings: with every choice made that does not depend on the protocol (accelerator, precision).
        report: called by a protocol to report its progress.
        views: the views that the encoder was trained on, if known.
        data: how the images are read: memory for decoded images, reading processes, and how many files may be
            unreadable.
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
        """Training and test images, with the fraction of training labels that the settings ask for.

        Raises:
            ValueError: there are no labels, or too few images.
        """
        train, test = held_out(self.splits)
        if self.settings.labels < 1:
            train = train.select(balanced(labels_of(train), self.settings.labels, self.settings.seed))
        return HeldOut(train, test)


@dataclass(frozen=True)
class Outcome:
    """Results of a protocol.

    Attributes:
        figures: figures by name; accuracies in percent.
        scores: score of each test image for each class, if there are any; higher means more likely.
        notes: remarks for the user.
        labels: labels of the images in `scores`; None: those of all test images.
        settings: all settings that were used, including defaults; None: those of the task.
    """

    figures: dict[str, float]
    scores: Float[Tensor, "m classes"] | None = None
    notes: tuple[str, ...] = ()
    labels: Int64[Tensor, " m"] | None = None
    settings: EvaluateConfig | None = None


Measure = Callable[[Task], Outcome]


@dataclass(frozen=True)
class Protocol:
    """A way to evaluate an encoder.

    Attributes:
        measure: runs the protocol.
        takes: settings that it uses in addition to those that all protocols use; any other setting is refused.
        default_form: the form to use for an encoder if none is given; None if there are no forms.
        fp32: forms that run in fp32 unless another precision is given, as in the publications.
        wants_projector: whether it needs the projector whatever the settings.
        in_shares: whether, with these settings, several processes can share the work and find the same as one; not
            given: never.
    """

    measure: Measure
    takes: frozenset[str] = frozenset(EvaluateConfig.model_fields) - COMMON
    default_form: Callable[[ImageEncoder], str] | None = None
    fp32: frozenset[str] = frozenset()
    wants_projector: bool = False
    in_shares: Callable[[EvaluateConfig], bool] = lambda settings: False

    def refuse_others(self, name: str, settings: EvaluateConfig) -> None:
        """Refuse settings that the protocol does not use.

        Raises:
            ValueError: such a setting was given; the message names it, and those that the protocol takes.
        """
        for other in replaced(settings):
            if other not in self.takes | COMMON:
                own = [f"--{each}" for each in EvaluateConfig.model_fields if each in self.takes]
                raise ValueError(
                    f"--protocol {name} does not use --{other}; it takes {', '.join([*own, ''])}--seed, --accelerator "
                    "and --precision"
                )


def replaced(settings: EvaluateConfig) -> list[str]:
    """Return the settings that were given and differ from their default, in the order of their section."""
    return [
        name
        for name, field in EvaluateConfig.model_fields.items()
        if name in settings.model_fields_set and getattr(settings, name) != field.default
    ]


def labels_of(images: Images) -> Int64[Tensor, " n"]:
    """Return the labels of images, as class numbers.

    Raises:
        ValueError: there are none.
    """
    if images.labels is None:
        raise ValueError(
            "these images have no labels, which this protocol needs; give class subfolders or a labelled set with "
            "--data, or use --protocol health, which needs none"
        )
    return images.labels


def labels_of_tables(train: Embeddings, test: Embeddings, user: str) -> tuple[Tensor, Tensor]:
    """Return the labels of both tables of embeddings.

    Raises:
        ValueError: one has none; the message says that `user` needs them.
    """
    for name, table in (("train", train), ("test", test)):
        if table.labels is None:
            raise ValueError(f"the {name} images have no labels; {user} needs class subfolders or a labelled data set")
    assert train.labels is not None and test.labels is not None
    return torch.from_numpy(train.labels), torch.from_numpy(test.labels)


def num_classes(parts: HeldOut) -> int:
    """Return the number of classes a classifier tells apart: those with a name, or up to the largest training label."""
    return max(len(parts.train.classes or ()), int(parts.train_labels.max()) + 1)


def is_vit(encoder: ImageEncoder) -> bool:
    """Return whether the backbone is a vision transformer, which the published protocols train differently."""
    return hasattr(encoder.backbone, "patch_embed")


def check_form(protocol: str, form: str, known: Sequence[str]) -> None:
    """Refuse a form that the protocol does not have.

    Raises:
        ValueError: the form is unknown; the message lists the known ones and the closest.
    """
    if form not in known:
        raise ValueError(
            f"unknown form {form!r} of {protocol}: expected one of {', '.join(known)}{closest(form, list(known))}"
        )


def held_out(splits: Splits, *, use_test: bool = True) -> HeldOut:
    """Divide labelled images into those to train on and those to test on.

    Args:
        splits: the parts of a data set.
        use_test: test on the test part if there is one; otherwise, on every tenth training image.

    Raises:
        ValueError: there are no labels, or too few images to hold any out.
    """
    train, test = with_labels(splits.train), splits.test
    labels_of(train)
    if use_test and test is not None and test.labels is not None:
        return HeldOut(train, test)
    if len(train) < 20:
        raise ValueError(f"{len(train)} labelled images are too few to hold some out; give at least 20")
    remaining = [index for index in range(len(train)) if index % 10]
    return HeldOut(train.select(remaining), train.select(list(range(0, len(train), 10))))


def balanced(labels: Int64[Tensor, " n"], fraction: float, seed: int) -> Int64[Tensor, " s"]:
    """Choose a subset with the same number of images, at least one, of each class; in the order of the images.

    With the same seed, the subset for a larger fraction contains that for a smaller one.

    Args:
        labels: labels of all images.
        fraction: fraction of all images to keep; a class with fewer than its share is kept whole.
        seed: seed of the choice.
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
    """Confusion matrix: the number of test images of the row's class that were classified as the column's."""
    number = max(scores.shape[1], int(labels.max()) + 1)
    pairs = labels * number + scores.argmax(dim=1).cpu()
    return torch.bincount(pairs, minlength=number * number).view(number, number)


def check_finite(vectors: Float[Tensor, "n f"] | np.ndarray, part: str) -> None:
    """Check that features are finite.

    Raises:
        ValueError: some are infinite or NaN; the message names the `part` they belong to.
    """
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        block = vectors[start : start + ROWS_AT_ONCE]
        finite = np.isfinite(block).all() if isinstance(block, np.ndarray) else block.isfinite().all()
        if not bool(finite):
            raise ValueError(f"some {part} features are NaN or infinite; the encoder may be damaged: try another one")
