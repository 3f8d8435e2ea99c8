"""Encoders in files: our own, and those of every other program."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError, model_validator
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from moco.config import PretrainConfig
from moco.files import write_atomically
from moco.method.backbones import BACKBONES, build_backbone, num_heads
from moco.method.encoder import Encoder, ImageEncoder
from moco.method.model import MoCo
from moco.method.vit import VITS
from moco.storage import foreign, unpickle
from moco.storage.checkpoint import FORMAT, load_model, load_weights, log, refuse_newer
from moco.storage.foreign import QUERY_BACKBONE, QUERY_HEAD, Foreign
from moco.storage.run import Run
from moco.storage.unpickle import first_line

OWN = "encoder of moco"
TIMMS_SMALL = ("vit_small_", "deit_small_", "deit3_small_")
"""Prefixes of the names of networks with 6 attention heads, unless a card says another number."""


class _Described(BaseModel):
    """The output of `ImageEncoder.describe`, validated, as the file may come from anyone."""

    format: int
    backbone: str
    stem: str
    channels: Annotated[int, Field(ge=1, le=1024)]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: Annotated[int, Field(ge=1, le=16384)]
    num_heads: int | None = None

    @model_validator(mode="after")
    def _one_per_channel(self) -> "_Described":
        if len(self.mean) != len(self.std) or len(self.mean) not in (self.channels, 3):
            raise ValueError(f"mean and std have {len(self.mean)} and {len(self.std)} values; expected one per channel")
        return self


def save_encoder(folder: Path, encoder: ImageEncoder) -> None:
    """Write the backbone to encoder.safetensors, and to config.json how to build it and prepare its images."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.backbone.state_dict().items()}
    write_atomically(folder / "encoder.safetensors", lambda file: file.write(save_tensors(weights)))
    text = json.dumps({"format": FORMAT} | encoder.describe(), indent=2) + "\n"
    write_atomically(folder / "config.json", lambda file: file.write(text.encode()))


def load_encoder(path: str | Path, *, backbone: str | None = None) -> ImageEncoder:
    """Load an encoder from a run or from a checkpoint of any supported program.

    Args:
        path: the folder of a run, or any that holds `encoder.safetensors` or timm's `model.safetensors` and
            `config.json`; or a file: a checkpoint of this program, of the official code (v1, v2, v3, notebook), of
            leftthomas, lightly, solo-learn or LightlyTrain, or a state dict with timm's or torchvision's names.
        backbone: name of the network in a file; not given: found by the names and shapes of its tensors.

    Returns:
        The encoder, in eval mode and frozen: normalised images -> features.

    Raises:
        FileNotFoundError: there is no such file or folder, or no encoder in it yet.
        ValueError: the file is damaged, or holds no known network or only part of one.

    Example:
        >>> encoder = moco.load_encoder("runs/first")                                        # doctest: +SKIP
        >>> encoder(encoder.preprocess(images)).shape                                        # doctest: +SKIP
        torch.Size([5, 512])
    """
    source = read_any(Path(path), backbone=backbone)
    if source.system != OWN:
        log.info("%s: %s", path, source.summary())
    encoder = ImageEncoder(
        source.network,
        name=source.backbone,
        stem=source.stem,
        channels=source.channels,
        mean=source.mean,
        std=source.std,
        input_size=source.input_size,
    )
    return encoder.eval().requires_grad_(False)


def read_any(path: Path, *, backbone: str | None = None) -> Foreign:
    """Read whatever `load_encoder` accepts, with all it holds besides the encoder; raises the same errors."""
    if path.is_dir():
        file = path / "encoder.safetensors"
        theirs = path / "model.safetensors"
        if not file.exists() and theirs.is_file():
            return _recognised(theirs, backbone)
        for needed in (path / "config.json", file):
            if not needed.is_file():
                raise FileNotFoundError(
                    f"{path} has no {needed.name}; expected a run that has finished or saved a checkpoint"
                )
        return _described(file, backbone)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected the folder of a run, or a checkpoint file")
    if path.suffix == ".safetensors" and _card(path).keys() >= {"format", "backbone", "stem"}:
        return _described(path, backbone)
    return _recognised(path, backbone)


def _recognised(path: Path, backbone: str | None) -> Foreign:
    """Read a file and timm's config.json beside it, if any; nothing is built from a name in the latter."""
    card = _card(path) if path.suffix == ".safetensors" or path.name == "pytorch_model.bin" else {}
    arguments = card.get("model_args")
    heads = arguments.get("num_heads") if isinstance(arguments, dict) else None
    if type(heads) is not int or heads < 1:
        heads = 6 if str(card.get("architecture")).startswith(TIMMS_SMALL) else None
    source = foreign.recognise(unpickle.read(path), path, backbone=backbone, num_heads=heads)
    try:
        told = _TimmCard.model_validate(card["pretrained_cfg"])
    except (KeyError, ValidationError):
        return source
    if not len(told.mean) == len(told.std) == source.channels:
        return source
    return replace(source, mean=told.mean, std=told.std, input_size=told.input_size[1], told=True)


