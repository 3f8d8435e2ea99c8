"""Find near-duplicates and outliers in a set of images."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from moco.embeddings.features import OnProgress
from moco.embeddings.neighbours import nearest, unit
from moco.embeddings.table import Embeddings, load

BLOCK = 2048
"""Rows per block; all pairs of rows in two blocks are compared at a time."""


class Outliers(NamedTuple):
    """The images least similar to their neighbours, most unusual first; distances are means of 1 - cosine over k."""

    rows: Int64[np.ndarray, " n"]
    distances: Float64[np.ndarray, " n"]


@torch.inference_mode()
def duplicates(
    embeddings: Embeddings | str | Path, threshold: float = 0.95, *, on_progress: OnProgress | None = None
) -> tuple[tuple[int, ...], ...]:
    """Find groups of near-duplicate images.

    Each image in a group is similar enough to at least one other image in it, not necessarily to all.

    Args:
        embeddings: the result of `moco.embed`, or a folder written by `moco embed`.
        threshold: smallest cosine similarity of two images in a group, up to a tolerance of 1e-6.
        on_progress: called with (pairs of blocks done, in all).

    Returns:
        Groups of row numbers, the largest group first.

    Raises:
        ValueError: the threshold is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a cosine similarity above 0 and up to 1, such as 0.95")
    table = load(embeddings) if isinstance(embeddings, str | Path) else embeddings
    vectors, parents = table.vectors, np.arange(len(table))
    starts = range(0, len(table), BLOCK)
    done, total = 0, len(starts) * (len(starts) + 1) // 2
    for first in starts:
        block = unit(vectors[first : first + BLOCK])
        for second in starts[first // BLOCK :]:
            other = block if second == first else unit(vectors[second : second + BLOCK])
            near = (block @ other.T >= threshold - 1e-6).nonzero()
            left, right = near[:, 0].numpy() + first, near[:, 1].numpy() + second
            _unite(parents, left[left < right], right[left < right])
            done += 1
            if on_progress:
                on_progress(done, total)
    roots = _roots(parents, np.arange(len(table)))
    order = np.argsort(roots, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(roots[order])) + 1)
    alike = [tuple(group.tolist()) for group in groups if len(group) > 1]
    return tuple(sorted(alike, key=lambda group: (-len(group), group[0])))


def _unite(parents: Int64[np.ndarray, " n"], left: Int64[np.ndarray, " p"], right: Int64[np.ndarray, " p"]) -> None:
    """Join the groups of each pair; a group's root is its first row."""
    if not len(left):
        return
    ends = np.concatenate([_roots(parents, left), _roots(parents, right)])
    roots: np.ndarray = np.unique(ends)
    a, b = np.split(np.searchsorted(roots, ends), 2)
    count, group = connected_components(coo_matrix((np.ones(len(a)), (a, b)), shape=(len(roots), len(roots))))
    smallest = np.full(count, len(parents))
    np.minimum.at(smallest, group, roots)
    parents[roots] = smallest[group]


def _roots(parents: Int64[np.ndarray, " n"], rows: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
    """Return the root of each row's group."""
    while not np.array_equal(above := parents[rows], rows):
        rows = above
    return rows


def outliers(
    embeddings: Embeddings | str | Path, n: int = 50, *, k: int = 10, on_progress: OnProgress | None = None
) -> Outliers:
    """Find the images that are least similar to their k nearest neighbours.

    Args:
        embeddings: the result of `moco.embed`, or a folder written by `moco embed`.
        n: number of outliers.
        k: number of neighbours whose mean distance is the score.
        on_progress: called with (images done, in all).

    Returns:
        Rows and distances, most unusual first.

    Raises:
        ValueError: there are fewer than two images, or `n` or `k` is less than 1.
    """
    table = load(embeddings) if isinstance(embeddings, str | Path) else embeddings
    if n < 1:
        raise ValueError(f"{n} outliers were asked for; expected at least 1")
    if k < 1:
        raise ValueError(f"outliers by {k} neighbours were asked for; expected at least 1")
    if len(table) < 2:
        raise ValueError(f"there are no others to compare {len(table)} image with; expected at least 2 images")
    k, distances = min(k, len(table) - 1), np.empty(len(table))
    for start in range(0, len(table), 4 * BLOCK):
        own = np.arange(start, min(start + 4 * BLOCK, len(table)))
        queries = torch.from_numpy(np.array(table.vectors[own[0] : own[-1] + 1]))
        found = nearest(table.vectors, queries, k, own=torch.from_numpy(own))
        distances[own] = 1 - found.similarity.double().mean(dim=1).numpy()
        if on_progress:
            on_progress(int(own[-1]) + 1, len(table))
    rows = np.lexsort((np.arange(len(table)), -distances))[:n]
    return Outliers(rows, distances[rows])
