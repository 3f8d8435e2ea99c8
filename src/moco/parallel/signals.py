"""How a run stops: on a signal, because of an error in one of its processes, or because the first process ended."""

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

from moco.parallel import collectives, consensus
from moco.parallel.launch import local_rank, started_by_first

ASK_EVERY = 10
"""Steps between the rounds in which processes ask each other whether to save or stop."""
SLOW_STEP = 0.5
"""Seconds per step above which they ask at every step: torchrun and SLURM kill 30 seconds after the first signal."""
FAILED = 1_000
"""The answer if a process cannot continue; signals are smaller numbers."""
PARTING = 20.0
"""Seconds for which a process waits for the one that started it to leave first."""


class Stopped(Exception):
    """A signal stopped the run; everything is saved.

    Args:
        signum: the signal.
        path: the folder of the run.
    """

    def __init__(self, signum: int, path: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name}; {path} is saved")
        self.signum, self.path = signum, path


class StopSignal:
    """Catch signals to stop, on which all processes agree every few steps; a second Ctrl-C stops at once.

    The signals are SIGTERM, Ctrl-C, and SIGUSR1, which SLURM sends when a job's time is nearly over.
    """

    def __init__(self) -> None:
        self.received = 0
        self.failure: Exception | None = None
        """Why this process cannot continue; the others learn of it when they next agree."""
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

    def agreed(self, step: int, *, due: bool, at_once: bool = False) -> tuple[int, bool]:
        """Return the signal to stop for (0: none), and whether to save; both are the same in all processes.

        The other processes are asked only every few steps, unless steps take long, because the host waits for the
        answer.

        Args:
            step: steps trained so far, the same in all processes.
            due: whether a checkpoint is due in this process.
            at_once: ask at this step in any case; the same in all processes.

        Raises:
            Exception: the `failure` of a process.
        """
        if collectives.world_size() == 1:
            return self.received, due or self.received > 0
        if step % self._every and not at_once:
            return 0, False
        own = FAILED if self.failure else 1 + self.received if self.received else int(due)
        slow = time.monotonic() - self._asked_at > SLOW_STEP * max(1, step - self._asked)
        word, slow_anywhere = consensus.agree((own, int(slow)))
        self._every = 1 if slow_anywhere else ASK_EVERY
        self._asked, self._asked_at = step, time.monotonic()
        if word == FAILED:
            consensus.fail_together(self.failure)
        return max(0, word - 1), word > 0


@contextmanager
def queued_again() -> Generator[None]:
    """Put this SLURM job back into the queue as soon as SIGUSR1 arrives; for work that needs no saving.

    Nothing asks `StopSignal` before the first step and after the last, and building a run's cache may take hours.
    """
    if os.name != "posix" or threading.current_thread() is not threading.main_thread():
        yield
        return

    def queue(signum: int, frame: FrameType | None) -> None:
        # One process of each machine does it: the run's first may be waiting for others, and then runs no Python.
        if not local_rank():
            _queue_again()

    before = signal.signal(signal.SIGUSR1, queue) if "SLURM_JOB_ID" in os.environ else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGUSR1, before)


def part_in_order(stopped: Stopped) -> None:
    """Let the first process requeue the job in SLURM, and leave before the others.

    Launchers take a process that ends for a failure, and kill the others.
    """
    if os.name == "posix" and stopped.signum == signal.SIGUSR1:
        consensus.first(_queue_again)  # the others wait: srun may end the step as soon as one has left
    if started_by_first():
        parent, until = os.getppid(), time.monotonic() + PARTING
        while os.getppid() == parent and time.monotonic() < until:
            time.sleep(0.05)


def end_with_first() -> None:
    """End this process soon after the one that started it, even in a collective."""
    if started_by_first():
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(PARTING / 2)
    logging.getLogger("moco").error("the first process of the run has ended, and this one, which it started, with it")
    os._exit(1)


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
