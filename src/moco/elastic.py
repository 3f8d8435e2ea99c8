"""Resuming a run on a different number of processes: what stays the same, and what does not."""

from moco import dist
from moco.config import ModelConfig, PretrainConfig
from moco.variants import choose_batchnorm


def regrouped(model: ModelConfig, groups: int) -> tuple[ModelConfig, bool, int]:
    """Settings with which the present ranks compute batch-norm statistics over the same groups as the earlier run.

    Group j consists of images j, j + s, ... of the batch, in any order. These are the same images with s groups on one
    process, on s processes that exchange images (v1, section 3.3), or on fewer processes with several groups each.

    Args:
        model: the settings as given.
        groups: number of groups in the earlier run; 0: none.

    Returns:
        The settings; whether images are exchanged between ranks although the groups lie within one; and the number of
        groups in a forward pass over all ranks, 0 if batch norm has no groups that other processes could form.
    """
    world, kind = dist.world_size(), choose_batchnorm(model)
    if model.variant == "v3" or kind not in ("split", "shuffle"):
        return model, False, 0
    own = world if kind == "shuffle" else model.bn_splits if world == 1 else 0
    if not own or not groups or groups % world or groups == own:
        return model, False, own
    each = groups // world
    kept = {"batchnorm": "shuffle"} if each == 1 and world > 1 else {"batchnorm": "split", "bn_splits": each}
    return model.model_copy(update=kept), world > 1 and each > 1, groups


def exactness(config: PretrainConfig, before: int, groups_before: int, groups: int) -> str:
    """The line that is logged when a run is resumed on a different number of processes.

    Args:
        config: settings of the run.
        before: number of processes before.
        groups_before: batch-norm groups in a forward pass before; 0: none that other processes could form.
        groups: batch-norm groups now.
    """
    now, parts, kind = dist.world_size(), config.optim.accumulate, choose_batchnorm(config.model)
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
