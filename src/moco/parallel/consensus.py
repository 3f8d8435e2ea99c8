"""What the processes of a run tell each other: agree, fail and stop together."""

import datetime
import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as torch_dist

from moco.parallel.collectives import rank, world_size

Answer = TypeVar("Answer")


_words: Any = None  # a group of the hosts, where tensors travel from GPU to GPU


def talk_apart(patience: datetime.timedelta) -> None:
    """From now on words travel from host to host, and no GPU is waited for; all ranks call it once they are connected.

    Args:
        patience: how long a rank waits for the word of another; for tensors it is what they were connected with.
    """
    global _words
    _words = None if torch_dist.get_backend() == "gloo" else torch_dist.new_group(backend="gloo", timeout=patience)


def agree(words: tuple[int, ...]) -> tuple[int, ...]:
    """The largest of all ranks' words at each place; the host waits for them."""
    if world_size() == 1:
        return words
    largest = torch.tensor(words)
    torch_dist.all_reduce(largest, op=torch_dist.ReduceOp.MAX, group=_words)
    return tuple(largest.tolist())


def everyone(text: str) -> list[str]:
    """What each rank says, by rank."""
    said: list[Any] = [text] * world_size()
    if world_size() > 1:
        torch_dist.all_gather_object(said, text, group=_words)
    return said


def union(names: Iterable[str]) -> set[str]:
    """Names that any rank gives."""
    return {name for said in everyone(json.dumps(sorted(names))) for name in json.loads(said)}


def fail_together(error: Exception | None) -> None:
    """All ranks stop for what went wrong on one of them; to be called by all, with None where nothing did.

    Raises:
        Exception: `error`, where there is one; elsewhere a ValueError that says on which rank, and what.
    """
    said = everyone("" if error is None else " ".join(str(error).split()) or type(error).__name__)
    if error is not None:
        raise error
    for number, text in enumerate(said):
        if text:
            raise ValueError(f"process {number} stopped: {text}")


def together(work: Callable[[], Answer]) -> Answer:
    """Done by every rank for itself; all stop if it fails on one, which the others would wait for.

    Raises:
        Exception: that of `work`; on the other ranks as in `fail_together`.
    """
    try:
        answer, error = work(), None
    except Exception as caught:
        answer, error = None, caught
    fail_together(error)
    return cast(Answer, answer)


def first(work: Callable[[], Answer]) -> Answer:
    """Done by rank 0 alone; the answer on all ranks, which wait for it.

    Raises:
        Exception: that of `work`; on the other ranks a RuntimeError with its text.
    """
    if world_size() == 1:
        return work()
    answer: list[Any] = [None, ""]
    error: Exception | None = None
    if rank() == 0:
        try:
            answer[0] = work()
        except Exception as caught:
            error, answer[1] = caught, " ".join(str(caught).split()) or type(caught).__name__
    torch_dist.broadcast_object_list(answer, src=0, group=_words)
    if error is not None:
        raise error
    if answer[1]:
        raise RuntimeError(f"process 0 stopped: {answer[1]}")
    return answer[0]
