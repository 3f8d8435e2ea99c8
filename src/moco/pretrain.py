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
from moco.auto import auto_config
from moco.batchnorm import average_running_statistics
from moco.briefing import briefing, cautions, environment
from moco.config import CONTINUABLE, DataConfig, PretrainConfig, fields, merge
from moco.data import GIVEN, Splits, as_images, load_data
from moco.elastic import exactness
from moco.engine import Stopped, StopSignal, build_fabric, loss_named, part_in_order, processes, resolve
from moco.explore.report import refresh
from moco.launch import launched
from moco.monitor import COLUMNS
from moco.optim import resolved_lr
from moco.pictures import draw_results, draw_start
from moco.ranks import carried_on, load_alike, share_bad, start_alike
from moco.recipes import load_recipe
from moco.run import MetricsWriter, Run
from moco.training import Training, prepare

log = logging.getLogger("moco")


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
            to `out`, the run is started when it does not exist, and resumed otherwise. Or a training checkpoint of the
            official code, which a new run continues with the settings in `config`.
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
    config = _settings(config, data, earlier, again=either)
    path = earlier.path if earlier else Path(out) if out else _free_folder(config)
    # A run that was killed before its first checkpoint holds nothing that would be lost.
    if earlier is None and not (ahead and (path / "config.yaml").is_file()):
        Run.refuse_taken(path)
    state = checkpoint.load(earlier.last) if earlier else None
    if earlier and state:
        config = _here(config, earlier, state)
    source = checkpoint.read_any(file, backbone=config.model.backbone) if file else None
    fabric = build_fabric(config.engine, config.monitor.loggers, path)
    with loss_named(path):
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
        with run.logged() if dist.rank() == 0 else nullcontext(), StopSignal() as signals:
            try:
                _work(training, run, splits, state, signals, on_progress or (lambda progress: None))
            except Stopped as stopped:
                part_in_order(stopped)
                raise
    return run


def _work(
    training: Training, run: Run, splits: Splits, state: dict[str, Any] | None, signals: StopSignal, show: Show
) -> None:
    """From the first log lines to the report; `state`: the checkpoint to continue from, if any."""
    leads = dist.rank() == 0
    if state is None:
        _introduce(training, run, splits)
    elif leads:
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
    if dist.first(lambda: training.done == training.total and "trained encoder" in run.results):  # it had finished
        return
    unlogged = bool(state and state.get("unlogged"))
    table = MetricsWriter(run.path / "metrics.csv", COLUMNS, keep_until=training.done - unlogged, active=leads)
    with closing(table) as metrics:
        if state is None:
            training.save(run, metrics, run.last)  # from here on a killed run can be continued
        elif unlogged:
            _note(training, run, metrics, signals, show if leads else None, look=True)
        _train(training, run, metrics, signals, show if leads else None)
    watch = training.monitor
    found = watch.measure()

    def conclude() -> None:
        draw_results(run, watch.encoder, watch.projector, splits.train, watch.final)
        run.write_json("results.json", run.results | {"trained encoder": found})
        refresh(run, between=0)

    dist.first(conclude)


