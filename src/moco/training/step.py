"""A run in memory: model, optimizer, views and data; one step of training, and the state that a checkpoint holds."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from lightning_fabric import Fabric
from torch import Tensor

from moco.config import PretrainConfig
from moco.data import Loader
from moco.method.model import MoCo
from moco.method.optim import key_momentum, learning_rate, set_lr
from moco.parallel import collectives
from moco.storage import checkpoint
from moco.training.metrics import Clock, Meter, spread
from moco.training.monitor import Monitor
from moco.views.two_views import TwoViews


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
    images: str  # their fingerprint
    groups: int  # batch-norm groups in a forward pass of all processes; 0: none that other processes could form
    done: int = 0
    best: float = -1.0
    origin: str = ""  # where weights were taken from, in words
    used: tuple[float, float] = (0.0, 0.0)  # learning rate and key momentum of the last step

    @property
    def lr(self) -> float:
        """Return the learning rate of the next step."""
        config, per_epoch = self.config, self.loader.steps_per_epoch
        epochs, batch = config.epochs, config.batch_size
        return learning_rate(config.optim, self.done, steps_per_epoch=per_epoch, epochs=epochs, batch_size=batch)

    @property
    def key_momentum(self) -> float:
        """Return the momentum of the next update, which in the published order opens the next step."""
        model, planned = self.config.model, self.config.epochs * self.loader.steps_per_epoch
        return key_momentum(model.momentum, model.momentum_schedule, self.done + 1, total_steps=planned)

    def step(self, images: Tensor, ids: Tensor, epoch: int) -> None:
        """Make views, loss and gradients, and step the optimizer; then update the key encoder and enqueue the keys."""
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

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on, for a checkpoint; the same for any number of processes."""
        return {
            "processes": collectives.world_size(),
            "groups": self.groups,
            "images": {"number": self.num_images, "sha256": self.images},
            "step": self.done,
            "model": self.core.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meter": self.meter.state(),
            "clock": self.clock.state(),
            "best": self.best,
            "used": list(self.used),
            "random": random_state(),
            "config": self.config.model_dump(mode="json"),
        }

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Restore what `state` returned; `path`: the checkpoint, for messages."""
        checkpoint.load_weights(self.core, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.best = state["step"], state["best"]
        self.used = tuple(state.get("used", self.used))
        self.meter.restore(state["meter"])
        self.clock.restore(state["clock"])
        restore_random_state(state["random"])


def whole(parts: list[Tensor], num_views: int) -> Shaped[Tensor, "m ..."]:
    """Put the keys or ids of the p parts of a batch, of which part j holds images j, j + p, ..., into batch order.

    Args:
        parts: for each part, those of all ranks, one view after the other.
        num_views: number of views that keys were made from.
    """
    shape = (num_views, -1, collectives.world_size())
    return torch.stack([part.unflatten(0, shape) for part in parts], dim=2).flatten(0, 3)


def seed_everything(seed: int) -> None:
    """Seed every generator that training code could use."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state() -> dict[str, Any]:
    """Return the state of every generator that training code could use, as tensors and plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    held: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
    }
    if torch.cuda.is_available():
        held["cuda"] = torch.cuda.get_rng_state()
    return held


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore a state returned by `random_state`."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
