"""What is said before training starts, and what is noted of the machine."""

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

from moco import dist
from moco.config import PretrainConfig
from moco.model import MoCo
from moco.variants import choose_batchnorm, loss_range


def briefing(config: PretrainConfig, model: MoCo, num_images: int, *, lr: float, mask_own: bool) -> list[str]:
    """What is said before training starts: everything that people otherwise guess wrong."""
    settings, norm = config.model, choose_batchnorm(config.model)
    chance, floor = loss_range(settings, config.batch_size)
    parameters = sum(p.numel() for p in model.query_encoder.parameters())
    state = 2 if config.optim.name in ("adam", "adamw") else 1
    held = 4 * parameters * (3 + state) + 4 * settings.queue_size * settings.dim
    rule = (
        f"{config.optim.base_lr:g} x {config.batch_size} / 256" if config.optim.lr_scaling == "linear" else "not scaled"
    )
    meaning = {
        "split": f"split: statistics over {settings.bn_splits} groups of each batch, so that none gives a key away",
        "shuffle": "shuffled across devices before the key encoder",
        "sync": "synchronised over all devices",
        "plain": "plain: over the whole batch",
    }[norm]
    lines = [
        f"images: {num_images:,}; steps per epoch: {num_images // config.batch_size:,}; epochs: {config.epochs}",
        f"encoder: {settings.backbone}, {parameters / 1e6:.1f} million parameters with its head; weights, key encoder, "
        f"gradients, optimizer and queue take {held / 2**20:,.0f} MiB, activations come on top",
        f"learning rate: {lr:g} ({rule}), {config.optim.schedule}",
        f"batch norm: {meaning}",
        f"loss: {chance:.2f} is chance, {floor:.2f} the floor with orthogonal negatives"
        + ("; it rises as the queue fills" if settings.queue_size else ""),
    ]
    if (world := dist.world_size()) > 1:
        lines.append(
            f"processes: {world}, each with {config.batch_size // world} of a batch's {config.batch_size} images"
        )
    if settings.queue_size:
        share = f"queue: {settings.queue_size:,} keys, {settings.queue_size / num_images:.0%} of the images"
        lines.append(share + ("; an image's own older keys are left out of its negatives" if mask_own else ""))
    return lines


def cautions(config: PretrainConfig, num_images: int, *, mask_own: bool) -> list[str]:
    """Settings that are legal but known to go wrong."""
    settings, found = config.model, []
    if settings.queue_size and choose_batchnorm(settings) == "plain":
        found.append(
            "plain batch norm with a queue: the statistics of a batch tell which key belongs to a query, and training "
            "can stop learning; --model.batchnorm auto avoids it"
        )
    if settings.variant == "v3" and config.optim.accumulate > 1:
        found.append(
            f"v3 in {config.optim.accumulate} parts: an image's negatives and batch norm's statistics are of its part, "
            "not of the batch; --optim.accumulate 1 and more processes keep the batch whole"
        )
    if settings.queue_size > 0.1 * num_images and not mask_own:
        found.append(
            f"the queue holds {settings.queue_size / num_images:.0%} of the images, so images meet themselves among "
            "their negatives; lower --model.queue_size or leave --model.mask_own unset"
        )
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, as environment.json has them."""
    names = ("moco-ssl", "torch", "torchvision", "timm", "lightning-fabric", "numpy")
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "command": sys.argv,
        "versions": versions,
    }
