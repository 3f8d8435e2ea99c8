"""Pre-training from beginning to end; `loop.py` is the loop, `Training.step` in `step.py` is one step of MoCo.

Everything under them is Lightning Fabric.
"""

import logging
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from moco.config import PretrainConfig
from moco.data import Splits, as_images, load_data
from moco.method.optim import resolved_lr
from moco.parallel import collectives, consensus
from moco.parallel.device import return_freed_memory
from moco.parallel.fabric import build_fabric, loss_named
from moco.parallel.signals import StopSignal, queued_again
from moco.report.page import refresh
from moco.report.pictures import draw_results, draw_start
from moco.storage import encoder_files
from moco.storage.run import Run
from moco.training.agreement import check_same_step, load_same_images
from moco.training.briefing import briefing, cautions, environment, say_resumed
from moco.training.build import prepare
from moco.training.loop import OnProgress, open_metrics, report_row, save, train
from moco.training.official import continue_from_official
from moco.training.settings import find_start
from moco.training.step import Training

log = logging.getLogger("moco")


def pretrain(
    config: str | Path | PretrainConfig | None = None,
    *,
    out: str | Path | None = None,
    data: Any = None,
    resume: str | Path | None = None,
    on_progress: OnProgress | None = None,
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
    start = find_start(config, data, out, resume)
    run, state, fresh = start.resumed or Run(start.path, start.config), start.state or {}, start.resumed is None
    official = None
    if start.official:
        official = encoder_files.read_any(start.official, backbone=start.config.model.backbone)
    show = on_progress or (lambda progress: None)
    unreported = bool(state.get("unlogged"))  # earlier code saved before kNN: that row is still to be written
    fabric = build_fabric(start.config.engine, start.config.monitor.loggers, run.path)
    with queued_again(), loss_named(run.path):
        splits = load_same_images(lambda: _images(start.config, data), start.config)
        draws_weights = fresh and not official
        training = prepare(start.config, splits, fabric, fresh=draws_weights, groups=state.get("groups", 0))
        if not fresh:
            training.restore(state, run.last)
            del state["model"], state["optimizer"]  # copied: they need not be held for hours
        if official and start.official:
            continue_from_official(training, official, start.official)
            official = None  # copied, too
        check_same_step(training.done, fresh=fresh)
        consensus.first(run.begin if fresh else run.remove_partial)
        with run.logged() if collectives.rank() == 0 else nullcontext():
            if fresh:
                _introduce(training, run, splits)
            else:
                say_resumed(training, state)
            if consensus.first(lambda: _is_unfinished(training, run, unreported)):
                with closing(open_metrics(run, training.done - unreported)) as metrics, StopSignal() as signals:
                    if unreported:
                        report_row(training, run, metrics, signals, show, evaluates=True)
                    if fresh or unreported:
                        save(training, run, metrics)  # a process killed from here on can be resumed
                    train(training, run, metrics, signals, show)
                _conclude(training, run, splits)  # a process killed from here on has lost nothing
    return run


def _is_unfinished(training: Training, run: Run, unreported: bool) -> bool:
    """Return whether there is anything left to do; forget results of fewer steps than the run is to have now."""
    results = run.results
    if training.done < training.total and results.pop("trained encoder", None):
        run.write_json("results.json", results)
    return training.done < training.total or unreported or "trained encoder" not in results


def _introduce(training: Training, run: Run, splits: Splits) -> None:
    """Log the briefing, and measure and draw what is known before the first step."""
    config, monitor = training.config, training.monitor

    def brief() -> None:
        lr = resolved_lr(config.optim, config.batch_size)
        for line in briefing(config, training.core, training.num_images, lr=lr, mask_own=training.mask_own):
            log.info(line)
        for line in cautions(config, training.num_images, mask_own=training.mask_own):
            log.warning(line)
        if training.origin:
            log.info(training.origin)
        run.write_json("environment.json", environment(training.fabric.device))

    consensus.first(brief)
    encoder = "encoder at the start" if training.origin else "untrained encoder"
    results = {"raw pixels": monitor.accuracies_of_pixels(), encoder: monitor.accuracies()}
    return_freed_memory()

    def draw() -> None:
        run.write_json("results.json", results)
        draw_start(run, splits)
        refresh(run)

    consensus.first(draw)


def _conclude(training: Training, run: Run, splits: Splits) -> None:
    """Measure the trained encoder, and draw what it finds."""
    monitor = training.monitor
    results = monitor.accuracies()

    def draw() -> None:
        draw_results(run, monitor.encoder, monitor.projector, splits.train, monitor.final)
        run.write_json("results.json", run.results | {"trained encoder": results})
        refresh(run, between=0)

    consensus.first(draw)
    return_freed_memory()


def _images(config: PretrainConfig, data: Any) -> Splits:
    if data is None or isinstance(data, str | Path):
        return load_data(config.data)
    return Splits(as_images(data, channels=config.data.channels), None)
