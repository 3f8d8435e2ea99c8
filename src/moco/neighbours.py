"""The nearest of many vectors by cosine similarity: exact, block by block, so that the vectors may lie on disk."""

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
"""Queries that a block of the bank is compared to at a time; numbers of a block, and of its similarities to them."""


class Nearest(NamedTuple):
    """Of each query, the most similar first."""

    similarity: Float[Tensor, "q k"]
    index: Int64[Tensor, "q k"]

    def joined(self, similarity: Float[Tensor, "q b"], start: int, k: int) -> "Nearest":
        """With the k nearest of another block of the bank, which begins at `start`."""
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
    """The k most similar of the bank, which is read once and never in memory as a whole if it is a mapped array.

    The work is done where the queries are, in their precision.

    Args:
        bank: of any lengths, as the queries: similarity is the cosine.
        queries: what is asked about.
        k: how many; fewer if there are fewer.
        own: the row of the bank that each query itself is, which is left out; -1: none.
        at_once: queries that a block is compared to, and numbers of a block and of its similarities.
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
    """The bank in blocks of so many rows, each brought to length 1, with the number of its first row."""
    for start in range(0, len(bank), rows):
        yield start, unit_block(bank, start, rows, like=like)


def unit_block(bank: Vectors, start: int, rows: int, *, like: Tensor) -> Float[Tensor, "b f"]:
    block = bank[start : start + rows]
    # A copy of a mapped block, for torch warns of memory that it must not write to.
    block = torch.from_numpy(np.array(block)) if isinstance(block, np.ndarray) else block
    return F.normalize(block.to(like), dim=1)


def _leave_out(similarity: Float[Tensor, "q b"], place: Int64[Tensor, " q"]) -> None:
    inside = ((place >= 0) & (place < similarity.shape[1])).nonzero()[:, 0]
    similarity[inside, place[inside]] = -torch.inf
