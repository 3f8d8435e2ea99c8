"""Collectives that are the identity on one process.

The order of a global batch is interleaved: image `i` of rank `r` is number `i * world_size + r`. Taking every s-th
image of the global batch as a batch-norm group then means the same on one process and on many.
"""

from collections.abc import Callable

import torch
import torch.distributed as torch_dist
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from moco.parallel.launch import launched


def world_size() -> int:
    return torch_dist.get_world_size() if torch_dist.is_available() and torch_dist.is_initialized() else 1


def rank() -> int:
    return torch_dist.get_rank() if torch_dist.is_available() and torch_dist.is_initialized() else 0


def on_this_machine() -> int:
    """Return the number of processes that share the cores this one may use."""
    return launched().per_node or world_size()


def gather(x: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
    """Return the global batch, in its interleaved order; all ranks give equally many rows. No gradient flows."""
    world = world_size()
    if world == 1:
        return x.detach()
    rows = x.new_empty(world * len(x), *x.shape[1:])  # one tensor: as many as there are ranks would keep the host busy
    torch_dist.all_gather_into_tensor(rows, x.detach().contiguous())
    return rows.unflatten(0, (world, len(x))).transpose(0, 1).flatten(0, 1)


def gather_through(x: Shaped[Tensor, "n ..."], device: torch.device) -> Shaped[Tensor, "m ..."]:
    """Gather rows that lie anywhere; they travel through `device`, this rank's, if the backend takes no CPU tensors."""
    over_cpu = world_size() == 1 or torch_dist.get_backend() == "gloo"
    return gather(x.cpu() if over_cpu else x.to(device)).to(x.device)


def local(x: Shaped[Tensor, "m ..."]) -> Shaped[Tensor, "n ..."]:
    """Return this rank's rows of a global batch."""
    return x[rank() :: world_size()]


def permutation(n: int, device: torch.device, generator: torch.Generator | None) -> Int64[Tensor, " n"]:
    """Return a random order, the same on all ranks: from a generator that is the same there, or else rank 0's."""
    order = torch.randperm(n, generator=generator).to(device, non_blocking=True)
    if generator is None and world_size() > 1:
        torch_dist.broadcast(order, src=0)
    return order


def global_permutation(n: int, device: torch.device, generator: torch.Generator | None) -> Int64[Tensor, " n"]:
    """Return a permutation on the CPU, for `exchange`; given a generator, the host does not wait for the device."""
    return permutation(n, torch.device("cpu") if generator else device, generator).cpu()


def exchange(x: Shaped[Tensor, "n ..."], order: Int64[Tensor, " m"], *, back: bool = False) -> Shaped[Tensor, "n ..."]:
    """Return this rank's rows of the global batch in another order, sending each rank only the rows it needs.

    `gather` sends all rows to all ranks; with 64 ranks, that is 64 times as much. `back` undoes it:
    `exchange(exchange(x, order), order, back=True)` is `x`. No gradient flows through.

    Args:
        x: rows of this rank; every rank gives equally many.
        order: on the CPU and the same on all ranks; row p of the new global batch is row `order[p]` of the old.
        back: from the new order to the old.
    """
    here, world, x = rank(), world_size(), x.detach()
    order = order.argsort() if back else order
    if world == 1:
        return x[order.to(x.device, non_blocking=True)]
    # Row j lives on rank j mod world, there at j // world. What travels is ordered by rank, then by its new place.
    places = (order % world == here).nonzero().flatten()  # of this rank's rows in the new batch
    to, sources = places % world, order[here::world] % world
    leaving = order[places[to.argsort(stable=True)]] // world
    arriving = sources.argsort(stable=True)
    travelled = x.new_empty(x.shape)
    torch_dist.all_to_all_single(
        travelled,
        x[leaving.to(x.device, non_blocking=True)].contiguous(),
        output_split_sizes=sources.bincount(minlength=world).tolist(),
        input_split_sizes=to.bincount(minlength=world).tolist(),
    )
    return torch.empty_like(x).index_copy_(0, arriving.to(x.device, non_blocking=True), travelled)


def in_shares(
    work: Callable[[range], Float[Tensor, "n f"]],
    total: int,
    width: int,
    *,
    at_once: int,
    device: torch.device,
    room: Callable[[int, int], Tensor] = torch.empty,
) -> Float[Tensor, "m f"]:
    """Divide work that makes rows among the ranks; return all rows on all of them, on the CPU.

    Each rank takes some neighbouring batches, the same that one process would form, so that the result is the same to
    the last bit.

    Args:
        work: makes float32 rows for a range of numbers, at least one; called with this rank's.
        total: rows in all.
        width: length of a row.
        at_once: rows in a batch of `work`; as many travel together.
        device: this rank's; rows travel through it if the backend takes none on the CPU.
        room: makes the tensor for all rows, from their number and width.
    """
    world = world_size()
    if world == 1:
        return work(range(total))
    each = -(-total // (at_once * world)) * at_once
    own = range(min(total, rank() * each), min(total, (rank() + 1) * each))
    out = room(total, width)  # before the work: it may not fit
    rows = work(own) if own else torch.empty(0, width)
    for at in range(0, each, at_once):
        block = torch.zeros(at_once, width)
        block[: max(0, len(rows) - at)] = rows[at : at + at_once]
        for number, part in enumerate(gather_through(block, device).unflatten(0, (at_once, world)).unbind(1)):
            start = min(total, number * each + at)
            stop = min(total, start + at_once)
            out[start:stop] = part[: stop - start]
    return out


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
