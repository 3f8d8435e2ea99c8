"""The training loop, on one page; everything under it is Lightning Fabric.

`pretrain` sets up, `_train` is the loop, `moco.training.Training.step` is one step of momentum contrast.
"""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from moco.config import PretrainConfig
from moco.data import Splits, as_images, load_data
from moco.method.optim import resolved_lr
from moco.parallel import collectives, consensus
from moco.parallel.device import return_freed_memory
from moco.parallel.fabric import build_fabric, loss_named
from moco.parallel.signals import Stopped, StopSignal, part_in_order, queued_again
from moco.report.page import refresh
from moco.report.pictures import draw_results, draw_start
from moco.storage import checkpoint, encoder_files
from moco.storage.run import Run
from moco.training.agreement import load_alike, start_alike
from moco.training.briefing import briefing, cautions, environment
from moco.training.build import prepare
from moco.training.loop import Show, run_to_the_end
from moco.training.settings import settle, settle_here
from moco.training.step import Training

log = logging.getLogger("moco")


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
    source = encoder_files.read_any(file, backbone=config.model.backbone) if file else None
    fabric = build_fabric(config.engine, config.monitor.loggers, path)
    with queued_again(), loss_named(path):
        splits = load_alike(lambda: _images(config, data), config)
        groups = state.get("groups", 0) if state else 0
        training = prepare(config, splits, fabric, fresh=not (earlier or file), groups=groups)
        if earlier and state:
            training.restore(state, earlier.last)
            # The weights have been copied: only what `run_to_the_end` says of the earlier part is kept for hours.
            state = {name: state[name] for name in ("images", "processes", "groups", "unlogged") if name in state}
        if source and file:
            training.adopt(source, file)
        start_alike(training.done, anew=not earlier)
        run = earlier or Run(path, config)
        consensus.first(run.remove_partial if earlier else run.begin)
        with run.logged() if collectives.rank() == 0 else nullcontext():
            if state is None:
                _introduce(training, run, splits)
            with StopSignal() as signals:
                try:
                    trained = run_to_the_end(
                        training, run, splits, state, signals, on_progress or (lambda progress: None)
                    )
                except Stopped as stopped:
                    part_in_order(stopped)
                    raise
            if trained:  # whoever stops us from here on loses nothing that is not made anew
                _conclude(training, run, splits)
    return run


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

    consensus.first(say)
    start = "encoder at the start" if training.origin else "untrained encoder"
    results = {"raw pixels": monitor.measure_pixels(), start: monitor.measure()}
    return_freed_memory()

    def show() -> None:
        run.write_json("results.json", results)
        draw_start(run, splits)
        refresh(run)

    consensus.first(show)


def _conclude(training: Training, run: Run, splits: Splits) -> None:
    """Measure and draw what the trained encoder finds."""
    watch = training.monitor
    found = watch.measure()

    def show() -> None:
        draw_results(run, watch.encoder, watch.projector, splits.train, watch.final)
        run.write_json("results.json", run.results | {"trained encoder": found})
        refresh(run, between=0)

    consensus.first(show)
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
