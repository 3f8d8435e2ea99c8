"""Build the network of a file, compare it tensor by tensor and load its weights."""

from pathlib import Path

import torch
from torch import Tensor, nn

from moco.method.backbones import BACKBONES, build_backbone
from moco.method.vit import VITS

COUNTER = ".num_batches_tracked"
"""Suffix of the counters of batch norm; files from before PyTorch 0.4.1 have none."""
HEADS_OF_BACKBONES = ("fc", "head", "heads", "classifier", "linear")


def build_for(name: str, weights: dict[str, Tensor], stem: str | None) -> tuple[nn.Module, str, int]:
    """Build the network for some weights, without touching the global generators.

    Args:
        name: name of the network, as `build_backbone` takes it.
        weights: weights by the network's names.
        stem: stem, as `build_backbone` takes it; not given: told from the first convolution.

    Returns:
        The network, its stem and the channels of its images.
    """
    conv = weights.get("conv1.weight")
    small = conv is not None and conv.shape[2:] == (3, 3) and name not in BACKBONES and name not in VITS
    stem = stem or ("small" if small else "imagenet")
    with torch.random.fork_rng(devices=[]):
        network = build_backbone(name, stem=stem, channels=3)
        first = next((each for each, ours in network.state_dict().items() if ours.ndim == 4), "")
        channels = weights[first].shape[1] if first in weights and weights[first].ndim == 4 else 3
        if channels != 3 and 1 <= channels <= 1024:
            return build_backbone(name, stem=stem, channels=channels), stem, channels
    return network, stem, 3


def first_name(name: str) -> str:
    """Name of a network's first tensor; raises the same errors as `build_backbone`."""
    with torch.random.fork_rng(devices=[]):
        return next(iter(build_backbone(name).state_dict()))


def fitting(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Select the network's weights; statistics kept for each group of a batch are averaged, as for evaluation."""
    ours = network.state_dict()
    result = {name: each for name, each in weights.items() if name in ours}
    for name, have in result.items():
        channels = len(ours[name]) if ours[name].ndim == 1 else 0
        grouped = name.endswith((".running_mean", ".running_var")) and have.ndim == 1 and len(have) > channels
        if grouped and len(have) % channels == 0:
            result[name] = have.view(-1, channels).mean(0)
    return result


def fill(
    network: nn.Module, weights: dict[str, Tensor], *, name: str, likely: str | None, path: Path
) -> tuple[str, ...]:
    """Load weights, all of which have to be present.

    Args:
        network: the network, built for these weights.
        weights: weights by the network's names; those of a head may be among them.
        name: name of the network.
        likely: name of the network that the weights look like.
        path: file name for messages.

    Returns:
        Remarks on the weights.

    Raises:
        ValueError: one line with the first name that does not fit.
    """
    ours, theirs = network.state_dict(), fitting(weights, network)
    roots = {each.partition(".")[0] for each in ours} - set(HEADS_OF_BACKBONES)
    missing = [each for each in ours if each not in theirs and not each.endswith(COUNTER)]
    surplus = [each for each in weights if each not in ours and each.partition(".")[0] in roots]
    shapes = [each for each in theirs if theirs[each].shape != ours[each].shape]
    hint = f"it looks like {likely}" if likely not in (None, name) else "name its network with --backbone"
    for names, what in ((missing, "lacks"), (surplus, "has more than its"), (shapes, "has other shapes for")):
        if names:
            raise ValueError(
                f"{path} is not a {name}: it {what} {len(names)} of {len(ours)} tensors, first {names[0]!r}; {hint}"
                if names is not surplus
                else f"{path} is not a {name}: it has {len(names)} unexpected tensors, first {names[0]!r}; {hint}"
            )
    network.load_state_dict(ours | theirs)
    remarks = []
    if len(ours) > len(theirs):
        remarks.append(f"{len(ours) - len(theirs)} batch-norm counters missing, as in old files")
    if any(weights[each].shape != theirs[each].shape for each in theirs):
        remarks.append("statistics of split batch norm averaged")
    return tuple(remarks)
