"""The training loop, on one page."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

from moco.data import Splits
from moco.method.batchnorm import average_running_statistics
from moco.parallel import collectives, consensus
from moco.parallel.device import return_freed_memory
from moco.parallel.signals import Stopped, StopSignal
from moco.report.page import refresh
from moco.storage.run import Run
from moco.training.agreement import carried_on, share_bad
from moco.training.briefing import exactness
from moco.training.metrics import COLUMNS, MetricsWriter
from moco.training.step import Training

log = logging.getLogger("moco")
BEFORE_KNN = 10.0
"""Seconds of training that may be lost to a kill while kNN is taken, which may take longer than whoever kills waits."""


class Progress(NamedTuple):
    """How far training has come; `metrics` is the latest row of metrics.csv."""

    step: int
    total_steps: int
    epoch: int
    metrics: dict[str, float]


Show = Callable[[Progress], None]


def run_to_the_end(
    training: Training, run: Run, splits: Splits, state: dict[str, Any] | None, signals: StopSignal, show: Show
) -> bool:
    """From the first log lines to the last checkpoint; `state`: the checkpoint to continue from, if any.

    Returns:
        Whether there was anything to do; not for a run that had finished.
    """
    leads = collectives.rank() == 0
    if state and leads:
        log.info("continued at step %d of %d", training.done, training.total)
        saved = state.get("images", {"sha256": training.images})
        if saved["sha256"] != training.images:
            log.warning(
                "the images differ from those of the saved run (%s then, %s now, or another order); training "
                "continues, but the result will not match an uninterrupted run",
                f"{saved['number']:,}",
                f"{training.num_images:,}",
            )
        before = state.get("processes", 1)
        if before != collectives.world_size():
            log.info(exactness(training.config, before, state.get("groups", 0), training.groups))
    unlogged = bool(state and state.get("unlogged"))
    if consensus.first(lambda: training.done == training.total and not unlogged and "trained encoder" in run.results):
        return False
    keep = training.done - unlogged
    table = consensus.together(lambda: MetricsWriter(run.path / "metrics.csv", COLUMNS, keep_until=keep, active=leads))
    with closing(table) as metrics:
        if state is None:
            training.save(run, metrics, run.last)  # from here on a killed run can be continued
        elif unlogged:
            _note(training, run, metrics, signals, show if leads else None, look=True)
            told, _ = signals.agreed(training.done, due=False, at_once=True)
            training.save(run, metrics, run.last)
            _stop_if(told, run)
        _train(training, run, metrics, signals, show if leads else None)
    return True


def _train(training: Training, run: Run, metrics: MetricsWriter, signals: StopSignal, show: Show | None) -> None:
    config, loader = training.config, training.loader
    first, saved, bad = training.done, time.monotonic(), set[str]()
    training.clock.start()
    while training.done < training.total:
        epoch, start = divmod(training.done, loader.steps_per_epoch)
        if not training.in_memory:
            return_freed_memory()  # else the processes that read would hold on to all of it for the epoch
        for images, ids in carried_on(loader.epoch(epoch, start=start), training, signals):
            training.step(images, ids, epoch)
            ends_epoch = training.done % loader.steps_per_epoch == 0
            finished = training.done == training.total
            looks = finished or (ends_epoch and config.monitor.every and (epoch + 1) % config.monitor.every == 0)
            every = min(BEFORE_KNN, config.monitor.save_every) if looks else config.monitor.save_every
            due = time.monotonic() - saved > every
            told, due = signals.agreed(training.done, due=due, at_once=ends_epoch or finished)
            if ends_epoch and not training.in_memory:
                share_bad(loader.bad, bad, num_images=training.num_images, max_bad=config.data.max_bad)
            if looks and (told or due):
                training.save(run, metrics, run.last, unlogged=True)
                saved = time.monotonic()
            if looks or training.done % config.monitor.log_every == 0:
                _note(training, run, metrics, signals, show, look=bool(looks))
            if looks or collectives.world_size() == 1:  # a signal that came while kNN was taken
                due = time.monotonic() - saved > config.monitor.save_every
                told, due = signals.agreed(training.done, due=due, at_once=True)
            if told or due or finished:
                training.save(run, metrics, run.last)
                saved = time.monotonic()
            _stop_if(told, run)
            if finished:
                break
    if collectives.rank() == 0:
        log.info("trained %d steps in %.0f s", training.done - first, training.clock.state()["train_seconds"])


def _stop_if(told: int, run: Run) -> None:
    """Stop for a signal, if there was one, once all is saved."""
    if told:
        if collectives.rank() == 0:
            refresh(run, between=0, live=False)
        raise Stopped(told, run.path)


def _note(
    training: Training, run: Run, metrics: MetricsWriter, signals: StopSignal, show: Show | None, *, look: bool
) -> None:
    """Report a row to metrics.csv, the loggers, the progress bar and the report, and keep the best encoder so far."""
    row, finished = _row(training, look=look), training.done == training.total
    if show:
        epoch = (training.done - 1) // training.loader.steps_per_epoch
        try:
            metrics.write(row)
            numbers = {name: value for name, value in row.items() if name not in ("step", "epoch")}
            training.fabric.log_dict(numbers, training.done)
            show(Progress(training.done, training.total, epoch, row))
            if not finished and (refresh(run) or look):
                training.clock.start()
        except Exception as error:
            if collectives.world_size() == 1:
                raise
            # A full disk, say, or a failing `on_progress`: the others learn of it in the next round.
            signals.failure = training.failure = error
    if training.config.monitor.split == "heldout" and row.get("knn_top1", -1) > training.best:
        training.best = row["knn_top1"]
        training.save(run, metrics, run.best)


def _row(training: Training, *, look: bool) -> dict[str, float]:
    """A row of metrics.csv; `look` adds kNN, whose time is not counted."""
    config, clock = training.config, training.clock
    row = {"step": training.done, "epoch": training.done / training.loader.steps_per_epoch} | training.meter.read()
    if not math.isfinite(row["loss"]):
        raise RuntimeError(
            f"the loss is {row['loss']} at step {training.done}; lower --optim.base_lr, or use --engine.precision "
            "fp32; the last checkpoint is intact"
        )
    row["lr"], row["key_momentum"] = training.used
    if config.model.queue_size:
        per_step = config.batch_size * (2 if config.model.symmetric else 1)
        row["queue_fill"] = min(100.0, 100 * training.done * per_step / config.model.queue_size)
    row |= clock.read(training.done, config.batch_size, training.loader.wait_seconds)
    if look:
        average_running_statistics(training.core)
        row |= training.monitor.look()
        return_freed_memory()
        clock.start()
    return row
