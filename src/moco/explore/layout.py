"""Where each image lies on the map, which others it lies with, and how unlike all others it is."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64, UInt32
from torch import Tensor

from moco.neighbours import nearest

LANDMARKS = 5000
"""Images that t-SNE places; of more, the others are put between the landmarks most like them."""
DIMENSIONS = 50
"""Principal components that t-SNE and the clusters see."""
NEAREST = 10
"""Neighbours whose mean cosine distance is the outlier score."""
COMPARED = 20_000
"""Images that each is compared with for its outlier score."""
MOST_CLUSTERS = 12
_BLOCK = 2048


@dataclass(frozen=True, eq=False)
class Layout:
    """A map of images.

    Attributes:
        xy: places in [0, 1], one scale for both axes.
        clusters: numbers from 0, the largest cluster first.
        outlier: mean cosine distance to the ten nearest other images; higher is stranger.
        order: all rows, in the order in which their thumbnails come forward as one zooms in.
        notes: how the map was made, for people.
    """

    xy: Float32[np.ndarray, "n 2"]
    clusters: Int64[np.ndarray, " n"]
    outlier: Float32[np.ndarray, " n"]
    order: UInt32[np.ndarray, " n"]
    notes: tuple[str, ...]


def lay_out(vectors: Float32[np.ndarray, "n f"], *, seed: int = 0, landmarks: int = LANDMARKS) -> Layout:
    """Principal components, then t-SNE (van der Maaten and Hinton 2008) by cosine distance.

    Args:
        vectors: features, one row per image; may be memory-mapped.
        seed: of every draw; the same map each time.
        landmarks: most images that t-SNE places.

    Raises:
        ValueError: no rows, or numbers that are not finite.
    """
    if not len(vectors):
        raise ValueError("there are no vectors to lay out; expected at least one image")
    chosen = evenly_spaced(len(vectors), landmarks)
    reduced = _principal(vectors, chosen, seed)
    places, notes = _places(reduced, chosen, seed)
    outlier, note = _outlier_scores(vectors)
    xy = _scaled(places)
    return Layout(xy, _clusters(reduced, seed), outlier, level_order(xy), (*notes, *note))


def level_order(xy: Float32[np.ndarray, "n 2"]) -> UInt32[np.ndarray, " n"]:
    """Rows: one of each square of a coarse grid, then of ever finer ones, in Morton order within a grid.

    Thumbnails that show together, however far one has zoomed in, then lie together in a few sprite sheets.
    """
    grid = np.clip(xy * 65535, 0, 65535).astype(np.uint64)
    morton = _spread_bits(grid[:, 0]) | (_spread_bits(grid[:, 1]) << np.uint64(1))
    left = np.argsort(morton, kind="stable")
    levels = []
    for bits in range(4, 17):  # 16 x 16 squares: one sheet
        square = morton[left] >> np.uint64(2 * (16 - bits))
        _, first = np.unique(square, return_index=True)
        levels.append(left[first])
        left = np.delete(left, first)
    return np.concatenate([*levels, left]).astype(np.uint32)


def _spread_bits(number: np.ndarray) -> np.ndarray:
    """Puts a zero between the bits of a 16-bit number."""
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        number = (number | (number << np.uint64(shift))) & np.uint64(mask)
    return number


def _unit(vectors: np.ndarray) -> Float[Tensor, "n f"]:
    # A copy of a mapped block, for torch warns of memory that it must not write to.
    return F.normalize(torch.from_numpy(np.array(vectors, dtype=np.float32)), dim=1)


def _principal(vectors: np.ndarray, chosen: np.ndarray, seed: int) -> Float32[np.ndarray, "n d"]:
    from sklearn.decomposition import PCA

    sample = _unit(vectors[chosen]).numpy()
    if not np.isfinite(sample).all():
        raise ValueError("the vectors hold numbers that are not finite; expected features of a trained encoder")
    if len(chosen) < 3 or np.ptp(sample, axis=0).max() < 1e-6:  # nothing to tell apart: an encoder that collapsed
        return np.zeros((len(vectors), 2), dtype=np.float32)
    pca = PCA(min(DIMENSIONS, *sample.shape), svd_solver="randomized", random_state=seed).fit(sample)
    blocks = [vectors[start : start + _BLOCK] for start in range(0, len(vectors), _BLOCK)]
    return np.concatenate([pca.transform(_unit(block).numpy()) for block in blocks]).astype(np.float32)


def _places(reduced: np.ndarray, chosen: np.ndarray, seed: int) -> tuple[np.ndarray, tuple[str, ...]]:
    from sklearn.manifold import TSNE

    total, sample = len(reduced), reduced[chosen]
    if len(chosen) < 10 or not sample.any():
        # Too few for t-SNE, or all alike: a ring shows each.
        turn = 2 * np.pi * np.arange(total) / total
        alike = () if sample.any() or len(chosen) < 10 else ("All images look the same to this encoder.",)
        return np.stack([np.cos(turn), np.sin(turn)], axis=1), alike
    start = np.zeros((len(chosen), 2), dtype=np.float32)
    start[:, : sample.shape[1]] = sample[:, :2]
    tsne = TSNE(
        init=start / start.std() * 1e-4,  # as far apart as scikit-learn puts them
        perplexity=min(30.0, (len(chosen) - 1) / 3),
        max_iter=500,
        random_state=seed,
        n_jobs=1,  # one map from one seed, on any number of cores
    )
    placed = tsne.fit_transform(sample)
    notes = ("Placed by t-SNE: near means alike, far says little.",)
    if len(chosen) == total:
        return placed, notes
    places = np.empty((total, 2), dtype=np.float32)
    known = torch.from_numpy(sample)
    for first in range(0, total, _BLOCK):
        distance, nearest = torch.cdist(torch.from_numpy(reduced[first : first + _BLOCK]), known).topk(5, largest=False)
        weight = torch.softmax(-((distance / distance[:, -1:].clamp(min=1e-12)) ** 2) * 4, dim=1).numpy()
        places[first : first + _BLOCK] = (weight[:, :, None] * placed[nearest.numpy()]).sum(axis=1)
    places[chosen] = placed
    others = f"The other {total - len(chosen):,} lie between the five of them most like them."
    return places, (f"t-SNE placed {len(chosen):,} images: near means alike, far says little.", others)


def _scaled(places: np.ndarray) -> Float32[np.ndarray, "n 2"]:
    low, high = places.min(axis=0), places.max(axis=0)
    side = max(float((high - low).max()), 1e-9)
    return (0.5 + (places - (low + high) / 2) / side).astype(np.float32)


def _clusters(reduced: np.ndarray, seed: int) -> Int64[np.ndarray, " n"]:
    from sklearn.cluster import MiniBatchKMeans

    number = min(MOST_CLUSTERS, max(2, round(len(reduced) ** 0.5 / 5)), len(np.unique(reduced[:LANDMARKS], axis=0)))
    if number < 2:
        return np.zeros(len(reduced), dtype=np.int64)
    found = MiniBatchKMeans(number, n_init=3, random_state=seed).fit_predict(reduced)
    by_size = np.argsort(-np.bincount(found, minlength=number), kind="stable")
    return np.argsort(by_size)[found].astype(np.int64)


def _outlier_scores(vectors: np.ndarray) -> tuple[Float32[np.ndarray, " n"], tuple[str, ...]]:
    total = len(vectors)
    compared = evenly_spaced(total, COMPARED)
    if len(compared) < 2:
        return np.zeros(total, dtype=np.float32), ()
    bank, own = torch.from_numpy(np.array(vectors[compared])), torch.full((total,), -1)
    own[torch.from_numpy(compared)] = torch.arange(len(compared))
    k, scores = min(NEAREST, len(compared) - 1), []
    for start in range(0, total, COMPARED):
        queries = torch.from_numpy(np.array(vectors[start : start + COMPARED]))
        found = nearest(bank, queries, k, own=own[start : start + COMPARED])
        scores.append(1 - found.similarity.mean(dim=1))
    note = () if len(compared) == total else (f"Outlier scores compare with {len(compared):,} images.",)
    return torch.cat(scores).numpy(), note


def evenly_spaced(total: int, most: int) -> Int64[np.ndarray, " m"]:
    """All row numbers, or so many at even distances."""
    return np.linspace(0, total - 1, min(total, most)).round().astype(np.int64)
