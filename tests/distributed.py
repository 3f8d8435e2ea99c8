"""Two processes, or more, that talk over gloo and run what a test asks of them: `pair(function, argument)`.

`function` stands at the top level of the test module; it returns tensors and plain values.
"""

import importlib
import io
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SECONDS = 120


class Pair:
    """The processes, kept for all tests of a module: each start costs seconds.

    Args:
        folder: an empty one, where they meet.
        module: name of the test module that the functions come from.
        world: how many processes.
    """

    def __init__(self, folder: Path, module: str, world: int = 2):
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(world)]
        self._connections = [ours for ours, _ in pipes]
        theirs = [theirs for _, theirs in pipes]
        self._process = context.Process(target=_start, args=(module, str(folder / "store"), theirs))
        self._process.start()
        for connection in theirs:
            connection.close()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function` returned in each process.

        Raises:
            RuntimeError: it failed in one of them, or took too long.
        """
        for connection in self._connections:
            connection.send((function, arguments))
        answers = []
        for connection in self._connections:
            answers.append(connection.recv() if connection.poll(SECONDS) else (f"no answer in {SECONDS} s", b""))
        failures = "\n".join(f"in process {rank}: {failure}" for rank, (failure, _) in enumerate(answers) if failure)
        if failures:
            raise RuntimeError(failures)
        return [torch.load(io.BytesIO(answer), weights_only=True) for _, answer in answers]

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


class Payload(TorchDispatchMode):
    """What this rank hands to collectives: c10d's own operators, those that DDP calls from C++ too."""

    HANDED = {"allreduce_": 0, "broadcast_": 0, "allgather_": 1, "_allgather_base_": 1, "alltoall_base_": 1}

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            given = args[self.HANDED[name]]  # another operator than these is an error
            tensors = [given] if isinstance(given, Tensor) else given
            self.calls.append((name, sum(each.numel() * each.element_size() for each in tensors)))
        return func(*args, **(kwargs or {}))


def _start(module: str, store: str, connections: list[Connection]) -> None:
    """Imports everything once, then becomes as many processes as there are connections."""
    from jaxtyping import install_import_hook

    # As in conftest.py, and before the test module imports the package.
    install_import_hook("moco", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
    importlib.import_module(module)
    importlib.import_module("moco.parallel.fabric")
    world = len(connections)
    rank = next((rank for rank in range(1, world) if os.fork() == 0), 0)
    for other in {*range(world)} - {rank}:
        connections[other].close()
    _serve(rank, world, store, connections[rank])
    if rank:
        os._exit(0)
    for _ in range(1, world):
        os.wait()


def _serve(rank: int, world: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=SECONDS // 2)
    torch.distributed.init_process_group(
        "gloo", init_method=Path(store).as_uri(), rank=rank, world_size=world, timeout=patience
    )
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            break
        answer, failure = io.BytesIO(), ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                torch.save(function(*arguments), answer)
        except Exception:
            failure = traceback.format_exc()
        connection.send((failure, answer.getvalue()))
    torch.distributed.destroy_process_group()
