"""The training loop, on one page; everything under it is Lightning Fabric.

`pretrain` sets up, `Training.step` is one step of momentum contrast, `_train` is the loop around it.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor

from moco import checkpoint, dist
from moco.auto import auto_config
from moco.batchnorm import average_running_statistics
from moco.config import DataConfig, PretrainConfig, load_recipe, merge
from moco.data import ArrayImages, Loader, Splits, as_images, load_data
from moco.encoder import Encoder, ImageEncoder
from moco.engine import Stopped, StopSignal, build_fabric, resolve
from moco.model import MoCo
from moco.monitor import (
    COLUMNS,
    Clock,
    Meter,
    Monitor,
    briefing,
    build_monitor,
    cautions,
    draw_curves,
    draw_neighbours,
    environment,
    spread,
)
from moco.optim import build_optimizer, key_momentum, learning_rate, resolved_lr, set_lr
from moco.run import MetricsWriter, Run
from moco.variants import build_model
from moco.views import TwoViews, view_specs

log = logging.getLogger("moco")


class Progress(NamedTuple):
    """Where training stands; `metrics` is the latest row of metrics.csv."""

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
    """Trains an encoder on images without labels; labels, where there are any, only measure it.

    Args:
        config: a recipe's name, a YAML file or the settings; not given: chosen from `data`, or `digits`.
        out: folder of the run; not given: `runs/` and the recipe's name.
        data: in place of the recipe's images: name or folder, uint8 tensor or array, list of PIL images, Dataset.
        resume: folder of a run to continue from its last checkpoint, to the same bits as if it had never stopped.
        on_progress: called each time numbers were read from the device.

    Returns:
        The finished run.

    Raises:
        ValueError: settings that do not fit each other or the images; nothing has been written.
        FileExistsError: there is something at `out` already.
        Stopped: SIGTERM or Ctrl-C; everything is saved, and `resume` continues.

    Example:
        >>> run = moco.pretrain("digits", out="runs/first")                                  # doctest: +SKIP
    """
    earlier = None if resume is None else Run.open(resume)
    config = _settings(config, data, earlier)
    path = earlier.path if earlier else Path(out) if out else _free_folder(config)
    if earlier is None:
        Run.refuse_taken(path)
    state = checkpoint.load(earlier.last) if earlier else None
    fabric = build_fabric(config.engine, config.monitor.loggers, path)
    splits = _images(config, data)
    training = prepare(config, splits, fabric)
    if state:
        training.restore(state, path)
    run = earlier or (Run.create(path, config) if dist.rank() == 0 else Run(path, config))
    if earlier and dist.rank() == 0:
        earlier.remove_partial()
    with run.logged(), StopSignal() as signals:
        if earlier:
            log.info("continued at step %d of %d", training.done, training.total)
        else:
            _introduce(training, run)
        table = MetricsWriter(run.path / "metrics.csv", COLUMNS, keep_until=training.done, active=dist.rank() == 0)
        with closing(table) as metrics:
            _train(training, run, metrics, signals, on_progress or (lambda progress: None))
        if dist.rank() == 0:
            run.write_json("results.json", run.results | {"trained encoder": training.monitor.measure()})
            draw_curves(run)
            draw_neighbours(run, training.monitor, splits.train)
    return run


@dataclass
class Training:
    """Everything that a step needs, and how far it has come."""

    config: PretrainConfig
    fabric: Fabric
    core: MoCo
    model: Any  # `core` as Fabric wraps it
    optimizer: Any
    views: TwoViews
    loader: Loader
    monitor: Monitor
    num_images: int
    in_memory: bool
    mask_own: bool
    total: int
    meter: Meter
    clock: Clock
    done: int = 0
    best: float = -1.0

    @property
    def lr(self) -> float:
        """Of the next step."""
        config, per_epoch = self.config, self.loader.steps_per_epoch
        epochs, batch = config.epochs, config.batch_size
        return learning_rate(config.optim, self.done, steps_per_epoch=per_epoch, epochs=epochs, batch_size=batch)

    @property
    def key_momentum(self) -> float:
        """Of the next update. It comes before the next step's keys in the published order, so it takes that step's."""
        model, planned = self.config.model, self.config.epochs * self.loader.steps_per_epoch
        return key_momentum(model.momentum, model.momentum_schedule, self.done + 1, total_steps=planned)

    def step(self, images: Tensor, ids: Tensor, epoch: int) -> None:
        """Two views, loss, gradient, optimizer; then the key encoder follows and the keys enter the queue."""
        config, fabric, device = self.config, self.fabric, self.fabric.device
        set_lr(self.optimizer, self.lr)
        if self.in_memory:
            pair = self.views(images, ids, epoch=epoch)
        else:
            pair = self.views.finish(images.to(device, non_blocking=True), ids, epoch=epoch)
        layout = torch.channels_last if config.engine.channels_last else torch.contiguous_format
        dtype = torch.float64 if config.engine.precision == "fp64" else torch.float32
        own = ids.to(device, non_blocking=True) if self.mask_own else None
        # A function of the step alone: nothing random has to be carried over a resume.
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.done)
        parts, outs = config.optim.accumulate, []
        for part in range(parts):
            view1, view2 = (view[part::parts].to(dtype, memory_format=layout) for view in pair)
            with fabric.no_backward_sync(self.model, enabled=part < parts - 1):
                out = self.model(view1, view2, ids=None if own is None else own[part::parts], generator=generator)
                fabric.backward(out.loss / parts)
            self.meter.add(out, spread(out.keys))
            outs.append(out)
        if config.optim.clip_norm:
            fabric.clip_gradients(self.model, self.optimizer, max_norm=config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        key_ids = None if own is None else torch.cat([out.ids for out in outs])
        self.core.update(torch.cat([out.keys for out in outs]), momentum=self.key_momentum, ids=key_ids)
        self.done += 1

    def state(self) -> dict[str, Any]:
        """For a checkpoint: all that the rest of the run follows from."""
        return {
            "step": self.done,
            "model": self.core.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meter": self.meter.state(),
            "clock": self.clock.state(),
            "best": self.best,
            "random": checkpoint.random_state(),
            "config": self.config.model_dump(mode="json"),
        }

    def restore(self, state: dict[str, Any], path: Path) -> None:
        checkpoint.load_weights(self.core, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.best = state["step"], state["best"]
        self.meter.restore(state["meter"])
        self.clock.restore(state["clock"])
        checkpoint.restore_random_state(state["random"])

    def save(self, run: Run, metrics: MetricsWriter, path: Path) -> None:
        average_running_statistics(self.core)
        if dist.rank() == 0:
            metrics.sync()
            checkpoint.save(path, self.state())
            checkpoint.save_encoder(run.path, self.monitor.encoder)


def _train(training: Training, run: Run, metrics: MetricsWriter, signals: StopSignal, show: Show) -> None:
    config, loader = training.config, training.loader
    first, saved = training.done, time.monotonic()
    training.clock.start()
    while training.done < training.total:
        epoch, start = divmod(training.done, loader.steps_per_epoch)
        for images, ids in loader.epoch(epoch, start=start):
            training.step(images, ids, epoch)
            ends_epoch = training.done % loader.steps_per_epoch == 0
            finished = training.done == training.total
            looks = finished or (ends_epoch and config.monitor.every and (epoch + 1) % config.monitor.every == 0)
            if looks or training.done % config.monitor.log_every == 0:
                row = _row(training, look=bool(looks))
                metrics.write(row)
                training.fabric.log_dict({k: v for k, v in row.items() if k not in ("step", "epoch")}, training.done)
                show(Progress(training.done, training.total, epoch, row))
                if config.monitor.split == "heldout" and row.get("knn_top1", -1) > training.best:
                    training.best = row["knn_top1"]
                    training.save(run, metrics, run.best)
            due = time.monotonic() - saved > config.monitor.save_every
            told, due = signals.agreed(training.done, due=due, device=training.fabric.device)
            if told or due or finished:
                training.save(run, metrics, run.last)
                saved = time.monotonic()
            if told and not finished:
                raise Stopped(told, run.path)
            if finished:
                break
    log.info("trained %d steps in %.0f s", training.done - first, training.clock.state()["train_seconds"])


def _row(training: Training, *, look: bool) -> dict[str, float]:
    """A row of metrics.csv; `look` adds kNN, whose time is not counted."""
    config, clock = training.config, training.clock
    row = {"step": training.done, "epoch": training.done / training.loader.steps_per_epoch} | training.meter.read()
    if not math.isfinite(row["loss"]):
        raise RuntimeError(
            f"the loss is {row['loss']} at step {training.done}; lower --optim.base_lr, or use --engine.precision "
            "fp32; the last checkpoint is whole"
        )
    row["lr"], row["key_momentum"] = training.lr, training.key_momentum
    if config.model.queue_size:
        per_step = config.batch_size * (2 if config.model.symmetric else 1)
        row["queue_fill"] = min(100.0, 100 * training.done * per_step / config.model.queue_size)
    row |= clock.read(training.done, config.batch_size, training.loader.wait_seconds)
    if look:
        average_running_statistics(training.core)
        row |= training.monitor.knn()
        clock.start()
    return row


def prepare(config: PretrainConfig, splits: Splits, fabric: Fabric) -> Training:
    """Everything a step needs, from the settings and the images; draws the initial weights."""
    train = splits.train
    specs = view_specs(config.views)
    views = TwoViews(specs, config.views.size, config.seed)
    loader = Loader(
        train,
        batch_size=config.batch_size,
        seed=config.seed,
        device=fabric.device,
        rank=dist.rank(),
        world_size=dist.world_size(),
        workers=config.data.workers,
        crop=views.crop,
        max_bad=config.data.max_bad,
    )
    checkpoint.seed_everything(config.seed)
    core = build_model(config.model, channels=config.data.channels)
    if config.engine.precision == "fp64":
        core = core.double()
    if config.engine.channels_last:
        core = core.to(memory_format=torch.channels_last)
    trained = [parameter for parameter in core.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(config.optim, trained, batch_size=config.batch_size)
    if config.engine.compile:
        core.query_encoder.compile()
        core.key_encoder.compile()
    model, optimizer = fabric.setup(core, optimizer)
    query_encoder = core.query_encoder
    assert isinstance(query_encoder, Encoder)
    encoder = ImageEncoder(
        query_encoder.backbone,
        name=config.model.backbone,
        stem=config.model.stem,
        channels=config.data.channels,
        mean=specs[0].mean,
        std=specs[0].std,
        input_size=config.data.size or config.views.size,
    )
    mask = config.model.mask_own
    total = config.epochs * loader.steps_per_epoch
    return Training(
        config=config,
        fabric=fabric,
        core=core,
        model=model,
        optimizer=optimizer,
        views=views,
        loader=loader,
        monitor=build_monitor(config, splits, encoder, query_encoder.projector),
        num_images=len(train),
        in_memory=isinstance(train, ArrayImages),
        mask_own=config.model.queue_size > 0.1 * len(train) if mask is None else mask and config.model.queue_size > 0,
        total=min(total, config.steps or total),
        meter=Meter(fabric.device),
        clock=Clock(),
    )


def _introduce(training: Training, run: Run) -> None:
    """What is said and measured before the first step."""
    if dist.rank() != 0:
        return
    config, monitor = training.config, training.monitor
    lr = resolved_lr(config.optim, config.batch_size)
    for line in briefing(config, training.core, training.num_images, lr=lr, mask_own=training.mask_own):
        log.info(line)
    for line in cautions(config, training.num_images, mask_own=training.mask_own):
        log.warning(line)
    run.write_json("environment.json", environment(training.fabric.device))
    run.write_json("results.json", {"raw pixels": monitor.measure_pixels(), "untrained encoder": monitor.measure()})


def _settings(config: str | Path | PretrainConfig | None, data: Any, earlier: Run | None) -> PretrainConfig:
    """The settings in force, every choice of the engine made."""
    if config is None:
        if earlier:
            config = earlier.config
        elif data is None:
            config = load_recipe("digits")
        else:
            where = DataConfig(source=str(data)) if isinstance(data, str | Path) else DataConfig()
            given = None if isinstance(data, str | Path) else Splits(as_images(data), None)
            config, reasons = auto_config(where, given)
            for reason in reasons:
                log.info(reason)
    elif not isinstance(config, PretrainConfig):
        config = load_recipe(str(config))
    if isinstance(data, str | Path):
        config = merge(config, {"data": {"source": str(data)}})
    return config.model_copy(update={"engine": resolve(config.engine)})


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
