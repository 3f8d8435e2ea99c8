"""Exact nearest neighbours by cosine similarity, block by block, so that the vectors can stay on disk."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

Vectors = Float[Tensor, "n f"] | np.ndarray
"""In memory, or a memory-mapped array `[n, f]`."""

AT_ONCE = 1024, 2**26
"""Queries compared with a block of the bank at a time; values in a block, and in its similarities to them."""


class Nearest(NamedTuple):
    """Nearest vectors of each query, most similar first."""

    similarity: Float[Tensor, "q k"]
    index: Int64[Tensor, "q k"]

    def joined(self, similarity: Float[Tensor, "q b"], start: int, k: int) -> "Nearest":
        """Merge with the k nearest of another block of the bank, which starts at `start`."""
        found, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
        found, index = torch.cat([self.similarity, found], dim=1), torch.cat([self.index, index + start], dim=1)
        found, order = found.topk(min(k, found.shape[1]), dim=1)
        return Nearest(found, index.gather(1, order))


@torch.inference_mode()
def nearest(
    bank: Vectors,
    queries: Float[Tensor, "q f"],
    k: int,
    *,
    own: Int64[Tensor, " q"] | None = None,
    at_once: tuple[int, int] = AT_ONCE,
) -> Nearest:
    """Find the k most similar vectors of the bank, which is read once, and never held in memory if it is mapped.

    The computation runs on the device of the queries, in their precision.

    Args:
        bank: vectors to search, not necessarily normalised, like the queries: similarity is the cosine.
        queries: vectors to search for.
        k: number of neighbours per query; fewer if there are fewer.
        own: the query's own row in the bank, which is left out; -1 if it has none.
        at_once: queries compared with a block at a time, and values in a block and in its similarities.
    """
    parts, owns = F.normalize(queries, dim=1).split(at_once[0]), None if own is None else own.split(at_once[0])
    k = min(k, len(bank))
    index = torch.empty(0, dtype=torch.long, device=queries.device)
    found = [Nearest(part.new_empty(len(part), 0), index.new_empty(len(part), 0)) for part in parts]
    rows = max(1, at_once[1] // max(queries.shape[1], at_once[0]))
    for start, block in unit_blocks(bank, rows, like=queries):
        for number, part in enumerate(parts):
            similarity = part @ block.T
            if owns is not None:
                _leave_out(similarity, owns[number] - start)
            found[number] = found[number].joined(similarity, start, k)
    return Nearest(torch.cat([each.similarity for each in found]), torch.cat([each.index for each in found]))


def unit_blocks(bank: Vectors, rows: int, *, like: Tensor) -> Iterator[tuple[int, Float[Tensor, "b f"]]]:
    """Yield the bank in blocks of `rows` rows, normalised to length 1, each with the number of its first row."""
    for start in range(0, len(bank), rows):
        yield start, unit_block(bank, start, rows, like=like)


def unit_block(bank: Vectors, start: int, rows: int, *, like: Tensor) -> Float[Tensor, "b f"]:
    block = bank[start : start + rows]
    # A copy of a mapped block, because torch warns about read-only memory.
    block = torch.from_numpy(np.array(block)) if isinstance(block, np.ndarray) else block
    return F.normalize(block.to(like), dim=1)


def _leave_out(similarity: Float[Tensor, "q b"], place: Int64[Tensor, " q"]) -> None:
    inside = ((place >= 0) & (place < similarity.shape[1])).nonzero()[:, 0]
    similarity[inside, place[inside]] = -torch.inf
