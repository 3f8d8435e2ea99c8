"""The content of a checkpoint, whichever program wrote it, under the names that our models use."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn, strided

from moco.config import PretrainConfig, parse_config
from moco.method.backbones import BACKBONES, own_size
from moco.storage.foreign import heads
from moco.storage.foreign.layouts import Found, architecture, find, image_side, places_of
from moco.storage.foreign.networks import COUNTER, HEADS_OF_BACKBONES, build_for, fill, first_name, fitting
from moco.storage.foreign.systems import is_leftthomas, normalisation, odd_stem, system_of
from moco.views.specs import VIEWS, view_specs

QUERY, KEY = "query_encoder.", "key_encoder."
QUERY_BACKBONE, QUERY_HEAD, KEY_HEAD = f"{QUERY}backbone.", f"{QUERY}projector.", f"{KEY}projector."
PARTS = (
    (r"key_encoder\.projector\.", KEY_HEAD),
    (r"(query_encoder\.projector|projector|projection_head\.layers)\.", QUERY_HEAD),
    (r"(momentum_projector|projection_head_momentum\.layers)\.", KEY_HEAD),
    (r"predictor\.", "predictor."),
    (r"queue\.(?=(keys|ids|pointer)$)", "queue."),
)
"""Parts that a file may hold besides encoders, and their names in our models."""
IN_TRAINING = ("optimizer", "random", "meter", "callbacks")
MOST_NAMES, DEEPEST, LONGEST = 100_000, 5, 1000
"""Limits on the names in a file, the nesting of dictionaries and the length of a name; a large model has a few thousand
names."""


@dataclass(frozen=True)
class Foreign:
    """The recognised content of a checkpoint.

    Attributes:
        system: the program that wrote it, in words.
        network: the backbone, with its weights loaded.
        backbone: name of the backbone, as `build_backbone` takes it.
        stem: stem of the backbone, as `build_backbone` takes it.
        channels: channels of the images.
        tensors: tensors under the names of our models: `query_encoder.backbone.conv1.weight`, `queue.keys`.
        mean: mean of each channel, for images in [0, 1].
        std: standard deviation of each channel, for images in [0, 1].
        input_size: side of the images in pixels.
        told: whether mean and standard deviation come from the file, rather than from what its program usually uses.
        others: names in the file that have no counterpart in our models.
        prefix: prefix of the encoder's names in the file.
        optimizer: optimizer state by the names in `tensors`; None if the file has none that fits its tensors.
        epoch: completed epochs, if the file says so.
        heads_assumed: whether the number of attention heads is only assumed from the name that was given.
        remarks: anything else worth knowing.
    """

    system: str
    network: nn.Module
    backbone: str
    stem: str
    channels: int
    tensors: dict[str, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: int
    told: bool = False
    others: tuple[str, ...] = ()
    prefix: str = ""
    optimizer: dict[str, dict[str, Any]] | None = None
    epoch: int | None = None
    heads_assumed: bool = False
    remarks: tuple[str, ...] = ()

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names start with a prefix, with the prefix removed."""
        return {name[len(prefix) :]: each for name, each in self.tensors.items() if name.startswith(prefix)}

    def summary(self, *used: str) -> str:
        """One line that says what was matched, and what else is in the file.

        Args:
            used: prefixes of tensors that are used in addition to the backbone's.
        """
        groups = (("head", QUERY_HEAD), ("key encoder", KEY), ("predictor", "predictor."), ("queue", "queue."))
        ignored = [f"{what} ({len(self.part(p))})" for what, p in groups if self.part(p) and p not in used]
        ignored += [f"others ({len(self.others)})"] if self.others else []
        parts = [
            f"{self.system}: {len(self.part(QUERY_BACKBONE))} of {len(self.network.state_dict())} tensors of "
            f"{self.backbone} matched" + (f" under {self.prefix!r}" if self.prefix else ""),
            *self.remarks,
            *([f"ignored: {', '.join(ignored)}"] if ignored else []),
            f"images of {self.input_size} pixels, mean {_row(self.mean)}, std {_row(self.std)}"
            + ("" if self.told else " (assumed)"),
        ]
        return "; ".join(parts)


