"""The number of attention heads, which tensors do not show: with a wrong one, weights load but features are useless.

MoCo v3's ViT-S has 12 heads, timm's and DeiT's has 6 (arXiv:2104.02057, section 4). v3's is recognised by its computed
positions; fine-tuned elsewhere with learned positions, it looks like the others.
"""

from pathlib import Path

from torch import Tensor, nn

from moco.method.backbones import num_heads
from moco.method.vit import HEADS, PATCH, VITS
from moco.storage.foreign.layouts import are_computed, places_of

_WIDTH = 384
"""Width of a ViT-S; models of other widths have the same number of heads everywhere."""


def network_of(
    weights: dict[str, Tensor], *, name: str | None, likely: str | None, told: int | None, path: Path
) -> str | None:
    """Name of the network to build; None if unknown.

    Args:
        weights: weights by the network's names.
        name: name of the network, if it was given.
        likely: name of the network that the weights look like.
        told: number of heads, if the file or a card beside it says it.
        path: file name for messages.

    Raises:
        ValueError: the name contradicts the positions, or the network may have either 6 or 12 heads.
    """
    places = places_of(weights)
    if places is None or places.shape[2] != _WIDTH:
        return name or likely
    conv, patches = "patch_embed.proj.0.weight" in weights, weights.get("patch_embed.proj.weight")
    if are_computed(places):
        if name is not None and name not in VITS:
            raise ValueError(
                f"{path} is a ViT-S of MoCo v3: it has computed positions and {HEADS} attention heads; {name} has a "
                "different number, which the tensors cannot show and which would make the features useless: give "
                "vit-small-v3 as the backbone"
            )
        return name or likely
    of_v3 = "vit-conv-small-v3" if conv else "vit-small-v3"
    either = conv or (patches is not None and patches.shape[-1] == PATCH)
    if name or not likely or not either:
        return name or likely
    if told is None:
        other = "" if conv else f"--backbone {likely} for timm's or DeiT's with 6, "
        raise ValueError(
            f"{path} is a ViT-S with learned positions; its tensors do not show its number of attention heads, and a "
            f"wrong one would make the features useless: give {other}--backbone {of_v3} for one of MoCo v3 with {HEADS}"
        )
    return of_v3 if told == HEADS else likely


def refuse_others(network: nn.Module, *, name: str, told: int | None, path: Path) -> None:
    """Raise ValueError if the network does not have the number of heads that the file or its card says."""
    ours = num_heads(network)
    if told is not None and ours is not None and told != ours:
        raise ValueError(f"{path} says it has {told} attention heads, but {name} has {ours}: give another --backbone")


def assumption(network: nn.Module, weights: dict[str, Tensor], *, name: str, told: int | None) -> tuple[str, ...]:
    """Return a remark if the number of heads is only assumed from the name that was given."""
    places = places_of(weights)
    if told is not None or places is None or places.shape[2] != _WIDTH or are_computed(places):
        return ()
    heads = num_heads(network)
    return () if heads is None else (f"{heads} attention heads assumed, as in {name}; the tensors do not show them",)
