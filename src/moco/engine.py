"""EngineConfig -> Lightning Fabric: devices, nodes, precision; and the signals that stop a run in good order."""

import inspect
import logging
import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import ACCELERATOR_REGISTRY
from lightning_fabric.loggers import TensorBoardLogger
from lightning_fabric.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from moco import dist
from moco.config import EngineConfig

Precision = Literal["fp32", "bf16", "fp64"]
_FABRIC_PRECISION: dict[str, Literal["32-true", "bf16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    # The loop casts weights and views; Fabric's own 64-true would bring keys and loss back to float32.
    "fp64": "32-true",
}
ASK_EVERY = 10
"""Steps between two questions among ranks whether one of them was told to stop."""


class Stopped(Exception):
    """The run was told to stop; everything is saved.

    Args:
        signum: the signal that told it.
        path: the folder of the run.
    """

    def __init__(self, signum: int, path: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name}; {path} is saved")
        self.signum, self.path = signum, path


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 natively (AMX or AVX512_BF16 on x86, BF16 on Arm)."""
    try:
        flags = Path("/proc/cpuinfo").read_text().lower().split()
    except OSError:
        return False
    return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(flags)


def choose_accelerator(name: str) -> str:
    """`auto`, resolved to the fastest that is there."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def choose_precision(accelerator: str) -> Precision:
    """bf16 where the hardware has it: 2 to 3 times fp32's speed, same exponent range, weights stay fp32."""
    accelerator = choose_accelerator(accelerator)
    if accelerator == "cpu":
        return "bf16" if cpu_has_bf16() else "fp32"
    if accelerator in ("cuda", "gpu"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "fp32"


def resolve(config: EngineConfig) -> EngineConfig:
    """The same with every choice made, as it is stored in the run: a resumed run must make the same ones.

    Raises:
        ValueError: an accelerator that is not here.
    """
    accelerator = choose_accelerator(config.accelerator)
    known = [*ACCELERATOR_REGISTRY.available_accelerators(), "gpu"]
    if accelerator not in known:
        raise ValueError(f"engine.accelerator is {accelerator!r}; expected one of {', '.join(sorted(known))}, or auto")
    if accelerator in ("cuda", "gpu") and not torch.cuda.is_available():
        raise ValueError(
            "engine.accelerator is 'cuda', but torch sees no CUDA device here; use --engine.accelerator cpu"
        )
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ValueError("engine.accelerator is 'mps', but this is no Apple GPU; use --engine.accelerator cpu")
    precision = choose_precision(accelerator) if config.precision == "auto" else config.precision
    layout = precision == "bf16" if config.channels_last is None else config.channels_last
    threads = config.threads or torch.get_num_threads()
    return config.model_copy(
        update={"accelerator": accelerator, "precision": precision, "channels_last": layout, "threads": threads}
    )


def build_fabric(config: EngineConfig, loggers: tuple[str, ...], folder: Path) -> Fabric:
    """Devices, processes, precision and loggers, launched.

    Args:
        config: resolved.
        loggers: names of loggers besides metrics.csv.
        folder: of the run, where loggers write.
    """
    torch.set_num_threads(config.threads or torch.get_num_threads())
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    devices = 1 if config.accelerator == "cpu" and config.devices == "auto" else config.devices
    several = config.nodes > 1 or devices != 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1
    with _fabric_unheard():
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=devices,
            num_nodes=config.nodes,
            strategy=DDPStrategy(**ddp_options()) if several else "auto",
            precision=_FABRIC_PRECISION[config.precision],
            loggers=[TensorBoardLogger(folder, name="tensorboard", version="") for _ in loggers],
        )
    fabric.launch()
    return fabric


def ddp_options() -> dict[str, Any]:
    """No buffers at each step: all ranks hold the same queue, and sending it costs 33 MB at K = 65,536."""
    # Older torch knows one name only, and newer deprecates it.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if renamed else "broadcast_buffers": False}


@contextmanager
def _fabric_unheard() -> Generator[None]:
    """Without its remarks on stderr, where a command says what it has to say in words of its own."""
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


class StopSignal:
    """SIGTERM and Ctrl-C set a flag that all ranks agree on every few steps; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # ty: ignore[invalid-argument-type]

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum

    def agreed(self, step: int, *, due: bool, device: torch.device) -> tuple[int, bool]:
        """The signal to stop for (0: none) and whether a checkpoint is due, the same on all ranks.

        The other ranks are asked only every few steps: each question is one word, and makes the host wait.
        """
        if dist.world_size() == 1:
            return self.received, due
        if step % ASK_EVERY:
            return 0, False
        words = torch.tensor([self.received, int(due)], device=device)
        torch.distributed.all_reduce(words, op=torch.distributed.ReduceOp.MAX)
        return int(words[0]), bool(words[1])
