"""Measures exact search in a table on disk against float64, and adds a row to results/search.csv.

uv run python benchmarks/search.py --rows 100000 --columns 512 --queries 100 --k 20
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import rows
from moco.embeddings.search import Queries, answer
from moco.embeddings.table import Embeddings


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.npy"
        # As features behind a ReLU are: none below 0, alike in the mean.
        made = np.random.default_rng(0).normal(0.5, 1, (options.rows, options.columns)).clip(0).astype(np.float32)
        np.save(path, made)
        table = Embeddings(np.load(path, mmap_mode="r"), tuple(map(str, range(options.rows))), None, None)
        asked_rows = np.linspace(0, options.rows - 1, options.queries).astype(np.int64)
        names = tuple(table.paths[row] for row in asked_rows)
        queries = Queries(names, made[asked_rows], asked_rows, {})
        seconds = []
        for _ in range(options.rounds):
            began = time.perf_counter()
            found = answer(table, queries, k=options.k)
            seconds.append(time.perf_counter() - began)
    right = sum(set(found.rows[place]) == reference(made, row, options.k) for place, row in enumerate(asked_rows))
    row = rows.where() | {
        "rows": options.rows,
        "columns": options.columns,
        "queries": options.queries,
        "k": options.k,
        "threads": options.threads,
        "rounds": options.rounds,
        "seconds": round(float(np.median(seconds)), 3),
        "equal_to_float64": right,
    }
    rows.append("search", row)
    print(f"{row['seconds']} s; {right} of {options.queries} queries answered as by float64")


def reference(vectors: np.ndarray, row: int, k: int) -> set[int]:
    """The k most similar, every step in float64."""
    one, similarity = vectors[row].astype(np.float64), np.empty(len(vectors))
    for start in range(0, len(vectors), 10_000):
        block = vectors[start : start + 10_000].astype(np.float64)
        similarity[start : start + 10_000] = block @ one / np.linalg.norm(block, axis=1)
    similarity[row] = -np.inf
    return set(np.argpartition(-similarity, k)[:k])


if __name__ == "__main__":
    main()
