"""Which program wrote a file, from the names it uses, and what follows from that but cannot be seen in the tensors."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from moco.storage.foreign.layouts import Found
from moco.views.specs import CIFAR10, IMAGENET

OURS = "checkpoint of moco"
LIGHTLY, SOLO_LEARN = "checkpoint of lightly", "checkpoint of solo-learn"
# Programs whose mean and standard deviation for small images differ from those of the CIFAR notebook.
SMALL_IMAGES = {
    SOLO_LEARN: ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    LIGHTLY: IMAGENET,
}


def system_of(tensors: dict[str, Tensor], state: Any, best: Found) -> str:
    """Return the program that wrote a file, in words.

    Args:
        tensors: tensors of the file, by name.
        state: the file's content.
        best: the encoder found in it.
    """
    prefix, heads = best.prefix, [name for name in best.names.values() if name.startswith("fc.")]
    if "query_encoder." in prefix or "key_encoder." in prefix:
        return OURS
    if "encoder_q.net." in prefix:
        return "checkpoint of the official CIFAR notebook"
    if "encoder_q." in prefix:
        return f"official MoCo {'v2' if 'fc.0.weight' in heads else 'v1' if heads else 'v1 or v2'} checkpoint"
    if "base_encoder." in prefix:
        return "official MoCo v3 checkpoint"
    if is_leftthomas(best):
        return "checkpoint of leftthomas/MoCo"
    if _is_solo(tensors):
        return SOLO_LEARN
    if "wrapped_model." in prefix or "lightly_train" in state:
        return "checkpoint of LightlyTrain"
    if best.layout == "children without ReLU" or any(
        re.search("projection_head|backbone_momentum", n) for n in tensors
    ):
        return LIGHTLY
    return "checkpoint of Lightning" if _is_lightning(state) else "state dict"


def normalisation(system: str, *, small: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation with which a program normalises RGB images in [0, 1].

    Args:
        system: the program, as `system_of` returns it.
        small: whether the encoder is for images under 64 pixels.
    """
    return SMALL_IMAGES.get(system, CIFAR10) if small else IMAGENET


def odd_stem(tensors: dict[str, Tensor], state: Any, best: Found, weights: dict[str, Tensor], path: Path) -> str | None:
    """Return the kind of 3x3 stem: solo-learn's pads by 2, and lightly's, rebuilt from its children, lost its ReLU."""
    if "conv1.weight" not in weights or weights["conv1.weight"].shape[2:] != (3, 3):
        return None
    if best.layout == "children without ReLU":
        return "small-linear"
    if best.layout != "names" or not re.search(r"(backbone|encoder)\.$", best.prefix):
        return None
    if _is_solo(tensors):
        return "small-pad2"
    if _is_lightning(state) and any(re.search(r"(^|\.)classifier\.weight$", name) for name in tensors):
        raise ValueError(
            f"{path} may come from solo-learn, whose 3x3 stem pads by 2, which the tensors do not show; give the "
            "pre-training checkpoint, or, if the stem pads by 1, a state dict of the backbone alone"
        )
    return None


def is_leftthomas(best: Found) -> bool:
    return best.layout == "children without pooling" and best.prefix.endswith("f.")


def _is_lightning(state: Any) -> bool:
    return "pytorch-lightning_version" in state


def _is_solo(tensors: dict[str, Tensor]) -> bool:
    return any(re.search(r"(^|\.)classifier\.weight$", name) for name in tensors) and any(
        re.search(r"(^|\.)(projector|momentum_backbone|momentum_encoder)\.", name) for name in tensors
    )
