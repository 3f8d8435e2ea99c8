"""A run that goes on on another number of processes than it was begun on: what stays the same, and what does not."""

from moco import dist
from moco.config import ModelConfig, PretrainConfig
from moco.variants import choose_batchnorm


def regrouped(model: ModelConfig, groups: int) -> tuple[ModelConfig, bool, int]:
    """The settings by which the ranks that there are now take batch-norm statistics over the groups of an earlier run.

    Group j is images j, j + s, ... of the batch, in whatever order. With s groups on one process, on s processes that
    exchange images (v1, section 3.3), or on fewer that have several groups each, it is the same images.

    Args:
        model: as it was given.
        groups: of the earlier run; 0: none.

    Returns:
        Settings; whether images are exchanged between ranks though the settings take groups within one; and the number
        of groups of a forward pass over all ranks, 0 where batch norm has none that others could have.
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
    """What is said when a run goes on on another number of processes.

    Args:
        config: of the run.
        before: processes of the earlier part.
        groups_before: batch-norm groups of a forward pass then, 0: none that others could have.
        groups: now.
    """
    now, parts, kind = dist.world_size(), config.optim.accumulate, choose_batchnorm(config.model)
    same = "batch, order of images, views, rates, weights, optimizer and queue go on as they were"
    if parts > 1 and kind != "plain":
        norm = f"but batch norm sees other images together, for each process deals its share out to {parts} parts"
    elif kind == "sync":
        norm = "batch norm is over the whole batch as before: exact but for the rounding of sums"
    elif groups and groups == groups_before:
        norm = f"batch norm keeps its {groups} groups: exact but for the rounding of sums"
    elif groups and groups_before:
        size = config.batch_size
        norm = f"but batch norm is over groups of {size // groups} images from here on, not of {size // groups_before}"
    else:
        norm = "but batch norm is over each process's share of the batch, which is another"
    return f"begun on {before} process{'es' if before > 1 else ''}, now {now}: {same}; {norm}"