def recognise(state: Any, path: Path, *, backbone: str | None = None, num_heads: int | None = None) -> Foreign:
    """Recognise the content of a file.

    Args:
        state: content as `unpickle.read` returns it.
        path: file name for messages.
        backbone: name of the network; not given: found by the names and shapes of tensors.
        num_heads: attention heads of a transformer, if a card says so; not given: what the file says, if anything.

    Raises:
        ValueError: there is no known network in it, tensors are missing, or a network only appears to fit.
    """
    tensors, config = _flat(state, path), _own_settings(state)
    backbone = config.model.backbone if config and backbone is None else backbone
    told = num_heads or _whole(state, "num_heads")
    found = find(tensors)
    if not found and backbone:
        found = find(tensors, first_name(backbone))
    weights = {ours: tensors[theirs] for theirs, ours in found[0].names.items()} if found else {}
    likely = architecture(weights)
    name = heads.network_of(weights, name=backbone, likely=likely, told=told, path=path)
    if not found or name is None:
        raise ValueError(
            f"{path} holds no {backbone or 'known network'}; its first tensors are "
            f"{', '.join(list(tensors)[:3]) or 'none'}: name its network with --backbone"
        )
    best = found[0]
    stem = config.model.stem if config else odd_stem(tensors, state, best, weights, path)
    network, stem, channels = build_for(name, weights, stem)
    heads.refuse_others(network, name=name, told=told, path=path)
    remarks = fill(network, weights, name=name, likely=likely, path=path)
    assumed = () if config else heads.assumption(network, weights, name=name, told=told)
    remarks += assumed
    if best.follows:
        remarks += ("it holds only a momentum encoder",)
    renamed = _renamed(tensors, found, network)
    placed = {ours: _placed(ours, theirs, tensors[theirs]) for theirs, ours in renamed.items()}
    small, system = stem != "imagenet" or name in BACKBONES, system_of(tensors, state, best)
    side = image_side(weights) if places_of(weights) is not None else own_size(network) or 224
    mean, std = ((sum(v) / 3,) * channels if channels != 3 else v for v in normalisation(system, small=small))
    foreign = Foreign(
        system=system,
        network=network,
        backbone=name,
        stem=stem,
        channels=channels,
        tensors=placed | {QUERY_BACKBONE + n: each for n, each in fitting(weights, network).items()},
        mean=mean,
        std=std,
        input_size=32 if small else side,
        others=tuple(theirs for theirs in tensors if theirs not in renamed),
        prefix=best.prefix,
        optimizer=_optimizer(state, tensors, renamed),
        epoch=_whole(state, "epoch"),
        heads_assumed=bool(assumed),
        remarks=remarks,
    )
    return _with_settings(foreign, state, config, path)


def _flat(state: Any, path: Path) -> dict[str, Tensor]:
    """Tensors by their path through nested dictionaries, without those that only training needs.

    A dictionary that occurs in many places is counted each time, so that even a small file may hold too many names.
    """
    flat: dict[str, Tensor] = {}
    levels, count = [("", iter(state.items()))] if isinstance(state, dict) else [], 0
    while levels:
        prefix, entries = levels[-1]
        entry = next(entries, None)
        if entry is None:
            levels.pop()
            continue
        if not isinstance(entry[0], str):
            continue
        name, value, count = prefix + entry[0], entry[1], count + 1
        if count > MOST_NAMES or len(name) > LONGEST:
            what = f"{MOST_NAMES:,} names" if count > MOST_NAMES else f"{LONGEST:,} characters in a name"
            raise ValueError(f"{path} is not a checkpoint of a network: it has more than {what}")
        if isinstance(value, Tensor) and value.layout == strided and not value.is_meta:
            flat[name] = value
        elif isinstance(value, dict) and len(levels) < DEEPEST and not name.startswith(IN_TRAINING):
            levels.append((f"{name}.", iter(value.items())))
    return flat


def _own_settings(state: Any) -> PretrainConfig | None:
    own = isinstance(state, dict) and {"format", "model", "config"} <= state.keys()
    return parse_config(state["config"]) if own and isinstance(state["config"], dict) else None


