"""Momentum contrast: a query encoder, a key encoder that follows it slowly, and the InfoNCE loss between their views.

v1 and v2 (He et al. 2020, arXiv:1911.05722; Chen et al. 2020, arXiv:2003.04297) draw their negatives from a queue of
older keys. v3 (Chen, Xie, He 2021, arXiv:2104.02057) has no queue: the other images of the batch are the negatives.

    out = model(view1, view2)
    out.loss.backward(); optimizer.step(); optimizer.zero_grad()
    model.update(out.keys, momentum=0.999)
"""

import copy
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from moco import dist

Images = Float[Tensor, "n c h w"]
Keys = Float[Tensor, "m d"]  # of all ranks
Ids = Int64[Tensor, " n"]


class Output(NamedTuple):
    """One forward pass. All but the loss is detached; nothing was read back to the host."""

    loss: Float[Tensor, ""]
    keys: Keys  # of all ranks and, if symmetric, of both views: what `update` enqueues
    ids: Int64[Tensor, " m"] | None  # the image that each key came from
    positive: Float[Tensor, ""]  # mean cosine similarity of a query and its key
    negative: Float[Tensor, ""]  # mean cosine similarity of a query and its negatives
    accuracy: Float[Tensor, ""]  # share of queries whose key is nearer than every negative


def normalize(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """To unit length, never below float32."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def info_nce(positive: Float[Tensor, " n"], negative: Float[Tensor, "n k"], temperature: float) -> Float[Tensor, ""]:
    """-log(e^(p/T) / (e^(p/T) + sum_k e^(n_k/T))), mean over queries, from cosine similarities (v1, equation 1)."""
    logits = torch.cat([positive[:, None], negative], dim=1) / temperature  # n 1+k
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


class KeyQueue(nn.Module):
    """A ring of the last `size` keys; starts as random unit vectors and takes any number of keys at once."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("keys", normalize(torch.randn(size, dim)))
        self.register_buffer("ids", torch.full((size,), -1))  # the image that each key came from; -1: unknown
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))  # the slot that is written next

    @torch.no_grad()
    def enqueue(self, keys: Keys, ids: Int64[Tensor, " m"] | None = None) -> None:
        size, new = len(self.keys), len(keys)
        kept = min(new, size)
        slots = (self.pointer + torch.arange(new - kept, new, device=keys.device)) % size
        self.keys.index_copy_(0, slots, keys[new - kept :].to(self.keys.dtype))
        self.ids.index_copy_(0, slots, self.ids.new_full((kept,), -1) if ids is None else ids[new - kept :])
        self.pointer.copy_((self.pointer + new) % size)


