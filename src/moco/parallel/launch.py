"""How this process was started: alone, by torchrun, by SLURM, or by the first process of its run.

It is read from the environment without torch, before the processes are connected; then use `collectives`.
"""

import os
from collections.abc import Mapping
from typing import Literal, NamedTuple


class Launch(NamedTuple):
    """What started this process, and how many others.

    Attributes:
        by: `torchrun`, `slurm`, `first` (the run's first process started the others), or `alone`.
        rank: rank of this process; 0 prints and writes for all.
        per_node: processes on each machine; None: taken from the settings.
        nodes: number of machines; None: taken from the settings.
    """

    by: Literal["torchrun", "slurm", "first", "alone"]
    rank: int
    per_node: int | None = None
    nodes: int | None = None


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read from the environment how this process was started.

    Args:
        environment: variables by name.
    """
    here = environment
    if "TORCHELASTIC_RUN_ID" in here:
        per_node = int(here["LOCAL_WORLD_SIZE"])
        return Launch("torchrun", int(here["RANK"]), per_node, int(here["WORLD_SIZE"]) // per_node)
    if _tasks(here) > 1 and "SLURM_STEP_ID" in here:
        nodes = int(here.get("SLURM_STEP_NUM_NODES", here.get("SLURM_NNODES", "1")))
        return Launch("slurm", int(here["SLURM_PROCID"]), _tasks(here) // nodes, nodes)
    if "LOCAL_RANK" in here:
        local, node = int(here["LOCAL_RANK"]), int(here.get("NODE_RANK", "0"))
        return Launch("first", node * max(1, int(here.get("WORLD_SIZE", "1"))) + local)
    return Launch("alone", int(here.get("NODE_RANK", "0")))


def placed(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Rank of this process and number of processes, from torchrun's `RANK` and `WORLD_SIZE`, or from SLURM.

    Args:
        environment: variables by name.
    """
    start = launched(environment)
    if start.by == "slurm" and start.per_node and start.nodes:
        return start.rank, start.per_node * start.nodes
    return int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))


def local_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the number of this process among those of its machine; None if the launcher did not number them.

    Args:
        environment: variables by name.
    """
    said = environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID"))
    return int(said) if said else None


def started_by_first() -> bool:
    """Return whether the first process on this machine is the parent of this one."""
    return launched().by == "first" and local_rank() != 0


def check_started(environment: Mapping[str, str] = os.environ) -> None:
    """Check that the other processes are being started, before waiting for them.

    Args:
        environment: variables by name.

    Raises:
        ValueError: the SLURM job has several tasks, and this process is none of them.
    """
    tasks = _tasks(environment)
    if tasks > 1 and launched(environment).by == "alone":
        raise ValueError(
            f"SLURM gave this job {tasks} tasks and started this process once; put srun in front of the command"
        )


def sharing_cores(per_node: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of processes, this one included, that share the cores available to it.

    Args:
        per_node: processes on this machine.
        environment: variables by name.
    """
    own = launched(environment).by == "slurm" and "SLURM_CPUS_PER_TASK" in environment
    return 1 if own else per_node


def allowed_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_cores(per_node: int) -> int:
    """Return the number of cores for this process: its part of those it may use.

    Args:
        per_node: processes on this machine.
    """
    return max(1, allowed_cores() // sharing_cores(per_node))


def _tasks(environment: Mapping[str, str]) -> int:
    """Return how many processes SLURM starts in this step, or in the job unless that is an interactive shell."""
    if "SLURM_STEP_NUM_TASKS" in environment:  # srun's own word; below salloc it keeps the shell's job name
        return int(environment["SLURM_STEP_NUM_TASKS"])
    by_hand = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return 1 if by_hand else int(environment.get("SLURM_NTASKS", "1"))
