"""EngineConfig -> Lightning Fabric: devices, nodes, precision, and how the processes find each other."""

import atexit
import datetime
import inspect
import logging
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import ACCELERATOR_REGISTRY
from lightning_fabric.loggers import TensorBoardLogger
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy
from lightning_fabric.utilities import distributed as fabric_distributed
from torch.nn.parallel import DistributedDataParallel

from moco.config import EngineConfig
from moco.parallel import collectives, consensus
from moco.parallel.device import choose_accelerator, choose_precision, keep_freed_memory
from moco.parallel.launch import Launch, check_started, launched, placed, sharing_cores
from moco.parallel.signals import end_with_first

_FABRIC_PRECISION: dict[str, Literal["32-true", "bf16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    # The loop casts weights and views; Fabric's own 64-true would convert keys and loss back to float32.
    "fp64": "32-true",
}
PATIENCE = datetime.timedelta(hours=2)
"""How long processes wait for one that builds a cache, fetches shards or draws; one that died is noticed sooner."""
STUCK = datetime.timedelta(minutes=30)
"""How long a GPU waits for the tensors of another before that one counts as dead; fetching a shard takes less."""
WAIT = datetime.timedelta(days=1)


@contextmanager
def met() -> Generator[None]:
    """Connect processes that torchrun or srun started for something other than training, on the CPU.

    They wait up to a day for each other, because work that one process does alone may take hours.
    """
    start = launched()
    if start.by not in ("torchrun", "slurm") or torch.distributed.is_initialized():
        yield
        return
    place = _environment(start)
    os.environ |= {"MASTER_ADDR": place.main_address, "MASTER_PORT": str(place.main_port)}
    rank, world = placed()
    try:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=WAIT)
    except torch.distributed.DistError as error:
        raise _unconnected(error) from None
    try:
        yield
        torch.distributed.barrier()  # the first process hosts the connections: nobody may leave before it
    finally:
        torch.distributed.destroy_process_group()


def resolve(config: EngineConfig) -> EngineConfig:
    """Make every choice that is left open; it is stored in the run, so that a resumed run makes the same ones.

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
    """Return processes per node and number of nodes, from torchrun or SLURM if they started the run, else the settings.

    Args:
        config: with its accelerator resolved.
    """
    launch = launched()
    if launch.per_node and launch.nodes:
        return launch.per_node, launch.nodes
    if config.devices != "auto":
        return config.devices, config.nodes
    name = "cuda" if config.accelerator == "gpu" else config.accelerator
    if name == "cpu" or getattr(sys, "ps1", None) is not None:  # a notebook cannot be started once more for each device
        return 1, config.nodes
    return max(1, ACCELERATOR_REGISTRY.get(name).auto_device_count()), config.nodes


def threads_each(config: EngineConfig) -> int:
    """Return CPU threads per process: torch's default, divided among this machine's unless OMP_NUM_THREADS is set."""
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
            left out; or there are more of them on this machine than GPUs.
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
    if config.accelerator in ("cuda", "gpu") and devices > torch.cuda.device_count():
        raise ValueError(
            f"{devices} processes on this machine, and torch sees {torch.cuda.device_count()} GPUs; start one for each"
            + ("; ask for --gpus-per-node, since --gpus-per-task hides others'" if launched().by == "slurm" else "")
        )
    with _fabric_unheard():
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=_strategy(config, launched()) if several else "auto",
            precision=_FABRIC_PRECISION[config.precision],
            loggers=[TensorBoardLogger(folder, name="tensorboard", version="") for _ in loggers],
        )
        _launch(fabric)
    if several:
        consensus.talk_apart(PATIENCE)
        end_with_first()
    torch.set_num_threads(config.threads or torch.get_num_threads())  # Fabric has changed it
    return fabric


def _strategy(config: EngineConfig, launch: Launch) -> DDPStrategy:
    timeout = PATIENCE if config.accelerator == "cpu" else STUCK
    return DDPStrategy(cluster_environment=_environment(launch), timeout=timeout, **ddp_options())


def _environment(launch: Launch) -> LightningEnvironment | SLURMEnvironment | TorchElasticEnvironment:
    """Return what Fabric would detect, but let a SLURM job with one task start the other processes itself."""
    if launch.by == "torchrun":
        return TorchElasticEnvironment()
    if launch.by != "slurm":
        return LightningEnvironment()
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(launch.per_node))  # Fabric insists on what srun need not be told
    return SLURMEnvironment(auto_requeue=False)


def _launch(fabric: Fabric) -> None:
    try:
        fabric.launch()
    except torch.distributed.DistError as error:
        for process in getattr(fabric.strategy.launcher, "procs", ()):  # they would wait for this one for long
            process.kill()
        raise _unconnected(error) from None


def _unconnected(error: Exception) -> ValueError:
    """Say in one line why the processes did not find each other."""
    port = os.environ.get("MASTER_PORT")
    if "EADDRINUSE" in str(error):
        return ValueError(
            f"port {port} is in use; choose another for the processes to connect at: set MASTER_PORT, or torchrun's "
            "--master-port"
        )
    return ValueError(
        f"the processes could not connect at {os.environ.get('MASTER_ADDR')}:{port} ({_start(error)}); check that all "
        "were started and can reach this address"
    )


def ddp_options() -> dict[str, Any]:
    """Return options of DDP: do not send buffers, since all ranks hold the same queue (33 MB at K = 65,536)."""
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
    except BaseException as error:
        if collectives.world_size() == 1:
            raise
        # Under NCCL Fabric ends a process together with all others, which may be waiting for this one.
        atexit.unregister(getattr(fabric_distributed, "_destroy_dist_connection", lambda: None))
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if not (isinstance(error, RuntimeError) and lost):
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
