"""Candidates for the nearest of very many vectors, by a graph that is walked instead of comparing all of them.

The graph is HNSW (Malkov and Yashunin 2016, arXiv:1603.09320) as usearch makes it.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64

BLOCK = 2**24
"""Numbers that are added at a time."""
KIND = "f16"
"""Of the numbers in the graph: half as large, and precise enough for candidates."""


def candidates(
    vectors: np.ndarray, queries: Float32[np.ndarray, "q f"], count: int, *, saved: Path | None
) -> Int64[np.ndarray, "q c"]:
    """Rows that are likely the nearest by cosine similarity, in no order; -1 where fewer were found.

    Args:
        vectors: `[n, f]`, of any lengths, maybe a mapped file.
        queries: what is asked about.
        count: how many of each.
        saved: file of the graph; made if it is not there, or not of so many such vectors. None: it is not kept.

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
        raise ImportError("approximate search needs an extra: pip install moco-ssl[ann]") from None
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
