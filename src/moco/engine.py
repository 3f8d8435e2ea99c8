"""EngineConfig -> Lightning Fabric: devices, nodes, precision; and how a run of several processes stops as one."""

import datetime
import inspect
import logging
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import ACCELERATOR_REGISTRY
from lightning_fabric.loggers import TensorBoardLogger
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from moco import dist
from moco.allocator import keep_freed_memory
from moco.config import EngineConfig
from moco.launch import Launch, check_started, launched, sharing_cores

Precision = Literal["fp32", "bf16", "fp64"]
_FABRIC_PRECISION: dict[str, Literal["32-true", "bf16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    # The loop casts weights and views; Fabric's own 64-true would convert keys and loss back to float32.
    "fp64": "32-true",
}
ASK_EVERY = 10
"""Steps between rounds in which ranks ask each other whether one of them has to stop or save."""
SLOW_STEP = 0.5
"""Seconds per step above which ranks ask at every step: torchrun and SLURM kill 30 seconds after the first signal."""
FAILED = 1_000
"""The answer if a rank cannot continue; signals are smaller numbers."""
PATIENCE = datetime.timedelta(hours=2)
"""How long ranks wait for one that builds a cache, fetches shards or draws; one that has died is noticed sooner."""
WAIT = datetime.timedelta(days=1)
PARTING = 20.0
"""Seconds that a process started by the run's first one waits for it to leave first."""


class Stopped(Exception):
    """The run was stopped by a signal; everything is saved.

    Args:
        signum: the signal.
        path: the folder of the run.
    """

    def __init__(self, signum: int, path: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name}; {path} is saved")
        self.signum, self.path = signum, path


BF16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")
"""What Linux calls the units that multiply bf16: AMX and AVX-512 on x86, and that of Arm."""


def cpu_flags() -> frozenset[str] | None:
    """What this processor says it can do; None where the system has no /proc/cpuinfo."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().lower().split())
    except OSError:
        return None


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 natively."""
    return not (cpu_flags() or frozenset()).isdisjoint(BF16_UNITS)


def choose_accelerator(name: str) -> str:
    """Resolve `auto` to the fastest accelerator available."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def own_device(accelerator: str) -> str:
    """The device of this process; processes that torchrun starts on one machine have a device each."""
    name, local = choose_accelerator(accelerator), os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if name == "cuda" and local else name


@contextmanager
def met() -> Generator[None]:
    """Within it, processes that torchrun started for something other than training can communicate, on the CPU.

    They wait up to a day for each other, because what one rank does alone may take hours.
    """
    if launched().by != "torchrun" or torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo", timeout=WAIT)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def choose_precision(accelerator: str) -> Precision:
    """bf16 where the hardware has it: 2 to 3 times fp32's speed, same exponent range, weights stay fp32."""
    accelerator = choose_accelerator(accelerator)
    if accelerator == "cpu":
        return "bf16" if cpu_has_bf16() else "fp32"
    if accelerator in ("cuda", "gpu"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "fp32"


def resolve(config: EngineConfig) -> EngineConfig:
    """Make every choice that is left open, as stored in the run, so that a resumed run makes the same ones.

    Raises:
        ValueError: the accelerator is unknown or not available.
    """
    accelerator = choose_accelerator(config.accelerator)
    known = [*ACCELERATOR_REGISTRY.available_accelerators(), "gpu"]
    if accelerator not in known:
        raise ValueError(f"engine.accelerator is {accelerator!r}; expected one of {', '.join(sorted(known))}, or auto")
    if accelerator in ("cuda", "gpu") and not torch.cuda.is_available():
        raise ValueError(
            f"engine.accelerator is {accelerator!r}, but torch sees no CUDA device; use --engine.accelerator cpu"
        )
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ValueError("engine.accelerator is 'mps', but there is no Apple GPU; use --engine.accelerator cpu")
    precision = choose_precision(accelerator) if config.precision == "auto" else config.precision
    layout = precision == "bf16" if config.channels_last is None else config.channels_last
    threads = config.threads or threads_each(config.model_copy(update={"accelerator": accelerator}))
    return config.model_copy(
        update={"accelerator": accelerator, "precision": precision, "channels_last": layout, "threads": threads}
    )


def processes(config: EngineConfig) -> tuple[int, int]:
    """Processes per node and number of nodes: from torchrun or SLURM if they started the run, else the settings.

    Args:
        config: with its accelerator resolved.
    """
    launch = launched()
    if launch.per_node and launch.nodes:
        return launch.per_node, launch.nodes
    if config.devices != "auto":
        return config.devices, config.nodes
    name = "cuda" if config.accelerator == "gpu" else config.accelerator
    return 1 if name == "cpu" else max(1, ACCELERATOR_REGISTRY.get(name).auto_device_count()), config.nodes


def threads_each(config: EngineConfig) -> int:
    """CPU threads per process: torch's default, divided among those of this machine unless OMP_NUM_THREADS is set."""
    here = sharing_cores(processes(config)[0])
    return torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else max(1, torch.get_num_threads() // here)


def build_fabric(config: EngineConfig, loggers: tuple[str, ...], folder: Path) -> Fabric:
    """Build and launch Fabric: devices, processes, precision and loggers.

    Args:
        config: resolved.
        loggers: names of loggers besides metrics.csv.
        folder: the run's folder, where loggers write.

    Raises:
        ValueError: the processes cannot connect: their port is in use, the first cannot be reached, or SLURM's srun was
            left out.
    """
    check_started()
    torch.set_num_threads(config.threads or torch.get_num_threads())
    if config.accelerator == "cpu":
        keep_freed_memory()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    devices, nodes = processes(config)
    several = nodes > 1 or devices != 1
    with _fabric_unheard():
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=_strategy(launched()) if several else "auto",
            precision=_FABRIC_PRECISION[config.precision],
            loggers=[TensorBoardLogger(folder, name="tensorboard", version="") for _ in loggers],
        )
        _launch(fabric)
    if several and _started_by_first():
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(config.threads or torch.get_num_threads())  # Fabric has changed it
    return fabric


def _strategy(launch: Launch) -> DDPStrategy:
    return DDPStrategy(cluster_environment=_environment(launch), timeout=PATIENCE, **ddp_options())


def _environment(launch: Launch) -> LightningEnvironment | SLURMEnvironment | TorchElasticEnvironment:
    """What Fabric would detect, except for a SLURM job with one task, which starts the other processes itself."""
    if launch.by == "torchrun":
        return TorchElasticEnvironment()
    return SLURMEnvironment(auto_requeue=False) if launch.by == "slurm" else LightningEnvironment()


def _started_by_first() -> bool:
    """Whether this machine's first process of the run is the parent of this one."""
    return launched().by == "first" and os.environ.get("LOCAL_RANK", "0") != "0"


def _end_with(parent: int) -> None:
    """End this process soon after `parent`, which started it, has ended; in a collective it would wait for long."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(PARTING / 2)
    logging.getLogger("moco").error("the first process of the run has ended, and this one, which it started, with it")
    os._exit(1)


def _launch(fabric: Fabric) -> None:
    try:
        fabric.launch()
    except torch.distributed.DistError as error:
        for process in getattr(fabric.strategy.launcher, "procs", ()):  # they would wait for this one for long
            process.kill()
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            raise ValueError(
                f"port {os.environ.get('MASTER_PORT')} is in use; choose another for the processes to connect at: set "
                "MASTER_PORT, or torchrun's --master-port"
            ) from None
        raise ValueError(
            f"the processes could not connect at {place} ({_start(error)}); check that all were started and can reach "
            "this address"
        ) from None


def ddp_options() -> dict[str, Any]:
    """DDP without buffers sent at each step: all ranks hold the same queue, which is 33 MB at K = 65,536."""
    # Older torch knows only one name, which newer torch deprecates.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    # Gradients lie where they are summed: no copy there and back, and no second set of them.
    return {"forward_sync_buffers" if renamed else "broadcast_buffers": False, "gradient_as_bucket_view": True}


@contextmanager
def loss_named(path: Path) -> Generator[None]:
    """Report the death of another process in one line, instead of the traceback of a collective.

    Args:
        path: the run's folder.

    Raises:
        RuntimeError: another process has died or stopped responding.
    """
    try:
        yield
    except RuntimeError as error:
        if dist.world_size() == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        raise RuntimeError(
            "another process of the run died or stopped responding (see its own message); resume from the last "
            f"checkpoint with moco pretrain --resume {path}"
        ) from None


def _start(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


@contextmanager
def _fabric_unheard() -> Generator[None]:
    """Silence Fabric's remarks on stderr; a command has its own."""
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


class StopSignal:
    """A signal to stop sets a flag that all ranks agree on every few steps; a second Ctrl-C stops at once.

    The signals are SIGTERM, Ctrl-C, and SIGUSR1, which SLURM sends when a job's time is nearly over.
    """

    def __init__(self) -> None:
        self.received = 0
        self.failure: Exception | None = None
        """Why this rank cannot continue; the others learn of it in the next round."""
        self._asked, self._asked_at = 0, -math.inf  # the step of the last question, and when it was
        self._every = 1  # until it is known how long a step takes
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if os.name == "posix" else [])):
                self._before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # ty: ignore[invalid-argument-type]

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum

    def agreed(self, step: int, *, due: bool, device: torch.device, at_once: bool = False) -> tuple[int, bool]:
        """The signal to stop for (0: none) and whether a checkpoint is due, the same on all ranks.

        The other ranks are asked only every few steps, unless a step takes long: each question makes the host
        wait.

        Args:
            step: the same on all ranks, as is `at_once`.
            due: whether a checkpoint is due on this rank.
            device: device of this rank.
            at_once: ask at this step in any case.

        Raises:
            Exception: the `failure` of a rank.
        """
        if dist.world_size() == 1:
            return self.received, due
        if step % self._every and not at_once:
            return 0, False
        own = FAILED if self.failure else 1 + self.received if self.received else int(due)
        now = time.monotonic()
        slow = now - self._asked_at > SLOW_STEP * max(1, step - self._asked)
        word, slow_anywhere = dist.agree((own, int(slow)), device)
        self._asked, self._asked_at = step, time.monotonic()
        self._every = 1 if slow_anywhere else ASK_EVERY
        if word == FAILED:
            dist.fail_together(self.failure)
        return max(0, word - 1), word > 0


def part_in_order(stopped: Stopped) -> None:
    """End the processes in order after a stop: the first requeues the job in SLURM, the others let it leave first.

    Whoever starts processes takes one that ends as a failure, and kills the others.
    """
    if os.name == "posix" and stopped.signum == signal.SIGUSR1:
        dist.first(_queue_again)  # the others wait: srun may end the step as soon as one has left
    if _started_by_first():
        parent, until = os.getppid(), time.monotonic() + PARTING
        while os.getppid() == parent and time.monotonic() < until:
            time.sleep(0.05)


def _queue_again() -> None:
    log, job = logging.getLogger("moco"), os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID"))
    if not job:
        return
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{job}_{task}" if task else job
    try:
        subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True)
        log.info("job %s is queued again", job)
    except (OSError, subprocess.CalledProcessError) as error:
        why = str(getattr(error, "stderr", "") or error).strip()
        log.warning("job %s could not be put back into the queue: %s", job, why)
