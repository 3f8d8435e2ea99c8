"""Momentum contrast: a query encoder, a key encoder that follows it slowly, and the InfoNCE loss between their views.

v1 and v2 (He et al. 2020, arXiv:1911.05722; Chen et al. 2020, arXiv:2003.04297) draw their negatives from a queue of
older keys. v3 (Chen, Xie, He 2021, arXiv:2104.02057) has no queue: the other images of the batch are the negatives.
A step: `out = model(view1, view2)`, `out.loss.backward()`, optimizer, `model.update(out.keys, momentum=0.999)`.
"""

import copy
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from moco.parallel import collectives

Images = Float[Tensor, "n c h w"]
Keys = Float[Tensor, "m d"]  # of all ranks
Ids = Int64[Tensor, " _"]  # which image of the dataset each row is
Scalar = Float[Tensor, ""]
Shuffle = Literal["device", "ranks"] | None


class Output(NamedTuple):
    """One forward pass. All but the loss is detached; nothing was read back to the host."""

    loss: Scalar
    keys: Keys  # of all ranks and, if symmetric, of both views: what `update` enqueues
    ids: Ids | None  # the image that each key came from
    positive: Scalar  # mean cosine similarity of a query and its key
    negative: Scalar  # mean cosine similarity of a query and its negatives
    accuracy: Scalar  # share of queries whose key is nearer than every negative


def normalize(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """To unit length, never below float32."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def info_nce(positive: Float[Tensor, " n"], negative: Float[Tensor, "n k"], temperature: float) -> Scalar:
    """-log(e^(p/T) / (e^(p/T) + sum_k e^(n_k/T))), mean over queries, from cosine similarities (v1, equation 1)."""
    logits = torch.cat([positive[:, None], negative], dim=1) / temperature  # n 1+k
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


class KeyQueue(nn.Module):
    """A ring of the last `size` keys; starts as random unit vectors and takes any number of keys at once."""

    keys: Tensor
    ids: Tensor  # the image that each key came from; -1: unknown
    pointer: Tensor  # the slot that is written next

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("keys", normalize(torch.randn(size, dim)))
        self.register_buffer("ids", torch.full((size,), -1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Keys, ids: Ids | None = None) -> None:
        size, new = len(self.keys), len(keys)
        kept = min(new, size)
        slots = (self.pointer + torch.arange(new - kept, new, device=keys.device)) % size
        self.keys.index_copy_(0, slots, keys[new - kept :].to(self.keys.dtype))
        self.ids.index_copy_(0, slots, self.ids.new_full((kept,), -1) if ids is None else ids[new - kept :])
        self.pointer.copy_((self.pointer + new) % size)


class MoCo(nn.Module, ABC):
    """What all versions share. `encoder`: images -> projections; `symmetric`: also view 2 against keys of view 1.

    `shuffle`: a query and its key shall share no batch-norm group, on the device or across ranks (v1, section 3.3).
    """

    def __init__(
        self, encoder: nn.Module, queue: KeyQueue | None, temperature: float, symmetric: bool, shuffle: Shuffle
    ):
        super().__init__()
        self.query_encoder, self.key_encoder = encoder, copy.deepcopy(encoder).requires_grad_(False)
        self.queue, self.temperature, self.symmetric, self.shuffle = queue, temperature, symmetric, shuffle

    def forward(
        self, view1: Images, view2: Images, *, ids: Ids | None = None, generator: torch.Generator | None = None
    ) -> Output:
        """Compute loss and keys. `ids` spare an image's older keys; `generator` (CPU, equal on all ranks) shuffles."""
        pairs = [(view1, view2), (view2, view1)] if self.symmetric else [(view1, view2)]
        keys = [self._encode_keys(key_view, generator) for _, key_view in pairs]
        terms = [self._contrast(view, k, ids) for (view, _), k in zip(pairs, keys, strict=True)]
        loss, positive, negative, accuracy = (torch.stack(part) for part in zip(*terms, strict=True))
        key_ids = None if ids is None else collectives.gather(ids).repeat(len(pairs))
        return Output(loss.sum(), torch.cat(keys[::-1]), key_ids, positive.mean(), negative.mean(), accuracy.mean())

    @torch.no_grad()
    def update(self, keys: Keys, *, momentum: float, ids: Ids | None = None) -> None:
        """After the optimizer's step. Parameters: key <- momentum * key + (1 - momentum) * query (v1, equation 2)."""
        torch._foreach_lerp_([*self.key_encoder.parameters()], [*self.query_encoder.parameters()], 1 - momentum)
        if self.queue is not None:
            self.queue.enqueue(keys, ids)

    @torch.no_grad()
    def _encode_keys(self, view: Images, generator: torch.Generator | None) -> Keys:
        if self.shuffle is None:
            return collectives.gather(normalize(self.key_encoder(view)))
        if self.shuffle == "device":
            order = collectives.permutation(len(view), view.device, generator)
            keys = normalize(self.key_encoder(view[order]))
            return collectives.gather(torch.empty_like(keys).index_copy_(0, order, keys))
        order = collectives.global_permutation(len(view) * collectives.world_size(), view.device, generator)
        keys = collectives.gather(normalize(self.key_encoder(collectives.exchange(view, order))))
        return torch.empty_like(keys).index_copy_(0, order.to(keys.device, non_blocking=True), keys)

    def _compare(self, query: Tensor, key: Tensor, others: Tensor, excluded: Bool[Tensor, "n k"] | None) -> tuple:
        with torch.autocast(query.device.type, enabled=False):  # similarities never below float32
            query = normalize(query)
            positive, negative = (query * key).sum(dim=1), query @ others.T.to(query.dtype)  # n, n k
            mean = negative.detach().mean()
            if excluded is not None:
                mean = negative.detach().masked_fill(excluded, 0).sum() / (~excluded).sum()
                negative = negative.masked_fill(excluded, float("-inf"))
            loss = info_nce(positive, negative, self.temperature)
        hits = positive.detach() > negative.detach().amax(dim=1)
        return loss, positive.detach().mean(), mean, hits.to(mean.dtype).mean()

    @abstractmethod
    def _contrast(self, view: Images, keys: Keys, ids: Ids | None) -> tuple: ...


class QueueMoCo(MoCo):
    """v1 and v2: one positive against K older keys. Which head and batch norm make v1 or v2: `variants.py`."""

    queue: KeyQueue

    def _contrast(self, view: Images, keys: Keys, ids: Ids | None) -> tuple:
        own = None if ids is None else ids[:, None] == self.queue.ids
        return self._compare(self.query_encoder(view), collectives.local(keys), self.queue.keys, own)


class BatchMoCo(MoCo):
    """v3: the keys of all other images in the batch are the negatives; a predictor on the queries; both directions."""

    def __init__(self, encoder: nn.Module, predictor: nn.Module, temperature: float):
        super().__init__(encoder, None, temperature, symmetric=True, shuffle=None)
        self.predictor = predictor

    def _contrast(self, view: Images, keys: Keys, ids: Ids | None) -> tuple:
        own = collectives.local(row := torch.arange(len(keys), device=keys.device))[:, None] == row  # n m: not m m
        loss, *watched = self._compare(self.predictor(self.query_encoder(view)), collectives.local(keys), keys, own)
        return 2 * self.temperature * loss, *watched  # v3, algorithm 1