def _train(training: Training, run: Run, metrics: MetricsWriter, signals: StopSignal, show: Show | None) -> None:
    config, loader, device = training.config, training.loader, training.fabric.device
    first, saved, bad = training.done, time.monotonic(), set[str]()
    training.clock.start()
    while training.done < training.total:
        epoch, start = divmod(training.done, loader.steps_per_epoch)
        for images, ids in carried_on(loader.epoch(epoch, start=start), training, signals):
            training.step(images, ids, epoch)
            ends_epoch = training.done % loader.steps_per_epoch == 0
            finished = training.done == training.total
            looks = finished or (ends_epoch and config.monitor.every and (epoch + 1) % config.monitor.every == 0)
            due = time.monotonic() - saved > config.monitor.save_every
            told, due = signals.agreed(training.done, due=due, device=device, at_once=ends_epoch or finished)
            if ends_epoch and not training.in_memory:
                share_bad(loader.bad, bad, num_images=training.num_images, max_bad=config.data.max_bad)
            if told and looks and not finished:  # kNN may take longer than whoever told us waits
                training.save(run, metrics, run.last, unlogged=True)
            if looks or training.done % config.monitor.log_every == 0:
                _note(training, run, metrics, signals, show, look=bool(looks))
            if dist.world_size() == 1:  # a signal that came while kNN was taken
                told, due = signals.received, due or time.monotonic() - saved > config.monitor.save_every
            if told or due or finished:
                training.save(run, metrics, run.last)
                saved = time.monotonic()
            if told and not finished:
                if dist.rank() == 0:
                    refresh(run, between=0, live=False)
                raise Stopped(told, run.path)
            if finished:
                break
    if dist.rank() == 0:
        log.info("trained %d steps in %.0f s", training.done - first, training.clock.state()["train_seconds"])


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
        except OSError as error:
            if dist.world_size() == 1:
                raise
            # A full disk, say: the others learn of it in the next round, or when the next checkpoint is due.
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


def _settings(
    config: str | Path | PretrainConfig | None, data: Any, earlier: Run | None, *, again: bool = False
) -> PretrainConfig:
    """The run's settings, with every choice of the engine made; `again`: the settings of `earlier` were given again."""
    by_name = isinstance(config, str | Path)
    if config is None:
        if earlier:
            earlier.refuse_code()
            config = earlier.config
        elif data is None:
            config = load_recipe("digits")
        else:
            where = DataConfig(source=str(data)) if isinstance(data, str | Path) else DataConfig()
            given = None if isinstance(data, str | Path) else Splits(as_images(data), None)
            config, reasons = auto_config(where, given)
            if launched().rank == 0:
                for reason in reasons:
                    log.info(reason)
    elif not isinstance(config, PretrainConfig):
        config = load_recipe(str(config))
    if data is not None:
        config = merge(config, {"data": {"source": str(data) if isinstance(data, str | Path) else GIVEN}})
    if earlier:
        config = _gone_on_with(config, earlier, left_open=again or by_name)
    return config.model_copy(update={"engine": resolve(config.engine)})


def _gone_on_with(config: PretrainConfig, earlier: Run, *, left_open: bool) -> PretrainConfig:
    """The settings of a run, updated with those that may change on resume; all others have to be the same as before.

    Args:
        config: settings to resume with.
        earlier: the run.
        left_open: whether settings that `config` does not give, and that may change, stay as they were.
    """
    changed: dict[str, Any] = {}
    for name in fields():
        section, _, key = name.rpartition(".")
        given, begun = (getattr(getattr(each, section) if section else each, key) for each in (config, earlier.config))
        not_given = left_open or key not in (getattr(config, section) if section else config).model_fields_set
        may_stay = not_given if name in CONTINUABLE else section == "engine"
        as_before = given in (None, "auto") and may_stay
        if given == begun or as_before:
            continue
        if name not in CONTINUABLE:
            raise ValueError(
                f"{earlier.path} was begun with --{name} {begun}, now it is {given}; resume with the same settings, or "
                "give another --out"
            )
        changed |= {section: changed.get(section, {}) | {key: given}} if section else {key: given}
    return merge(earlier.config, changed)


def _here(config: PretrainConfig, earlier: Run, state: dict[str, Any]) -> PretrainConfig:
    """The settings to continue with, on the number of processes there are now."""
    if (config.data.cache is None) != (earlier.config.data.cache is None):
        raise ValueError(
            f"{earlier.path} was started {'with' if earlier.config.data.cache else 'without'} --data.cache, which "
            "changes the pixels that crops are made from; on resume, only the cache's folder may change"
        )
    here, nodes = processes(config.engine)
    if state.get("processes", 1) != here * nodes and config.engine.threads == earlier.config.engine.threads:
        engine = config.engine.model_copy(update={"threads": None})  # each gets another share of the cores
        config = config.model_copy(update={"engine": resolve(engine)})
    return config


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
