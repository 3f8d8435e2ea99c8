"""What the processes of a run tell each other: agree, fail and stop together."""

import datetime
import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as torch_dist

from moco.parallel.collectives import rank, world_size

Answer = TypeVar("Answer")


_words: Any = None  # a group of the hosts, if tensors travel from GPU to GPU


def talk_apart(patience: datetime.timedelta) -> None:
    """Send messages from host to host from now on, so that none waits for a GPU; all processes call this.

    Args:
        patience: how long a process waits for the message of another.
    """
    global _words
    _words = None if torch_dist.get_backend() == "gloo" else torch_dist.new_group(backend="gloo", timeout=patience)


def agree(words: tuple[int, ...]) -> tuple[int, ...]:
    """Return the largest of all processes' words at each place; the host waits for them."""
    if world_size() == 1:
        return words
    largest = torch.tensor(words)
    torch_dist.all_reduce(largest, op=torch_dist.ReduceOp.MAX, group=_words)
    return tuple(largest.tolist())


def everyone(text: str) -> list[str]:
    """Return the text of each process, by rank."""
    said: list[Any] = [text] * world_size()
    if world_size() > 1:
        torch_dist.all_gather_object(said, text, group=_words)
    return said


def union(names: Iterable[str]) -> set[str]:
    """Return the names that any process gives."""
    return {name for said in everyone(json.dumps(sorted(names))) for name in json.loads(said)}


def fail_together(error: Exception | None) -> None:
    """Raise an error in all processes if there is one in any; all call this, with None where nothing failed.

    Raises:
        Exception: `error`, where it is given; elsewhere a ValueError that names the process and the error.
    """
    said = everyone("" if error is None else " ".join(str(error).split()) or type(error).__name__)
    if error is not None:
        raise error
    for number, text in enumerate(said):
        if text:
            raise ValueError(f"process {number} stopped: {text}")


def together(work: Callable[[], Answer]) -> Answer:
    """Let every process do some work; if it fails in one, all fail, because they would wait for that one.

    Raises:
        Exception: that of `work`; in the other processes as in `fail_together`.
    """
    try:
        answer, error = work(), None
    except Exception as caught:
        answer, error = None, caught
    fail_together(error)
    return cast(Answer, answer)


def first(work: Callable[[], Answer]) -> Answer:
    """Let rank 0 alone do some work; return its answer in all processes, which wait for it.

    Raises:
        Exception: that of `work`; in the other processes a RuntimeError with its text.
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