class MoCo(nn.Module, ABC):
    """What all versions share. `encoder` maps images to projections; the key encoder is a copy without gradient.

    `shuffle` permutes the images before the key encoder, and undoes it after, so that a query and its key share no
    batch-norm group: within the device, or across ranks (v1, section 3.3).
    """

    def __init__(
        self, encoder: nn.Module, *, temperature: float, symmetric: bool, shuffle: Literal["device", "ranks"] | None
    ):
        super().__init__()
        self.query_encoder = encoder
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.temperature, self.symmetric, self.shuffle = temperature, symmetric, shuffle

    def forward(
        self, view1: Images, view2: Images, *, ids: Ids | None = None, generator: torch.Generator | None = None
    ) -> Output:
        """Queries of `view1` against keys of `view2`; if symmetric also the reverse, and the sum of both losses.

        Moves neither queue nor key encoder. `ids` (which image each row is) keeps an image's own older keys out of its
        negatives. `generator` (on the CPU, equal on all ranks) draws the permutation of the key images.
        """
        pairs = [(view1, view2), (view2, view1)] if self.symmetric else [(view1, view2)]
        keys = [self._encode_keys(key_view, generator) for _, key_view in pairs]
        terms = [self._contrast(view, k, ids) for (view, _), k in zip(pairs, keys, strict=True)]
        loss, positive, negative, accuracy = (torch.stack(part) for part in zip(*terms, strict=True))
        key_ids = None if ids is None else dist.gather(ids).repeat(len(pairs))
        keys = torch.cat(keys[::-1])  # of view 1 first
        return Output(loss.sum(), keys, key_ids, positive.mean(), negative.mean(), accuracy.mean())

    @torch.no_grad()
    def update(self, keys: Keys, *, momentum: float, ids: Int64[Tensor, " m"] | None = None) -> None:
        """After the optimizer's step: key <- momentum * key + (1 - momentum) * query (v1, equation 2); keys enqueued."""
        followers, leaders = list(self.key_encoder.parameters()), list(self.query_encoder.parameters())
        torch._foreach_lerp_(followers, leaders, 1 - momentum)  # parameters only, one fused call
        self._enqueue(keys, ids)

    @torch.no_grad()
    def _encode_keys(self, view: Images, generator: torch.Generator | None) -> Keys:
        across = self.shuffle == "ranks"
        images = dist.gather(view) if across else view
        if self.shuffle is None:
            return dist.gather(normalize(self.key_encoder(images)))
        order = torch.randperm(len(images), generator=generator).to(images.device, non_blocking=True)
        keys = normalize(self.key_encoder(images[dist.local(order) if across else order]))
        keys = dist.gather(keys) if across else keys
        restored = torch.empty_like(keys).index_copy_(0, order, keys)
        return restored if across else dist.gather(restored)

    def _compare(self, query: Tensor, key: Tensor, others: Tensor, excluded: Bool[Tensor, "n k"] | None) -> tuple:
        with torch.autocast(query.device.type, enabled=False):  # similarities never below float32
            query = normalize(query)
            positive, negative = (query * key).sum(dim=1), query @ others.T.to(query.dtype)  # n, n k
            mean = (negative if excluded is None else negative[~excluded]).detach().mean()
            negative = negative if excluded is None else negative.masked_fill(excluded, float("-inf"))
            loss = info_nce(positive, negative, self.temperature)
        nearest = negative.detach().amax(dim=1)
        return loss, positive.detach().mean(), mean, (positive.detach() > nearest).float().mean()

    @abstractmethod
    def _contrast(self, view: Images, keys: Keys, ids: Ids | None) -> tuple: ...

    @abstractmethod
    def _enqueue(self, keys: Keys, ids: Ids | None) -> None: ...


class QueueMoCo(MoCo):
    """v1 and v2: one positive against K older keys. Which head and batch norm make v1 or v2: `moco.variants`."""

    def __init__(self, encoder: nn.Module, queue: KeyQueue, *, temperature: float, symmetric: bool, shuffle):
        super().__init__(encoder, temperature=temperature, symmetric=symmetric, shuffle=shuffle)
        self.queue = queue

    def _contrast(self, view, keys, ids):
        own = None if ids is None else ids[:, None] == self.queue.ids
        return self._compare(self.query_encoder(view), dist.local(keys), self.queue.keys, own)

    def _enqueue(self, keys, ids):
        self.queue.enqueue(keys, ids)


class BatchMoCo(MoCo):
    """v3: the keys of all other images in the batch are the negatives; a predictor on the queries; both directions."""

    def __init__(self, encoder: nn.Module, predictor: nn.Module, *, temperature: float):
        super().__init__(encoder, temperature=temperature, symmetric=True, shuffle=None)
        self.predictor = predictor

    def _contrast(self, view, keys, ids):
        numbers = torch.arange(len(keys), device=keys.device)
        own = dist.local(numbers)[:, None] == numbers
        loss, *watched = self._compare(self.predictor(self.query_encoder(view)), dist.local(keys), keys, own)
        return 2 * self.temperature * loss, *watched  # v3, algorithm 1

    def _enqueue(self, keys, ids):
        pass
