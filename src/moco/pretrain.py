"""The training loop, on one page; everything under it is Lightning Fabric.

`pretrain` sets up, `_train` is the loop, `moco.training.Training.step` is one step of momentum contrast.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from moco import checkpoint, dist
from moco.allocator import return_freed_memory
from moco.batchnorm import average_running_statistics
from moco.briefing import briefing, cautions, environment
from moco.config import PretrainConfig
from moco.data import Splits, as_images, load_data
from moco.elastic import exactness
from moco.engine import build_fabric, loss_named
from moco.explore.report import refresh
from moco.monitor import COLUMNS
from moco.optim import resolved_lr
from moco.pictures import draw_results, draw_start
from moco.ranks import carried_on, load_alike, share_bad, start_alike
from moco.run import MetricsWriter, Run
from moco.settle import settle, settle_here
from moco.stopping import Stopped, StopSignal, part_in_order, queued_again
from moco.training import Training, prepare

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


def pretrain(
    config: str | Path | PretrainConfig | None = None,
    *,
    out: str | Path | None = None,
    data: Any = None,
    resume: str | Path | None = None,
    on_progress: Show | None = None,
) -> Run:
    """Train an encoder on unlabelled images; labels, if there are any, are only used to measure it.

    Args:
        config: name of a recipe, a YAML file or the settings; not given: chosen from `data`, or `digits`.
        out: folder of the run; not given: `runs/` and the recipe's name.
        data: images to use instead of the recipe's: a name or folder, uint8 tensor or array, list of PIL images, or
            Dataset.
        resume: folder of a run to continue from its last checkpoint, bit for bit as if it had never stopped. If equal
            to `out`, the run is started when it does not exist, and resumed otherwise. What `config` does not give
            stays as it was. Or a training checkpoint of the official code, which a new run continues with the settings
            in `config`.
        on_progress: called on the first process each time metrics are read from the device.

    Returns:
        The finished run.

    Raises:
        ValueError: the settings do not fit together or do not fit the images; the run to resume names code to import;
            the checkpoint to resume lacks an optimizer or a queue; or, at any time, too many images cannot be read.
        FileExistsError: `out` exists already.
        FileNotFoundError: the recipe, the images or the run to resume do not exist.
        RuntimeError: the loss became NaN or infinite, or another process has died; the last checkpoint is intact.
        Stopped: SIGTERM, SIGUSR1 or Ctrl-C; everything is saved, and `resume` continues.

    Example:
        >>> run = moco.pretrain("digits", out="runs/first")                                  # doctest: +SKIP
    """
    file = Path(resume) if resume is not None and Path(resume).is_file() else None
    if file and file.parent.name == "checkpoints" and (whole := file.parent.parent / "config.yaml").is_file():
        raise ValueError(f"{file} belongs to a run; to resume, give the run's folder: --resume {whole.parent}")
    if file and config is None:
        raise ValueError(f"{file} does not hold the settings it was trained with; give a recipe, too")
    either = resume is not None and out is not None and Path(out) == Path(resume)
    ahead = either and not (Path(out or "") / "checkpoints" / "last.ckpt").is_file()
    earlier = None if resume is None or file or ahead else Run.open(resume)
    if earlier and out is not None and not either:
        raise ValueError(f"out is {out} and resume {resume}; a run continues in its own folder: omit out")
    config = settle(config, data, earlier, again=either)
    path = earlier.path if earlier else Path(out) if out else _free_folder(config)
    # A run that was killed before its first checkpoint holds nothing that would be lost.
    if earlier is None and not (ahead and (path / "config.yaml").is_file()):
        Run.refuse_taken(path)
    state = checkpoint.load(earlier.last) if earlier else None
    if earlier and state:
        config = settle_here(config, earlier, state)
    source = checkpoint.read_any(file, backbone=config.model.backbone) if file else None
    fabric = build_fabric(config.engine, config.monitor.loggers, path)
    with queued_again(), loss_named(path):
        splits = load_alike(lambda: _images(config, data), config)
        groups = state.get("groups", 0) if state else 0
        training = prepare(config, splits, fabric, fresh=not (earlier or file), groups=groups)
        if earlier and state:
            training.restore(state, earlier.last)
            # The weights have been copied: only what `_work` says of the earlier part is kept for hours.
            state = {name: state[name] for name in ("images", "processes", "groups", "unlogged") if name in state}
        if source and file:
            training.adopt(source, file)
        start_alike(training.done, anew=not earlier)
        run = earlier or Run(path, config)
        dist.first(run.remove_partial if earlier else run.begin)
        with run.logged() if dist.rank() == 0 else nullcontext():
            if state is None:
                _introduce(training, run, splits)
            with StopSignal() as signals:
                try:
                    trained = _work(training, run, splits, state, signals, on_progress or (lambda progress: None))
                except Stopped as stopped:
                    part_in_order(stopped)
                    raise
            if trained:  # whoever stops us from here on loses nothing that is not made anew
                _conclude(training, run, splits)
    return run


def _work(
    training: Training, run: Run, splits: Splits, state: dict[str, Any] | None, signals: StopSignal, show: Show
) -> bool:
    """From the first log lines to the last checkpoint; `state`: the checkpoint to continue from, if any.

    Returns:
        Whether there was anything to do; not for a run that had finished.
    """
    leads = dist.rank() == 0
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
        if before != dist.world_size():
            log.info(exactness(training.config, before, state.get("groups", 0), training.groups))
    unlogged = bool(state and state.get("unlogged"))
    if dist.first(lambda: training.done == training.total and not unlogged and "trained encoder" in run.results):
        return False
    keep = training.done - unlogged
    table = dist.together(lambda: MetricsWriter(run.path / "metrics.csv", COLUMNS, keep_until=keep, active=leads))
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
            if looks or dist.world_size() == 1:  # a signal that came while kNN was taken
                due = time.monotonic() - saved > config.monitor.save_every
                told, due = signals.agreed(training.done, due=due, at_once=True)
            if told or due or finished:
                training.save(run, metrics, run.last)
                saved = time.monotonic()
            _stop_if(told, run)
            if finished:
                break
    if dist.rank() == 0:
        log.info("trained %d steps in %.0f s", training.done - first, training.clock.state()["train_seconds"])


def _stop_if(told: int, run: Run) -> None:
    """Stop for a signal, if there was one, once all is saved."""
    if told:
        if dist.rank() == 0:
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
            if dist.world_size() == 1:
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


def _introduce(training: Training, run: Run, splits: Splits) -> None:
    """Log the briefing, and measure and draw what is known before the first step."""
    config, monitor = training.config, training.monitor

    def say() -> None:
        lr = resolved_lr(config.optim, config.batch_size)
        for line in briefing(config, training.core, training.num_images, lr=lr, mask_own=training.mask_own):
            log.info(line)
        for line in cautions(config, training.num_images, mask_own=training.mask_own):
            log.warning(line)
        if training.origin:
            log.info(training.origin)
        run.write_json("environment.json", environment(training.fabric.device))

    dist.first(say)
    start = "encoder at the start" if training.origin else "untrained encoder"
    results = {"raw pixels": monitor.measure_pixels(), start: monitor.measure()}
    return_freed_memory()

    def show() -> None:
        run.write_json("results.json", results)
        draw_start(run, splits)
        refresh(run)

    dist.first(show)


def _conclude(training: Training, run: Run, splits: Splits) -> None:
    """Measure and draw what the trained encoder finds."""
    watch = training.monitor
    found = watch.measure()

    def show() -> None:
        draw_results(run, watch.encoder, watch.projector, splits.train, watch.final)
        run.write_json("results.json", run.results | {"trained encoder": found})
        refresh(run, between=0)

    dist.first(show)
    return_freed_memory()


def _images(config: PretrainConfig, data: Any) -> Splits:
    if data is None or isinstance(data, str | Path):
        return load_data(config.data)
    return Splits(as_images(data, channels=config.data.channels), None)


def _free_folder(config: PretrainConfig) -> Path:
    """runs/NAME, or runs/NAME-2 and so on if that is taken."""
    number, path = 1, Path("runs") / config.recipe
    while path.exists():
        number += 1
        path = Path("runs") / f"{config.recipe}-{number}"
    return path
