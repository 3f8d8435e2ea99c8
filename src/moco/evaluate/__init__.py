"""How good is an encoder? One protocol a file, one contract: a run and its data -> named figures in percent."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from moco.checkpoint import load_encoder
from moco.config import DataConfig
from moco.data import Images, Splits, load_data
from moco.embed import Embeddings, embed
from moco.encoder import ImageEncoder
from moco.evaluate.knn import knn
from moco.run import Run

__all__ = ["EVALUATIONS", "evaluate", "knn"]


def _knn(encoder: ImageEncoder, train: Embeddings, test: Embeddings, k: int, temperature: float) -> dict[str, float]:
    return {f"knn_{name}": value for name, value in knn(train, test, k=k, temperature=temperature).items()}


EVALUATIONS: dict[str, Callable[[ImageEncoder, Embeddings, Embeddings, int, float], dict[str, float]]] = {"knn": _knn}


def evaluate(
    run: str | Path,
    protocol: str = "knn",
    *,
    data: str | None = None,
    k: int | None = None,
    temperature: float | None = None,
) -> dict[str, float]:
    """Accuracy of a run's encoder by a published protocol.

    Args:
        run: its folder.
        protocol: a name in `EVALUATIONS`.
        data: labelled images with a training and a test part; not given: those of the run. Without a test part, every
            tenth training image is asked about and the others answer.
        k: neighbours that vote; not given: the run's setting.
        temperature: of the votes; not given: the run's setting.

    Returns:
        Figures in percent.

    Raises:
        ValueError: unknown protocol, or images without labels.
    """
    if protocol not in EVALUATIONS:
        near = difflib.get_close_matches(protocol, EVALUATIONS, n=1)
        raise ValueError(
            f"unknown protocol {protocol!r}: expected one of {', '.join(EVALUATIONS)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if k is not None and k < 1:
        raise ValueError(f"k is {k}; expected at least 1 neighbour to vote")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected more than 0")
    opened = Run.open(run)
    encoder = load_encoder(opened.path)
    config = opened.config.data if data is None else DataConfig(source=data, channels=opened.config.data.channels)
    held = held_out(load_data(config))
    monitor, precision = opened.config.monitor, opened.config.engine.precision  # as at the end of training
    return EVALUATIONS[protocol](
        encoder,
        embed(encoder, held.train, precision=precision),
        embed(encoder, held.test, precision=precision),
        monitor.knn_k if k is None else k,
        monitor.knn_temperature if temperature is None else temperature,
    )


class HeldOut(NamedTuple):
    """Labelled images that answer, and labelled images that are asked about."""

    train: Images
    test: Images

    @property
    def train_labels(self) -> Tensor:
        return _labels(self.train)

    @property
    def test_labels(self) -> Tensor:
        return _labels(self.test)


def _labels(images: Images) -> Tensor:
    if images.labels is None:
        raise ValueError(
            "these images have no labels, which kNN needs; give class subfolders or a labelled set with --data, "
            "or look at loss, spread and neighbours instead"
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
    train, test = splits
    _labels(train)
    if use_test and test is not None and test.labels is not None:
        return HeldOut(train, test)
    if len(train) < 20:
        raise ValueError(f"{len(train)} labelled images are too few to hold some out; expected at least 20")
    asked = list(range(0, len(train), 10))
    answering = [index for index in range(len(train)) if index % 10]
    return HeldOut(train.select(answering), train.select(asked))
