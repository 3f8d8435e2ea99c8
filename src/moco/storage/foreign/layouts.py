"""Where in a file an encoder is, and which network it is, from the names and shapes of tensors alone."""

import re
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moco.method.vit import VITS, positions

FOLLOWS = re.compile(r"(^|\.|_)(momentum|teacher|encoder_k|key_encoder|ema|target)(_|\.|$)")
"""Prefixes of a momentum encoder."""
STAGES = ("layer1", "layer2", "layer3", "layer4")
# A ResNet may also be saved as an nn.Sequential of its children, by number; the head after them may be number 9.
LAYOUTS: dict[str, dict[str, str]] = {
    "names": {},
    "children": {"0": "conv1", "1": "bn1", **dict(zip("4567", STAGES, strict=True))},
    "children without pooling": {"0": "conv1", "1": "bn1", **dict(zip("3456", STAGES, strict=True)), "9": "fc"},
    "children without ReLU": {"0": "conv1", "1": "bn1", **dict(zip("2345", STAGES, strict=True))},
}
ANCHORS = {
    "layer1.0.conv1.weight": "names",
    "stages.0.conv1.weight": "names",
    "patch_embed.proj.weight": "names",
    "patch_embed.proj.0.weight": "names",
    "4.0.conv1.weight": "children",
    "3.0.conv1.weight": "children without pooling",
    "2.0.conv1.weight": "children without ReLU",
}
"""Tensors by which known networks are found, and the layout that each implies."""
# Blocks per stage, channels and channels per group of the first 3x3 convolution, whether blocks are bottlenecks.
RESNETS = {
    ((2, 2, 2, 2), 64, 64, False): "resnet18",
    ((3, 4, 6, 3), 64, 64, False): "resnet34",
    ((3, 4, 6, 3), 64, 64, True): "resnet50",
    ((3, 4, 23, 3), 64, 64, True): "resnet101",
    ((3, 8, 36, 3), 64, 64, True): "resnet152",
    ((3, 4, 6, 3), 128, 128, True): "wide_resnet50_2",
    ((3, 4, 23, 3), 128, 128, True): "wide_resnet101_2",
    ((3, 4, 6, 3), 128, 4, True): "resnext50_32x4d",
    ((3, 4, 23, 3), 256, 8, True): "resnext101_32x8d",
    ((3, 4, 23, 3), 256, 4, True): "resnext101_64x4d",
}
SMALL_RESNETS = {32: "resnet-tiny", 48: "resnet-mini"}
"""Our small ResNets by the channels of their first convolution."""
VIT_SIZES = {192: ("tiny", 12), 384: ("small", 12), 768: ("base", 12), 1024: ("large", 24)}
"""Sizes of vision transformers by their width, with the number of blocks."""


MOST_ENCODERS = 100
"""Most encoders that are searched for in a file."""


class Found(NamedTuple):
    """An encoder in a file; `names` maps the file's names to the backbone's, including those of its head."""

    prefix: str
    layout: str
    names: dict[str, str]
    follows: bool


def find(tensors: dict[str, Tensor], first: str | None = None) -> list[Found]:
    """Find the encoders in a file; momentum encoders come last.

    Args:
        tensors: tensors of the file, by name.
        first: name of the first tensor of the network to look for; not given: any known network.
    """
    anchors = ANCHORS if first is None else {first: "names"}
    found: dict[str, Found] = {}
    for theirs in tensors:
        for anchor, layout in anchors.items():
            prefix = theirs.removesuffix(anchor)
            if prefix == theirs or prefix in found or (prefix and not prefix.endswith(".")):
                continue
            if len(found) == MOST_ENCODERS:
                break
            last = next((number for number, name in LAYOUTS[layout].items() if name == STAGES[-1]), None)
            if last and not {f"{prefix}{last}.0.conv1.weight", f"{prefix}0.weight"} <= tensors.keys():
                continue
            names = {n: _renumbered(n[len(prefix) :], LAYOUTS[layout]) for n in tensors if n.startswith(prefix)}
            found[prefix] = Found(prefix, layout, names, bool(FOLLOWS.search(prefix)))
    return sorted(found.values(), key=lambda each: each.follows)


def _renumbered(name: str, layout: dict[str, str]) -> str:
    root, dot, rest = name.partition(".")
    return (layout.get(root, root) + dot + rest).replace(".shortcut.", ".downsample.")


def architecture(weights: dict[str, Tensor]) -> str | None:
    """Name of the network with these tensors, as `build_backbone` takes it; None if its size is unknown."""
    if "layer1.0.conv2.weight" in weights and "conv1.weight" in weights:
        blocks = tuple(_count(weights, f"{stage}.") for stage in STAGES)
        return RESNETS.get((blocks, *weights["layer1.0.conv2.weight"].shape[:2], "layer1.0.conv3.weight" in weights))
    if "stages.0.conv1.weight" in weights and "conv1.weight" in weights:
        return SMALL_RESNETS.get(len(weights["conv1.weight"]))
    places, depth = places_of(weights), _count(weights, "blocks.")
    size, usual = VIT_SIZES.get(places.shape[2] if places is not None else 0, ("", 0))
    if places is None or not size or "cls_token" not in weights:
        return None
    if "patch_embed.proj.0.weight" in weights:  # a convolutional stem takes the place of a block
        name, usual = f"vit-conv-{size}-v3", usual - 1
    elif are_computed(places):
        name = f"vit-{size}-v3"
    else:
        name = f"vit_{size}_patch{weights['patch_embed.proj.weight'].shape[-1]}_{image_side(weights)}"
    return name if depth == usual and (name in VITS or name.startswith("vit_")) else None


def _count(weights: dict[str, Tensor], prefix: str) -> int:
    numbers = {name[len(prefix) :].partition(".")[0] for name in weights if name.startswith(prefix)}
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def places_of(weights: dict[str, Tensor]) -> Float[Tensor, "1 n d"] | None:
    """Return the position embeddings of a vision transformer; None if there are none."""
    places = weights.get("pos_embed")
    return places if places is not None and places.ndim == 3 and len(places) == 1 else None


def are_computed(places: Float[Tensor, "1 n d"]) -> bool:
    """Whether position embeddings are the sines and cosines of MoCo v3."""
    _, tokens, width = places.shape
    grid = round((tokens - 1) ** 0.5)
    if tokens != 1 + grid**2 or width % 4:
        return False
    return torch.allclose(places[0, 1:].float(), positions(grid, grid, width), atol=1e-3)


def image_side(weights: dict[str, Tensor]) -> int:
    """Side in pixels of the images that a transformer has positions for; 224 for all other networks."""
    places, patches = places_of(weights), weights.get("patch_embed.proj.weight")
    return 224 if places is None or patches is None else round((places.shape[1] - 1) ** 0.5) * patches.shape[-1]
