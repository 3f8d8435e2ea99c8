"""Collectives that are the identity on one process.

The order of a global batch is interleaved: image `i` of rank `r` is number `i * world_size + r`. Taking every s-th
image of the global batch as a batch-norm group then means the same on one process and on many.
"""

import torch
import torch.distributed as torch_dist
from jaxtyping import Int64, Shaped
from torch import Tensor


def world_size() -> int:
    return torch_dist.get_world_size() if torch_dist.is_available() and torch_dist.is_initialized() else 1


def rank() -> int:
    return torch_dist.get_rank() if torch_dist.is_available() and torch_dist.is_initialized() else 0


def gather(x: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
    """The global batch, in its interleaved order; every rank gives equally many rows. No gradient flows through."""
    world = world_size()
    if world == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
    torch_dist.all_gather(parts, x.detach().contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def local(x: Shaped[Tensor, "m ..."]) -> Shaped[Tensor, "n ..."]:
    """This rank's rows of a global batch."""
    return x[rank() :: world_size()]


def permutation(n: int, device: torch.device, generator: torch.Generator | None) -> Int64[Tensor, " n"]:
    """A random order, the same on all ranks: from a generator that is the same there, else rank 0's."""
    order = torch.randperm(n, generator=generator).to(device, non_blocking=True)
    if generator is None and world_size() > 1:
        torch_dist.broadcast(order, src=0)
    return order


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        torch_dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        torch_dist.all_reduce(grad)
        return grad


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks; differentiable, on any device and dtype."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)
