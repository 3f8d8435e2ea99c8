"""What is logged before training starts or continues, and what is recorded about the machine."""

import logging
import os
import platform
import sys
from typing import Any

import torch

from moco.config import PretrainConfig
from moco.doctor import memory_held
from moco.method.model import MoCo
from moco.method.variants import choose_batchnorm, loss_range
from moco.packages import version_of
from moco.parallel import collectives
from moco.training.step import Training

log = logging.getLogger("moco")


def briefing(config: PretrainConfig, model: MoCo, num_images: int, *, lr: float, mask_own: bool) -> list[str]:
    """Return the lines logged before training starts: everything that people otherwise guess wrong.

    Args:
        config: settings of the run.
        model: the model to be trained.
        num_images: training images.
        lr: learning rate after scaling.
        mask_own: whether an image's own older keys are excluded from its negatives.
    """
    settings, norm = config.model, choose_batchnorm(config.model)
    chance, floor = loss_range(settings, config.batch_size)
    parameters = sum(p.numel() for p in model.query_encoder.parameters())
    held = memory_held(config, parameters, sum(p.numel() for p in model.parameters()))
    rule = (
        f"{config.optim.base_lr:g} x {config.batch_size} / 256" if config.optim.lr_scaling == "linear" else "not scaled"
    )
    meaning = {
        "split": f"split: statistics over {settings.bn_splits} groups of each batch, so that they do not reveal which "
        "key matches a query",
        "shuffle": "shuffled across devices before the key encoder",
        "sync": "synchronised over all devices",
        "plain": "plain: over the whole batch",
    }[norm]
    lines = [
        f"images: {num_images:,}; steps per epoch: {num_images // config.batch_size:,}; epochs: {config.epochs}",
        f"encoder: {settings.backbone}, {parameters / 1e6:.1f} million parameters with its head; weights, key encoder, "
        f"gradients, optimizer and queue take {held / 2**20:,.0f} MiB, plus activations",
        f"learning rate: {lr:g} ({rule}), {config.optim.schedule}",
        f"batch norm: {meaning}",
        f"loss: {chance:.2f} is chance, {floor:.2f} the floor with orthogonal negatives"
        + ("; the loss rises while the queue fills" if settings.queue_size else ""),
    ]
    if (world := collectives.world_size()) > 1:
        lines.append(
            f"processes: {world}, each with {config.batch_size // world} of a batch's {config.batch_size} images"
        )
    if settings.queue_size:
        share = f"queue: {settings.queue_size:,} keys, {settings.queue_size / num_images:.0%} of the images"
        lines.append(share + ("; an image's own older keys are excluded from its negatives" if mask_own else ""))
    return lines


def cautions(config: PretrainConfig, num_images: int, *, mask_own: bool) -> list[str]:
    """Return warnings about settings that are valid but known to go wrong."""
    settings, found = config.model, []
    if settings.queue_size and choose_batchnorm(settings) == "plain":
        found.append(
            "plain batch norm with a queue: the statistics of a batch reveal which key matches a query, and the "
            "encoder may learn nothing; --model.batchnorm auto avoids it"
        )
    if settings.variant == "v3" and config.optim.accumulate > 1:
        found.append(
            f"v3 in {config.optim.accumulate} parts: an image's negatives and batch-norm statistics come from its part "
            "only; to take them from the whole batch, use --optim.accumulate 1 and more processes"
        )
    if settings.queue_size > 0.1 * num_images and not mask_own:
        found.append(
            f"the queue holds {settings.queue_size / num_images:.0%} of the images, so images meet their own older "
            "keys among their negatives; lower --model.queue_size or leave --model.mask_own unset"
        )
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions and machine, as recorded in environment.json."""
    names = ("moco-ssl", "torch", "torchvision", "timm", "lightning-fabric", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "command": sys.argv,
        "versions": {name: version_of(name) for name in names},
    }


def say_resumed(training: Training, state: dict[str, Any]) -> None:
    """Log where a run continues, and whether that is exact.

    Args:
        training: restored.
        state: the checkpoint it was restored from, without its weights.
    """
    if collectives.rank() != 0:
        return
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


def exactness(config: PretrainConfig, before: int, groups_before: int, groups: int) -> str:
    """Return the line that is logged when a run is resumed on a different number of processes.

    Args:
        config: settings of the run.
        before: number of processes before.
        groups_before: batch-norm groups in a forward pass before; 0: none that other processes could form.
        groups: batch-norm groups now.
    """
    now, parts, kind = collectives.world_size(), config.optim.accumulate, choose_batchnorm(config.model)
    same = "batch, image order, views, learning rate, weights, optimizer and queue continue unchanged"
    if parts > 1 and kind != "plain":
        norm = f"but batch norm now groups images differently, as each process divides its share into {parts} parts"
    elif kind == "sync":
        norm = "batch norm still covers the whole batch: exact up to the rounding of sums"
    elif groups and groups == groups_before:
        norm = f"batch norm keeps its {groups} groups: exact up to the rounding of sums"
    elif groups and groups_before:
        size = config.batch_size
        norm = f"but batch norm now covers groups of {size // groups} images instead of {size // groups_before}"
    else:
        norm = "but batch norm now sees a different number of images per process"
    return f"started on {before} process{'es' if before > 1 else ''}, now {now}: {same}; {norm}"
