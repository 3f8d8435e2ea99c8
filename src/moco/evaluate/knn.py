"""Weighted k-nearest-neighbour classification, and nearest neighbour with few labels: no training, no settings to tune.

Wu et al. 2018 (arXiv:1805.01978), section 3.4: the k most similar training images vote for their class with weight
exp(cosine similarity / temperature).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from moco.embed import Embeddings

Vectors = Float[Tensor, "n f"]
Labels = Int64[Tensor, " n"]

QUERIES_AT_ONCE = 2**26
"""Similarities held in memory at a time."""


def knn(train: Embeddings, test: Embeddings, *, k: int = 200, temperature: float = 0.1) -> dict[str, float]:
    """Accuracy of a weighted vote of the k nearest training images.

    Args:
        train: labelled embeddings that vote.
        test: labelled embeddings that are classified.
        k: voters; fewer if there are fewer.
        temperature: a vote weighs exp(similarity / temperature).

    Returns:
        `top1` and `top5` in percent.

    Raises:
        ValueError: one of the two has no labels.

    Example:
        >>> moco.knn(moco.embed(encoder, "train/"), moco.embed(encoder, "test/"), k=200)["top1"]   # doctest: +SKIP
        82.6
    """
    for name, part in (("train", train), ("test", test)):
        if part.labels is None:
            raise ValueError(f"the {name} images have no labels; kNN needs class subfolders or a labelled data set")
    assert train.labels is not None and test.labels is not None
    return knn_accuracy(
        torch.from_numpy(train.vectors),
        torch.from_numpy(train.labels),
        torch.from_numpy(test.vectors),
        torch.from_numpy(test.labels),
        k=k,
        temperature=temperature,
    )


@torch.inference_mode()
def knn_accuracy(
    bank: Vectors,
    bank_labels: Labels,
    queries: Float[Tensor, "m f"],
    query_labels: Int64[Tensor, " m"],
    *,
    k: int,
    temperature: float,
) -> dict[str, float]:
    """`top1` and `top5` in percent, on tensors."""
    scores = knn_scores(bank, bank_labels, queries, k=k, temperature=temperature)
    ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices
    hits = ranked == query_labels[:, None].to(ranked.device)
    return {"top1": 100 * hits[:, 0].double().mean().item(), "top5": 100 * hits.any(dim=1).double().mean().item()}


@torch.inference_mode()
def knn_scores(
    bank: Vectors, bank_labels: Labels, queries: Float[Tensor, "m f"], *, k: int, temperature: float
) -> Float[Tensor, "m classes"]:
    """Sum of votes per class: sum over the k nearest i with label c of exp(cosine_i / temperature)."""
    k, num_classes = min(k, len(bank)), int(bank_labels.max()) + 1
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    scores = []
    for part in queries.split(max(1, QUERIES_AT_ONCE // len(bank))):
        similarity, nearest = (part @ bank.T).topk(k, dim=1)
        # exp((s - 1) / T) and not exp(s / T): the same ranking, and no overflow at small T
        votes = ((similarity - 1) / temperature).exp()
        scores.append(votes.new_zeros(len(part), num_classes).scatter_add_(1, bank_labels[nearest], votes))
    return torch.cat(scores)


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
    """Accuracy in percent of the nearest of a few labelled images per class, mean over fixed random draws of them.

    What a person gets who labels one image, or five, of each class.

    Raises:
        ValueError: a class has fewer images than are to be labelled.
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
        nearest = (queries @ bank[chosen].T).argmax(dim=1)
        hits.append((bank_labels[chosen][nearest] == query_labels).double().mean())
    return 100 * torch.stack(hits).mean().item()