def _described(weights: Path, backbone: str | None) -> Foreign:
    """Read weights and the config.json beside them, both written by `save_encoder`."""
    described = weights.with_name("config.json")
    try:
        about = _Described.model_validate_json(described.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise ValueError(f"{described} does not describe a moco encoder ({what}); export or train it again") from None
    refuse_newer(about.format, described)
    if backbone not in (None, about.backbone):
        raise ValueError(f"{weights} is a {about.backbone}, not a {backbone}; correct --backbone, or leave it out")
    network = build_backbone(about.backbone, stem=about.stem, channels=about.channels)
    if about.num_heads not in (None, num_heads(network)):
        raise ValueError(
            f"{described} says {about.num_heads} attention heads, but {about.backbone} has {num_heads(network)}; give "
            "the config.json that was written with these weights"
        )
    try:
        tensors = load_tensors(weights.read_bytes())
    except Exception as error:  # safetensors has its own exception type per version
        raise ValueError(f"{weights} is damaged, or not a safetensors file ({first_line(error)})") from None
    load_weights(network, tensors, weights)
    return Foreign(
        system=OWN,
        network=network,
        backbone=about.backbone,
        stem=about.stem,
        channels=about.channels,
        tensors={QUERY_BACKBONE + name: tensor for name, tensor in tensors.items()},
        mean=about.mean,
        std=about.std,
        input_size=about.input_size,
        told=True,
    )


def _card(weights: Path) -> dict[str, Any]:
    """Return the config.json beside a file of weights; empty if there is none that can be read."""
    try:
        card = json.loads(weights.with_name("config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return card if isinstance(card, dict) else {}


class _TimmCard(BaseModel):
    """The images a network expects, from timm's config.json, validated, as the file may come from anyone."""

    input_size: tuple[int, Annotated[int, Field(ge=1, le=16384)], int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def initialise(model: MoCo, config: PretrainConfig) -> str:
    """Initialise both encoders from the checkpoint `config.init_from`, and the heads if their shapes match.

    Returns:
        One line that says what was taken.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged, or its network is not the one in the settings.
    """
    path, settings = Path(config.init_from or ""), config.model
    source = read_any(path, backbone=settings.backbone if path.is_file() else None)
    if source.heads_assumed:  # a recipe's network is no evidence of what someone else has trained
        raise ValueError(
            f"{path} is a ViT-S with learned positions; its tensors do not show whether it has as many attention heads "
            f'as {settings.backbone}: save it with "num_heads" beside its state_dict'
        )
    theirs = (source.backbone, source.stem, source.channels)
    wanted = (settings.backbone, settings.stem, config.data.channels)
    have, need = _alias(*theirs), _alias(*wanted)
    if have != need:
        is_, expected = (f"a {name} with {stem} stem for {n} channels" for name, stem, n in (theirs, wanted))
        flags = ("--model.backbone", "--model.stem", "--data.channels")
        give = [f"{flag} {theirs[i]}" for i, flag in enumerate(flags) if have[i] != need[i]]
        change = f"give {' '.join(give)}, or start from another file"
        raise ValueError(f"{path} is {is_}; the settings are for {expected}: {change}")
    query = model.query_encoder
    assert isinstance(query, Encoder)
    query.backbone.load_state_dict(source.network.state_dict())
    used: list[str] = []
    for prefix, part in ((QUERY_HEAD, query.projector), ("predictor.", getattr(model, "predictor", None))):
        have = source.part(prefix)
        if part is not None and _shapes(have) == _shapes(part.state_dict()):
            part.load_state_dict(have)
            used.append(prefix)
    model.key_encoder.load_state_dict(query.state_dict())
    heads = " and ".join({QUERY_HEAD: "head", "predictor.": "predictor"}[prefix] for prefix in used)
    return f"starts from {path}: {source.summary(*used)}; {f'{heads} taken too' if heads else 'new head'}"


def _alias(name: str, stem: str, channels: int) -> tuple[Any, str, int]:
    """Return a key that is equal for equal networks: ours have two names, and a stem that no setting changes."""
    own = VITS.get(name) or BACKBONES.get(name)
    return own or name, "" if own else stem, channels


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def load_projector(run: Run) -> nn.Module:
    """Load the head of a run's query encoder, features -> projections; raises the same errors as `load_model`."""
    encoder = load_model(run).query_encoder
    assert isinstance(encoder, Encoder)
    return encoder.projector
