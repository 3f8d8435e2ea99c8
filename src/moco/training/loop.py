"""The training loop, on one page: step; measure and report if it is time; agree whether to save or stop; save; stop."""

import logging
import math
import time
from collections.abc import Callable
from typing import NamedTuple

from moco.method.batchnorm import average_running_statistics
from moco.parallel import collectives, consensus
from moco.parallel.device import return_freed_memory
from moco.parallel.signals import Stopped, StopSignal, part_in_order
from moco.report.page import refresh
from moco.storage import checkpoint, encoder_files
from moco.storage.run import Run
from moco.training.agreement import agree_on_unreadable
from moco.training.metrics import COLUMNS, MetricsWriter
from moco.training.step import Training

log = logging.getLogger("moco")


class Progress(NamedTuple):
    """How far training has come; `metrics` is the latest row of metrics.csv."""

    step: int
    total_steps: int
    epoch: int
    metrics: dict[str, float]


OnProgress = Callable[[Progress], None]


def train(training: Training, run: Run, metrics: MetricsWriter, signals: StopSignal, on_progress: OnProgress) -> None:
    """Train from the step that has been reached to the last one.

    Args:
        training: model, optimizer, views and images; updated in place.
        run: where checkpoints and the report are written.
        metrics: where rows are written.
        signals: the signals to stop that this process receives.
        on_progress: called with each row in the first process.

    Raises:
        Stopped: a process received a signal; everything is saved.
    """
    monitor, loader = training.config.monitor, training.loader
    unreadable, max_bad = set[str](), training.config.data.max_bad
    first_step, saved_at = training.done, time.monotonic()
    training.clock.start()
    while training.done < training.total:
        epoch, start = divmod(training.done, loader.steps_per_epoch)
        if not training.in_memory:
            return_freed_memory()  # the reader processes are forked now, and would keep a copy for the whole epoch
        for images, ids in loader.epoch(epoch, start=start):
            training.step(images, ids, epoch)

            # Loss and speed are reported every few steps; kNN and health after every few epochs and at the end.
            finished = training.done == training.total
            ends_epoch = training.done % loader.steps_per_epoch == 0
            if ends_epoch and not training.in_memory:
                agree_on_unreadable(loader.bad, unreadable, num_images=training.num_images, max_bad=max_bad)
            evaluates = finished or (ends_epoch and monitor.every > 0 and (epoch + 1) % monitor.every == 0)
            if evaluates or training.done % monitor.log_every == 0:
                report_row(training, run, metrics, signals, on_progress, evaluates=evaluates)

            # All processes save and stop at the same step.
            overdue = time.monotonic() - saved_at > monitor.save_every
            signum, saves = signals.agreed(training.done, due=overdue, at_once=ends_epoch or finished)
            if saves or finished:
                save(training, run, metrics)
                saved_at = time.monotonic()
            if signum:
                _stop(signum, run)
            if finished:
                break
    if collectives.rank() == 0:
        log.info("trained %d steps in %.0f s", training.done - first_step, training.clock.state()["train_seconds"])


def open_metrics(run: Run, keep_until: int) -> MetricsWriter:
    """Open metrics.csv, without rows of steps after `keep_until`; only the first process writes to it."""
    path, leads = run.path / "metrics.csv", collectives.rank() == 0
    return consensus.together(lambda: MetricsWriter(path, COLUMNS, keep_until=keep_until, active=leads))


def save(training: Training, run: Run, metrics: MetricsWriter, *, best: bool = False) -> None:
    """Write a checkpoint and the encoder; all processes must call this, the first one writes.

    Args:
        training: what to save.
        run: where to save it.
        metrics: rows that the checkpoint relies on, synced to disk first.
        best: write `best.ckpt` instead of `last.ckpt`.

    Raises:
        RuntimeError: the loss is NaN or infinite; nothing is written.
        OSError: the checkpoint cannot be written.
    """
    average_running_statistics(training.core)
    training.meter.level()
    if not training.meter.finite():
        raise RuntimeError(
            f"the loss became NaN or infinite by step {training.done}; lower --optim.base_lr, or use "
            "--engine.precision fp32; the last checkpoint was kept"
        )

    def write() -> None:
        metrics.sync()
        checkpoint.save(run.best if best else run.last, training.state())
        encoder_files.save_encoder(run.path, training.monitor.encoder)

    consensus.first(write)


def _stop(signum: int, run: Run) -> None:
    """Stop all processes because of a signal; everything is saved."""
    if collectives.rank() == 0:
        refresh(run, between=0, live=False)
    stopped = Stopped(signum, run.path)
    part_in_order(stopped)
    raise stopped


def report_row(
    training: Training,
    run: Run,
    metrics: MetricsWriter,
    signals: StopSignal,
    on_progress: OnProgress,
    *,
    evaluates: bool,
) -> None:
    """Report a row to metrics.csv, the loggers, the progress bar and the report, and keep the best encoder so far."""
    row = _row(training, evaluates=evaluates)
    if collectives.rank() == 0:
        try:
            metrics.write(row)
            numbers = {name: value for name, value in row.items() if name not in ("step", "epoch")}
            training.fabric.log_dict(numbers, training.done)
            epoch = (training.done - 1) // training.loader.steps_per_epoch
            on_progress(Progress(training.done, training.total, epoch, row))
            if training.done < training.total and refresh(run):
                training.clock.start()  # drawing is not training
        except Exception as error:
            if collectives.world_size() == 1:
                raise
            signals.failure = error  # a full disk, say: the other processes learn of it when they next agree
    if evaluates:
        consensus.fail_together(signals.failure)  # a checkpoint must not rely on a row that was not written
    if training.config.monitor.split == "heldout" and row.get("knn_top1", -1) > training.best:
        training.best = row["knn_top1"]
        save(training, run, metrics, best=True)


def _row(training: Training, *, evaluates: bool) -> dict[str, float]:
    """Measure a row of metrics.csv; with kNN and health if `evaluates`, whose time does not count as training."""
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
    if evaluates:
        average_running_statistics(training.core)
        row |= training.monitor.knn_and_health()
        return_freed_memory()
        clock.start()
    return row
