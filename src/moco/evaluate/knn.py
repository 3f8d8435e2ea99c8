"""Weighted k-nearest-neighbour classification, and nearest neighbour with few labels: no training, no settings to tune.

Wu et al. 2018 (arXiv:1805.01978), section 3.4: the k most similar training images vote for their class with weight
exp(cosine similarity / temperature).
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from moco.embeddings.neighbours import AT_ONCE, nearest
from moco.embeddings.table import Embeddings
from moco.evaluate.contract import Outcome, Protocol, Task, accuracies, check_finite, labels_of, labels_of_tables
from moco.evaluate.reading import read
from moco.parallel import collectives

Vectors = Float[Tensor, "n f"]
Labels = Int64[Tensor, " n"]

QUERIES_AT_ONCE, NUMBERS_AT_ONCE = AT_ONCE


def evaluate(task: Task) -> Outcome:
    """Run the protocol: training images vote for the class of test images, by their features or projections.

    Raises:
        ValueError: there are no labels, too many images cannot be read, or features are NaN or infinite.
    """
    held, settings = task.labelled(), task.settings
    assert settings.k is not None and settings.temperature is not None
    train, test = read(task, held.train, "training"), read(task, held.test, "test")
    bank, queries = train.vectors, test.vectors
    if settings.features == "projection":
        assert task.projector is not None
        bank, queries = (projected(task.projector, vectors) for vectors in (bank, queries))
    for part, vectors in (("training", bank), ("test", queries)):
        check_finite(vectors, part)
    labels, wanted = labels_of(train.images), labels_of(test.images)
    k, temperature = settings.k, settings.temperature
    scores = shared_scores(bank, labels, queries, k=k, temperature=temperature, device=task.device)
    return Outcome({}, scores, (*train.notes, *test.notes), wanted)


PROTOCOL = Protocol(evaluate, frozenset({"features", "k", "temperature", "labels"}), in_shares=lambda settings: True)


@torch.inference_mode()
def projected(projector: nn.Module, vectors: Vectors) -> Float[Tensor, "n d"]:
    """Turn features into projections, on the CPU; the projector's mode is restored."""
    parameter, was_training = next(projector.parameters()), projector.training
    projector.eval()
    parts = [projector(part.to(parameter)).float().cpu() for part in vectors.split(4096)]
    projector.train(was_training)
    return torch.cat(parts)


def knn(train: Embeddings, test: Embeddings, *, k: int = 200, temperature: float = 0.1) -> dict[str, float]:
    """Accuracy of a weighted vote of the k nearest training images.

    Args:
        train: labelled embeddings that vote.
        test: labelled embeddings to classify.
        k: number of neighbours that vote; fewer if there are fewer.
        temperature: the weight of a vote is exp(similarity / temperature).

    Returns:
        `top1` and `top5` in percent.

    Raises:
        ValueError: `train` or `test` has no labels.

    Example:
        >>> sorted(moco.knn(moco.embed(encoder, "train/"), moco.embed(encoder, "test/"), k=200))   # doctest: +SKIP
        ['top1', 'top5']
    """
    labels, test_labels = labels_of_tables(train, test, "kNN")
    queries = torch.from_numpy(np.array(test.vectors))
    scores = knn_scores(train.vectors, labels, queries, k=k, temperature=temperature)
    return accuracies(scores, test_labels)


@torch.inference_mode()
def knn_scores(
    bank: Vectors | np.ndarray, bank_labels: Labels, queries: Float[Tensor, "m f"], *, k: int, temperature: float
) -> Float[Tensor, "m classes"]:
    """Votes for each class c: the sum of exp(cosine_i / temperature) over the k nearest images i with label c.

    The bank is read once, in blocks, and may be a memory-mapped array, so that a million vectors are never in memory at
    once. The computation runs on the device of the queries.
    """
    bank_labels, num_classes = bank_labels.to(queries.device), int(bank_labels.max()) + 1
    found = nearest(bank, queries, k, at_once=(QUERIES_AT_ONCE, NUMBERS_AT_ONCE))
    # exp((s - 1) / T) rather than exp(s / T): the same ranking, without overflow at small T
    votes = ((found.similarity - 1) / temperature).exp()
    return votes.new_zeros(len(votes), num_classes).scatter_add_(1, bank_labels[found.index], votes)


def shared_scores(
    bank: Vectors | np.ndarray,
    bank_labels: Labels,
    queries: Float[Tensor, "m f"],
    *,
    k: int,
    temperature: float,
    device: torch.device,
) -> Float[Tensor, "m classes"]:
    """`knn_scores` on the CPU, of which each rank computes a share on its `device`; all ranks have to call it."""

    def votes(which: range) -> Tensor:
        asked = queries[which.start : which.stop].to(device)
        return knn_scores(bank, bank_labels, asked, k=k, temperature=temperature).cpu()

    return collectives.in_shares(
        votes, len(queries), int(bank_labels.max()) + 1, at_once=QUERIES_AT_ONCE, device=device
    )


@torch.inference_mode()
def few_label_accuracy(
    bank: Vectors,
    bank_labels: Labels,
    queries: Float[Tensor, "m f"],
    query_labels: Int64[Tensor, " m"],
    *,
    labels_per_class: int,
    num_draws: int = 100,
) -> float:
    """Accuracy in percent of the nearest of a few labelled images per class, averaged over fixed random draws.

    This is what someone gets who labels one image, or five, of each class. It is computed on the vectors' device.

    Raises:
        ValueError: a class has fewer images than `labels_per_class`.
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    members = [(bank_labels == label).nonzero()[:, 0] for label in bank_labels.unique()]
    smallest = min(len(each) for each in members)
    if smallest < labels_per_class:
        raise ValueError(f"a class has {smallest} training images; expected at least {labels_per_class} to label")
    hits = []
    for draw in range(num_draws):
        generator = torch.Generator().manual_seed(draw)
        chosen = torch.cat(
            [each[torch.randperm(len(each), generator=generator)[:labels_per_class]] for each in members]
        )
        nearest = (queries @ bank[chosen.to(bank.device)].T).argmax(dim=1).cpu()
        hits.append((bank_labels[chosen][nearest] == query_labels).double().mean())
    return 100 * torch.stack(hits).mean().item()
