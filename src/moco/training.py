"""A run in memory: model, optimizer, views and data; the training step, and the state that a checkpoint holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from lightning_fabric import Fabric
from torch import Tensor

from moco import checkpoint, convolution, dist, randomness
from moco.batchnorm import average_running_statistics
from moco.config import PretrainConfig
from moco.data import ArrayImages, Loader, Splits, fingerprint
from moco.data.loader import num_workers
from moco.elastic import regrouped
from moco.encoder import Encoder, ImageEncoder, refuse_size
from moco.engine import processes
from moco.foreign import QUERY_HEAD, Foreign
from moco.launch import sharing_cores
from moco.model import MoCo
from moco.monitor import Clock, Meter, Monitor, build_monitor, spread
from moco.optim import build_optimizer, key_momentum, learning_rate, set_lr
from moco.run import MetricsWriter, Run
from moco.variants import build_model, choose_batchnorm
from moco.views import TwoViews, view_specs


@dataclass
class Training:
    """Everything a training step needs, and how far training has come."""

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
    images: str  # fingerprint of those it trains on
    groups: int  # that batch-norm statistics of a forward pass are taken over, of all ranks; 0: no such groups
    done: int = 0
    best: float = -1.0
    origin: str = ""  # where weights were taken from, in words
    failure: Exception | None = None  # why a row could not be written on this rank: no checkpoint may count on it
    used: tuple[float, float] = (0.0, 0.0)  # learning rate and key momentum of the last step

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        config, per_epoch = self.config, self.loader.steps_per_epoch
        epochs, batch = config.epochs, config.batch_size
        return learning_rate(config.optim, self.done, steps_per_epoch=per_epoch, epochs=epochs, batch_size=batch)

    @property
    def key_momentum(self) -> float:
        """Momentum of the next update. In the published order that update opens the next step, so it uses its value."""
        model, planned = self.config.model, self.config.epochs * self.loader.steps_per_epoch
        return key_momentum(model.momentum, model.momentum_schedule, self.done + 1, total_steps=planned)

    def step(self, images: Tensor, ids: Tensor, epoch: int) -> None:
        """Views, loss, gradients and optimizer step; then the key encoder is updated and the keys enter the queue."""
        config, fabric, device = self.config, self.fabric, self.fabric.device
        lr, momentum = self.used = self.lr, self.key_momentum
        set_lr(self.optimizer, lr)
        if self.in_memory:
            pair = self.views(images, ids, epoch=epoch)
        else:
            pair = self.views.finish(images.to(device, non_blocking=True), ids, epoch=epoch)
        layout = torch.channels_last if config.engine.channels_last else torch.contiguous_format
        dtype = torch.float64 if config.engine.precision == "fp64" else torch.float32
        own = ids.to(device, non_blocking=True) if self.mask_own else None
        # A function of the step alone, so that resuming needs no saved random state.
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
        num_views = 2 if self.core.symmetric else 1
        key_ids = None if own is None else whole([out.ids for out in outs], num_views)
        self.core.update(whole([out.keys for out in outs], num_views), momentum=momentum, ids=key_ids)
        self.done += 1

    def spare(self) -> tuple[Tensor, Tensor]:
        """A batch of black images, for a rank that has run out and must continue until all have agreed to stop."""
        config, number = self.config, self.config.batch_size // dist.world_size()
        shape = (number, *([] if self.in_memory else [2]), config.data.channels, config.views.size, config.views.size)
        device = self.fabric.device if self.in_memory else None
        return torch.zeros(shape, dtype=torch.uint8, device=device), torch.zeros(number, dtype=torch.int64)

    def state(self, *, unlogged: bool = False) -> dict[str, Any]:
        """The state for a checkpoint: all that the rest of the run depends on, whatever the number of processes.

        Args:
            unlogged: whether the row of the last step, with kNN, is still to be written.
        """
        return {
            "unlogged": unlogged,
            "processes": dist.world_size(),
            "groups": self.groups,
            "images": {"number": self.num_images, "sha256": self.images},
            "step": self.done,
            "model": self.core.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meter": self.meter.state(),
            "clock": self.clock.state(),
            "best": self.best,
            "used": list(self.used),
            "random": randomness.state(),
            "config": self.config.model_dump(mode="json"),
        }

    def restore(self, state: dict[str, Any], path: Path) -> None:
        checkpoint.load_weights(self.core, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.best = state["step"], state["best"]
        self.used = tuple(state.get("used", self.used))
        self.meter.restore(state["meter"])
        self.clock.restore(state["clock"])
        randomness.restore(state["random"])

    def adopt(self, source: Foreign, path: Path) -> None:
        """Continue from a training checkpoint of the official code, at the start of its next epoch.

        The official code updates the key encoder before a step, this one after it: the missing update is made here.

        Raises:
            ValueError: what the file lacks, or how it differs from the settings.
        """
        lacks = [
            what
            for what, there in (
                ("optimizer", source.optimizer),
                ("number of epochs", source.epoch is not None),
                ("key encoder", source.part("key_encoder.")),
                ("queue", source.part("queue.") or self.core.queue is None),
            )
            if not there
        ]
        if lacks:
            raise ValueError(
                f"{path} holds no {' and no '.join(lacks)}, so training cannot be resumed from it (released files "
                f"never hold these); start from its weights with --init_from {path}"
            )
        config, epoch = self.config, source.epoch or 0
        done = epoch * self.loader.steps_per_epoch
        if done >= self.total:
            raise ValueError(f"{path} is already at epoch {epoch} of {config.epochs}; raise --epochs or --steps")
        ours = self.core.state_dict()
        optional = {n: each for n, each in ours.items() if n.endswith((".num_batches_tracked", "queue.ids"))}
        checkpoint.load_weights(self.core, optional | source.tensors, path)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": self._adopted_state(source, path)})
        self.done = done
        planned = config.epochs * self.loader.steps_per_epoch
        momentum = key_momentum(config.model.momentum, config.model.momentum_schedule, done, total_steps=planned)
        none = torch.empty(0, config.model.dim, device=self.fabric.device)
        self.core.update(none, momentum=momentum)
        held = source.summary(QUERY_HEAD, "key_encoder.", "predictor.", "queue.")
        self.origin = f"continues at step {done} from {path}: {held}"

    def _adopted_state(self, source: Foreign, path: Path) -> dict[int, dict[str, Any]]:
        """The optimizer's state of the parameters trained here, by their number."""
        name, states = self.config.optim.name, source.optimizer or {}
        kept = ("momentum_buffer",) if name in ("sgd", "lars") else ("step", "exp_avg", "exp_avg_sq")
        result: dict[int, dict[str, Any]] = {}
        trained = [(n, each) for n, each in self.core.named_parameters() if each.requires_grad]
        for number, (parameter, value) in enumerate(trained):
            state = dict(states.get(parameter, {}))
            if "mu" in state:  # as the official LARS calls it
                state["momentum_buffer"] = state.pop("mu")
            tensors = [state.get(key) for key in kept if key != "step"]
            fits = all(isinstance(each, Tensor) and each.shape == value.shape for each in tensors)
            if not fits or not state.keys() >= set(kept):
                raise ValueError(
                    f"{path} holds the state of another optimizer: expected {' and '.join(kept)} of {parameter}, found "
                    f"{' and '.join(state) or 'nothing'}; give the --optim.name it was trained with"
                )
            result[number] = {key: state[key] for key in kept}
        return result

    def save(self, run: Run, metrics: MetricsWriter, path: Path, *, unlogged: bool = False) -> None:
        """Save a checkpoint; the first rank writes it, but all have to call this, and all fail if it cannot."""
        average_running_statistics(self.core)
        self.meter.level()
        if not self.meter.finite():
            raise RuntimeError(
                f"the loss became NaN or infinite by step {self.done}; lower --optim.base_lr, or use "
                "--engine.precision fp32; the last checkpoint was kept"
            )

        def write() -> None:
            if self.failure:
                raise self.failure
            metrics.sync()
            checkpoint.save(path, self.state(unlogged=unlogged))
            checkpoint.save_encoder(run.path, self.monitor.encoder)

        dist.first(write)


