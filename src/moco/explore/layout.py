"""Position on the map, cluster and outlier score of each image."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt32

from moco.data.spacing import evenly
from moco.embeddings.coordinates import LANDMARKS, Method, coordinates
from moco.embeddings.duplicates import outliers
from moco.embeddings.neighbours import nearest
from moco.embeddings.table import Embeddings

NEAREST = 10
"""Neighbours whose mean cosine distance is the outlier score."""
COMPARED = 20_000
"""Most images that each is compared with for its outlier score."""
MOST_CLUSTERS = 12


@dataclass(frozen=True, eq=False)
class Layout:
    """A map of images.

    Attributes:
        xy: positions in [0, 1], with the same scale for both axes.
        clusters: cluster numbers from 0, the largest cluster first.
        outlier: mean cosine distance to the ten nearest other images; higher is more unusual.
        order: all rows, in the order in which their thumbnails appear when zooming in.
        notes: remarks on how the map was made.
    """

    xy: Float32[np.ndarray, "n 2"]
    clusters: Int64[np.ndarray, " n"]
    outlier: Float32[np.ndarray, " n"]
    order: UInt32[np.ndarray, " n"]
    notes: tuple[str, ...]


def lay_out(
    vectors: Float32[np.ndarray, "n f"], *, method: Method = "tsne", seed: int = 0, landmarks: int = LANDMARKS
) -> Layout:
    """Compute positions with `moco.embeddings.coordinates`, clusters of the same components, and outlier scores.

    Args:
        vectors: features, one row per image; may be memory-mapped.
        method: method for the positions.
        seed: seed of all random numbers; the same seed gives the same map.
        landmarks: most images that the method places directly.

    Raises:
        ValueError: there are no rows, or values are not finite.
        ImportError: the method's package is not installed.
    """
    xy, components, notes = coordinates(vectors, method=method, seed=seed, landmarks=landmarks)
    outlier, note = _outlier_scores(vectors)
    return Layout(xy, _clusters(components, seed), outlier, level_order(xy), (*notes, *note))


def level_order(xy: Float32[np.ndarray, "n 2"]) -> UInt32[np.ndarray, " n"]:
    """Rows in display order: one from each square of a coarse grid, then of ever finer ones, in Morton order.

    Thumbnails that are visible together, at any zoom, are then together in a few sprite sheets.
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
    """Insert a zero between the bits of a 16-bit number."""
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        number = (number | (number << np.uint64(shift))) & np.uint64(mask)
    return number


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
    if total < 2:
        return np.zeros(total, dtype=np.float32), ()
    if total <= COMPARED:
        found = outliers(Embeddings(vectors, ("",) * total, None, None), n=total, k=NEAREST)
        return found.distances[np.argsort(found.rows)].astype(np.float32), ()
    compared = evenly(total, COMPARED)
    bank, own, scores = torch.from_numpy(np.array(vectors[compared])), torch.full((total,), -1), []
    own[torch.from_numpy(compared)] = torch.arange(COMPARED)
    for start in range(0, total, COMPARED):
        queries = torch.from_numpy(np.array(vectors[start : start + COMPARED]))
        near = nearest(bank, queries, NEAREST, own=own[start : start + COMPARED])
        scores.append(1 - near.similarity.mean(dim=1))
    return torch.cat(scores).numpy(), (f"Outlier scores are based on {COMPARED:,} images.",)
