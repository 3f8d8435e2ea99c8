"""Rank rows by cosine similarity: all of them exactly, or those that a graph finds among very many.

The graph is HNSW (Malkov and Yashunin 2016, arXiv:1603.09320), built by usearch.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from moco.embeddings.neighbours import nearest
from moco.packages import install

MARGINS = 32, 1024
"""Additional rows that are compared in float64; the second number if ties at the border need more than the first. If
they need more than that, all rows are compared."""
ROUNDING = 1e-5
"""Upper bound on the sum of the rounding errors of two similarities in float32."""
BLOCK = 2**22
"""Values converted to float64 at a time."""
CANDIDATES = 4
"""A graph is searched for this many times the wanted rows, plus the smaller margin."""
GRAPH_BLOCK = 2**24
"""Values added to a graph at a time."""
KIND = "f16"
"""Type of the values in the graph: half the size, and precise enough for candidates."""


class Ranking(NamedTuple):
    """Answers to each query, best first; ties are ordered by row number.

    A query with fewer answers than the others, because it is itself a row or because a graph found no more, is padded
    with row -1 and similarity NaN.
    """

    rows: Int64[np.ndarray, "q k"]
    similarities: Float64[np.ndarray, "q k"]


def rank_all(
    vectors: np.ndarray,
    queries: Float32[np.ndarray, "q f"],
    k: int,
    *,
    own: Int64[np.ndarray, " q"],
    farthest: bool = False,
) -> Ranking:
    """Rank all rows exactly: float32 finds slightly more candidates than needed, float64 ranks them.

    Vectors need not be normalised, and may be memory-mapped. Each query's `own` row, or -1 if it has none, is left out.

    Raises:
        ValueError: a vector is not finite.
    """
    ranking, sign = _empty(len(queries), k), -1 if farthest else 1
    unsure, most = list(range(len(queries))), len(vectors) - (own >= 0)
    for margin in MARGINS:
        signed = torch.from_numpy(sign * queries[unsure])
        found = nearest(vectors, signed, k + margin, own=torch.from_numpy(own[unsure]))
        if found.similarity.isnan().any():
            bad = int(found.index[found.similarity.isnan()][0])
            raise ValueError(f"the vector of a query or of row {bad} is not finite; embed again with a sound encoder")
        still = []
        for place, index, similarity in zip(unsure, found.index.numpy(), found.similarity.numpy(), strict=True):
            index = index[: most[place]]
            last = _rank(ranking, place, queries[place], vectors, index, sign)
            if len(index) < most[place] and sign * last - similarity[-1] < ROUNDING:
                still.append(place)
        unsure = still
        if not unsure:
            return ranking
    for place in unsure:
        rows = np.arange(len(vectors))
        _rank(ranking, place, queries[place], vectors, rows[rows != own[place]], sign)
    return ranking


def rank_candidates(
    vectors: np.ndarray,
    queries: Float32[np.ndarray, "q f"],
    k: int,
    *,
    own: Int64[np.ndarray, " q"],
    saved: Path | None,
) -> Ranking:
    """Rank the rows that a graph finds, which may miss some of the nearest; other arguments as in `rank_all`.

    The graph is read from the file `saved`, or built if there is none that fits; None: it is not kept.

    Raises:
        ImportError: usearch is not installed.
    """
    graph, count = _graph(vectors, saved), CANDIDATES * k + MARGINS[0]
    graph.expansion_search = max(64, 2 * count)
    found = graph.search(queries, min(count, len(vectors)), threads=torch.get_num_threads())
    ranking = _empty(len(queries), k)
    for place, query in enumerate(queries):
        keys = found.keys if len(queries) == 1 else found[place].keys  # one query is answered in another shape
        rows = keys.astype(np.int64)
        rows = rows[(rows >= 0) & (rows < len(vectors)) & (rows != own[place])]  # a damaged file may hold any number
        _rank(ranking, place, query, vectors, rows, 1)
    return ranking


def _graph(vectors: np.ndarray, saved: Path | None) -> Any:
    """Return the graph in a file, or build it, and keep it where there is a file and the folder can be written to."""
    try:
        from usearch.index import Index
    except ImportError:
        raise ImportError(f"approximate search needs an extra: run {install('ann')}") from None
    if saved and saved.is_file():
        with suppress(ValueError, RuntimeError):  # a damaged file
            index = Index.restore(saved, view=True)  # mapped, not read into memory
            if index is not None and (len(index), index.ndim) == vectors.shape:
                return index
    index, step = Index(ndim=vectors.shape[1], metric="cos", dtype=KIND), max(1, GRAPH_BLOCK // vectors.shape[1])
    for start in range(0, len(vectors), step):
        block = np.array(vectors[start : start + step])
        index.add(np.arange(start, start + len(block)), block, threads=torch.get_num_threads())
    if saved and os.access(saved.parent, os.W_OK):
        partial = saved.with_name(f".{saved.name}.{os.getpid()}.partial")
        try:
            index.save(partial)
            os.replace(partial, saved)
        finally:
            partial.unlink(missing_ok=True)
    return index


def _empty(queries: int, k: int) -> Ranking:
    return Ranking(np.full((queries, k), -1), np.full((queries, k), np.nan))


def _rank(
    ranking: Ranking, place: int, query: np.ndarray, vectors: np.ndarray, index: Int64[np.ndarray, " i"], sign: int
) -> float:
    """Fill in the answers to one query from some rows, and return the similarity of the last."""
    one, step, k = query.astype(np.float64), max(1, BLOCK // len(query)), ranking.rows.shape[1]
    rows, similarities = np.empty(0, np.int64), np.empty(0)
    for start in range(0, len(index), step):
        some = index[start : start + step]
        many = np.asarray(vectors[some], dtype=np.float64)
        # Row by row, so that equal rows are equal to the last bit; a matrix product does not promise that.
        cosine = np.einsum("nf,f->n", many, one)
        cosine /= np.maximum(np.linalg.norm(one) * np.linalg.norm(many, axis=1), 1e-300)
        rows, similarities = np.concatenate([rows, some]), np.concatenate([similarities, cosine])
        order = np.lexsort((rows, -sign * similarities))[:k]
        rows, similarities = rows[order], similarities[order]
    ranking.rows[place, : len(rows)], ranking.similarities[place, : len(rows)] = rows, similarities
    return float(similarities[-1]) if len(similarities) else np.nan
