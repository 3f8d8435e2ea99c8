"""How many attention heads: no tensor shows it, weights load with any number, and features mean nothing with another.

MoCo v3's ViT-S has 12, that of timm and DeiT 6 (arXiv:2104.02057, section 4). Untouched, v3's is known by its computed
positions; trained on elsewhere with positions that learn, it looks like the others.
"""

from pathlib import Path

from torch import Tensor, nn

from moco.encoder import num_heads
from moco.foreign.layouts import are_computed, places_of
from moco.vit import HEADS, PATCH, VITS

_WIDTH = 384
"""Of a ViT-S; models of other widths have the same number of heads everywhere."""


def network_of(
    weights: dict[str, Tensor], *, name: str | None, likely: str | None, told: int | None, path: Path
) -> str | None:
    """The network to build; None: it is not known.

    Args:
        weights: by the network's names.
        name: of the network, where somebody gave it.
        likely: what the weights look like.
        told: number of heads, where the file or a card beside it says it.
        path: for messages.

    Raises:
        ValueError: the name contradicts the positions, or the weights may be of 6 heads as well as of 12.
    """
    places = places_of(weights)
    if places is None or places.shape[2] != _WIDTH:
        return name or likely
    conv, patches = "patch_embed.proj.0.weight" in weights, weights.get("patch_embed.proj.weight")
    if are_computed(places):
        if name is not None and name not in VITS:
            raise ValueError(
                f"{path} is a ViT-S of MoCo v3: computed positions and {HEADS} heads; {name} has other heads, which "
                "shows in no tensor and would make its features meaningless: give vit-small-v3 as the backbone"
            )
        return name or likely
    of_v3 = "vit-conv-small-v3" if conv else "vit-small-v3"
    either = conv or (patches is not None and patches.shape[-1] == PATCH)
    if name or not likely or not either:
        return name or likely
    if told is None:
        other = "" if conv else f"--backbone {likely} for timm's or DeiT's with 6, "
        raise ValueError(
            f"{path} is a ViT-S with learned positions, whose number of attention heads no tensor shows, and another "
            f"would make its features meaningless: give {other}--backbone {of_v3} for one of MoCo v3 with {HEADS}"
        )
    return of_v3 if told == HEADS else likely


def refuse_others(network: nn.Module, *, name: str, told: int | None, path: Path) -> None:
    """Raises ValueError if the network has another number of heads than the file or its card says."""
    ours = num_heads(network)
    if told is not None and ours is not None and told != ours:
        raise ValueError(f"{path} is said to have {told} attention heads, {name} has {ours}: give another --backbone")


def assumption(network: nn.Module, weights: dict[str, Tensor], *, name: str, told: int | None) -> tuple[str, ...]:
    """A remark where the number of heads follows from a name that somebody gave, and from nothing else."""
    places = places_of(weights)
    if told is not None or places is None or places.shape[2] != _WIDTH or are_computed(places):
        return ()
    heads = num_heads(network)
    return () if heads is None else (f"{heads} attention heads assumed, as {name} has, for no tensor shows them",)