def _renamed(tensors: dict[str, Tensor], found: list[Found], network: nn.Module) -> dict[str, str]:
    """Map the file's names to ours, for all tensors that have a counterpart in our models."""
    best, ours = found[0], network.state_dict()
    key = next((each for each in found if each.follows and each.layout == best.layout and each is not best), None)
    renamed: dict[str, str] = {}
    for encoder, side in ((best, QUERY), (key, KEY)):
        for theirs, name in encoder.names.items() if encoder else ():
            root, _, rest = name.partition(".")
            if name in ours:
                renamed[theirs] = f"{side}backbone.{name}"
            elif root in HEADS_OF_BACKBONES and rest:
                renamed[theirs] = f"{side}projector.{rest}"
    for theirs, tensor in tensors.items():
        place = next(((m, place) for pattern, place in PARTS if (m := re.search(rf"(?:^|\.){pattern}", theirs))), None)
        head = f"{best.prefix.removesuffix('f.')}g."
        if theirs in renamed:
            continue
        if place:
            renamed[theirs] = place[1] + theirs[place[0].end() :]
        elif is_leftthomas(best) and theirs.startswith(head):
            renamed[theirs] = QUERY_HEAD + theirs[len(head) :]
        elif re.search(r"(^|\.)queue$", theirs) and tensor.ndim == 2:
            renamed[theirs] = "queue.keys"
        elif re.search(r"(^|\.)queue_ptr$", theirs) and tensor.numel() == 1:
            renamed[theirs] = "queue.pointer"
    return {theirs: renamed[theirs] for theirs in tensors if theirs in renamed}


def _placed(ours: str, theirs: str, tensor: Tensor) -> Tensor:
    """Bring a tensor into our layout: the official queue has one key per column, ours one per row."""
    if ours == "queue.keys" and theirs.endswith("queue"):
        return tensor.T.contiguous()
    return tensor.reshape(()) if ours == "queue.pointer" and tensor.numel() == 1 else tensor


def _optimizer(state: Any, tensors: dict[str, Tensor], renamed: dict[str, str]) -> dict[str, dict[str, Any]] | None:
    """Optimizer state by name; the official code numbers all parameters of the model in order, frozen ones included."""
    held = state.get("optimizer")
    prefix = "state_dict." if isinstance(state.get("state_dict"), dict) else ""
    buffers = (".running_mean", ".running_var", COUNTER, "queue", "queue_ptr")
    names = [name for name in tensors if name.startswith(prefix) and not name.endswith(buffers)]
    try:
        order = [number for group in (held or {})["param_groups"] for number in group["params"]]
        states = {name: (held or {})["state"].get(number) for name, number in zip(names, order, strict=True)}
    except (TypeError, KeyError, AttributeError, ValueError):
        return None
    return {renamed[name]: dict(each) for name, each in states.items() if name in renamed and isinstance(each, dict)}


def _whole(state: Any, name: str) -> int | None:
    number = state.get(name) if isinstance(state, dict) else None
    return number if type(number) is int and number >= 0 else None


def _row(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _with_settings(foreign: Foreign, state: Any, config: PretrainConfig | None, path: Path) -> Foreign:
    """Add what a file says about its images, if anything."""
    if config:
        if config.views.recipe not in VIEWS:
            raise ValueError(
                f"{path} names code to import, views.recipe {config.views.recipe!r}, which is never imported from "
                "a checkpoint; give the folder of its run"
            )
        spec = view_specs(config.views)[0]
        return replace(
            foreign,
            mean=spec.mean,
            std=spec.std,
            input_size=config.data.size or config.views.size,
            told=True,
        )
    told = state.get("lightly_train")
    told = told.get("normalize_args") if isinstance(told, dict) else None
    both = [told.get("mean"), told.get("std")] if isinstance(told, dict) else []
    if all(isinstance(v, list | tuple) and [type(x) for x in v] == [float] * foreign.channels for v in both) and both:
        return replace(foreign, mean=tuple(both[0]), std=tuple(both[1]), told=True)
    return foreign
