"""Find exact nearest neighbours by cosine similarity, block by block, so that the vectors can stay on disk."""

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

    def merged(self, similarity: Float[Tensor, "q b"], start: int, k: int) -> "Nearest":
        """Return the k nearest of these and of another block of the bank, which starts at `start`."""
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
    for start in range(0, len(bank), rows):
        block = unit(bank[start : start + rows], like=queries)
        for number, part in enumerate(parts):
            similarity = part @ block.T
            if owns is not None:
                place = owns[number] - start
                inside = ((place >= 0) & (place < similarity.shape[1])).nonzero()[:, 0]
                similarity[inside, place[inside]] = -torch.inf
            found[number] = found[number].merged(similarity, start, k)
    return Nearest(torch.cat([each.similarity for each in found]), torch.cat([each.index for each in found]))


def unit(vectors: Vectors, *, like: Tensor | None = None) -> Float[Tensor, "n f"]:
    """Return vectors normalised to length 1, of the type and on the device of `like`, or as float32 on the CPU."""
    # A copy of a mapped array, because torch warns about read-only memory.
    tensor = torch.from_numpy(np.array(vectors)) if isinstance(vectors, np.ndarray) else vectors
    return F.normalize(tensor.to(torch.empty(0) if like is None else like), dim=1)
