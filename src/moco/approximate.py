"""Candidates for the nearest of very many vectors, found with a graph instead of comparing all of them.

The graph is HNSW (Malkov and Yashunin 2016, arXiv:1603.09320), built by usearch.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64

from moco.explain import install

BLOCK = 2**24
"""Values added at a time."""
KIND = "f16"
"""Type of the values in the graph: half the size, and precise enough for candidates."""


def candidates(
    vectors: np.ndarray, queries: Float32[np.ndarray, "q f"], count: int, *, saved: Path | None
) -> Int64[np.ndarray, "q c"]:
    """Rows that are probably the nearest by cosine similarity, in no particular order, padded with -1.

    Args:
        vectors: `[n, f]`, not necessarily normalised; may be memory-mapped.
        queries: features of the queries.
        count: number of candidates per query.
        saved: file of the graph; built if it does not exist or has another shape. None: it is not kept.

    Raises:
        ImportError: usearch is not installed.
    """
    index = _graph(vectors, saved)
    index.expansion_search = max(64, 2 * count)
    count = min(count, len(vectors))
    found = index.search(queries, count, threads=torch.get_num_threads())
    rows = np.full((len(queries), count), -1)
    for place in range(len(queries)):
        keys = found.keys if len(queries) == 1 else found[place].keys  # one query is answered in another shape
        rows[place, : len(keys)] = keys
    return np.where(rows < len(vectors), rows, -1)  # a damaged file may hold any number


def _graph(vectors: np.ndarray, saved: Path | None) -> Any:
    try:
        from usearch.index import Index
    except ImportError:
        raise ImportError(f"approximate search needs an extra: run {install('ann')}") from None
    if saved and saved.is_file():
        try:
            index = Index.restore(saved, view=True)  # mapped, not read into memory
        except (ValueError, RuntimeError):
            index = None
        if index is not None and (len(index), index.ndim) == vectors.shape:
            return index
    index, step = Index(ndim=vectors.shape[1], metric="cos", dtype=KIND), max(1, BLOCK // vectors.shape[1])
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