def whole(parts: list[Tensor], num_views: int) -> Shaped[Tensor, "m ..."]:
    """Put the keys or ids of the p parts of a batch, of which part j holds images j, j + p, ..., into batch order.

    Args:
        parts: for each part, those of all ranks, one view after the other.
        num_views: number of views that keys were made from.
    """
    shape = (num_views, -1, dist.world_size())
    return torch.stack([part.unflatten(0, shape) for part in parts], dim=2).flatten(0, 3)


def prepare(config: PretrainConfig, splits: Splits, fabric: Fabric, *, fresh: bool = True, groups: int = 0) -> Training:
    """Build everything a step needs from the settings and the images; draws the initial weights.

    Args:
        config: settings of the run.
        splits: its images.
        fabric: launched.
        fresh: false if weights will be restored, so that those the settings start from are not needed.
        groups: batch-norm groups that the run was started with; kept if the number of processes allows it.

    Raises:
        ValueError: the images or the batch cannot be divided among the processes.
        Exception: what fails on one rank alone, as reading weights; on the others a ValueError that says so.
    """
    train, world = splits.train, dist.world_size()
    if len(train) < world:
        raise ValueError(f"{len(train)} images for {world} processes; start at most as many processes as images")
    part, left = divmod(config.batch_size, world * config.optim.accumulate)
    if left:
        raise ValueError(
            f"batch_size is {config.batch_size}, expected a multiple of the {world} processes x optim.accumulate "
            f"{config.optim.accumulate}: change --batch_size, or the number of processes"
        )
    settings, across, groups = regrouped(config.model, groups)
    if part == 1 and choose_batchnorm(settings) == "shuffle":
        raise ValueError(
            f"batch_size {config.batch_size} gives each of {world} processes one image, but batch norm needs at least "
            "2; raise --batch_size, or start fewer processes"
        )
    workers = config.data.workers
    if workers is None:
        workers = num_workers(sharing_cores(processes(config.engine)[0]))
    specs = dist.together(lambda: view_specs(config.views))  # which may be code of the user's
    views = TwoViews(specs, config.views.size, config.seed)

    def parts() -> tuple[Loader, MoCo, str]:
        loader = Loader(
            train,
            batch_size=config.batch_size,
            seed=config.seed,
            device=fabric.device,
            rank=dist.rank(),
            world_size=world,
            workers=workers,
            crop=views,
            max_bad=config.data.max_bad,
        )
        randomness.seed_everything(config.seed)
        published = config.model.pretrained and fresh and not config.init_from
        core = build_model(settings.model_copy(update={"pretrained": published}), channels=config.data.channels)
        for size in {config.views.size, config.data.size or config.views.size}:
            refuse_size(core.query_encoder.get_submodule("backbone"), size, channels=config.data.channels)
        return loader, core, checkpoint.initialise(core, config) if config.init_from and fresh else ""

    loader, core, origin = dist.together(parts)  # one machine alone may lack room for shards, or a file of weights
    if across:
        core.shuffle = "ranks"
    if config.engine.precision == "fp64":
        core = core.double()
    if config.engine.accelerator == "cpu" and config.engine.precision == "bf16":
        convolution.convert(core.query_encoder)
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
        images=fingerprint(train),
        in_memory=isinstance(train, ArrayImages),
        mask_own=config.model.queue_size > 0.1 * len(train) if mask is None else mask and config.model.queue_size > 0,
        total=min(total, config.steps or total),
        meter=Meter(fabric.device),
        clock=Clock(),
        groups=groups,
        origin=origin,
    )
