"""Our checkpoints: tensors and plain values only, written atomically, read without running any code from them."""

import json
import random
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from moco.encoder import ImageEncoder, build_backbone
from moco.run import write_atomically

FORMAT = 1
"""Of checkpoints; raised when an older version could not read a newer file rightly."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint; until it is whole the one before stays in place."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT} | state, file))


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of ours onto the CPU.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not one of ours, it is damaged, or a newer version wrote it.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; the run was stopped before its first checkpoint: delete it and start anew"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise anything
        raise ValueError(f"{path} is damaged or no checkpoint of moco ({_first_line(error)})") from None
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise ValueError(f"{path} is no checkpoint of moco: expected one that `moco pretrain` wrote")
    _refuse_newer(state["format"], path)
    return state


def _refuse_newer(number: int, path: Path) -> None:
    if number > FORMAT:
        raise ValueError(f"{path} is of format {number}, this version reads up to {FORMAT}; update moco")


def load_weights(module: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Loads weights that must fit name by name and shape by shape.

    Raises:
        ValueError: one line that says how many names do not fit, and the first of them.
    """
    ours = module.state_dict()
    missing, foreign = [n for n in ours if n not in weights], [n for n in weights if n not in ours]
    other = [n for n in ours if n in weights and ours[n].shape != weights[n].shape]
    for names, what in ((missing, "lacks"), (foreign, "has unknown"), (other, "has other shapes for")):
        if names:
            shapes = (
                f" ({tuple(weights[names[0]].shape)}, expected {tuple(ours[names[0]].shape)})" if names is other else ""
            )
            raise ValueError(
                f"{path} is of another architecture: it {what} {len(names)} of {len(ours)} tensors, first "
                f"{names[0]!r}{shapes}; use the settings it was trained with"
            )
    module.load_state_dict(weights)


def seed_everything(seed: int) -> None:
    """Starts every generator that training code could draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state() -> dict[str, Any]:
    """Of every generator that training code could draw from, as tensors and plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class _Described(BaseModel):
    """What `ImageEncoder.describe` says, as it has to be in a file that anybody may have written."""

    format: int
    backbone: str
    stem: Literal["imagenet", "small"]
    channels: Annotated[int, Field(ge=1, le=1024)]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: Annotated[int, Field(ge=1, le=16384)]


def save_encoder(folder: Path, encoder: ImageEncoder) -> None:
    """The backbone as encoder.safetensors, with config.json beside it that says how to build and feed it."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.backbone.state_dict().items()}
    write_atomically(folder / "encoder.safetensors", lambda file: file.write(save_tensors(weights)))
    text = json.dumps({"format": FORMAT} | encoder.describe(), indent=2) + "\n"
    write_atomically(folder / "config.json", lambda file: file.write(text.encode()))


def load_encoder(path: str | Path) -> ImageEncoder:
    """The encoder of a run: an eval-mode module, normalised images -> features.

    Args:
        path: the folder of a run, or any that holds `encoder.safetensors` and `config.json`.

    Raises:
        FileNotFoundError: there is no such folder, or no encoder in it yet.
        ValueError: the files are damaged or do not fit each other.

    Example:
        >>> encoder = moco.load_encoder("runs/first")                                        # doctest: +SKIP
        >>> encoder(encoder.preprocess(images)).shape                                        # doctest: +SKIP
        torch.Size([5, 512])
    """
    folder = Path(path)
    described, weights = folder / "config.json", folder / "encoder.safetensors"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; expected the folder of a run")
    for file in (described, weights):
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} has no {file.name}; expected a run that has finished or made a checkpoint"
            )
    try:
        about = _Described.model_validate_json(described.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise ValueError(f"{described} does not describe an encoder of moco ({what})") from None
    _refuse_newer(about.format, described)
    backbone = build_backbone(about.backbone, stem=about.stem, channels=about.channels)
    encoder = ImageEncoder(
        backbone,
        name=about.backbone,
        stem=about.stem,
        channels=about.channels,
        mean=about.mean,
        std=about.std,
        input_size=about.input_size,
    )
    try:
        tensors = load_tensors(weights.read_bytes())
    except Exception as error:  # safetensors has its own exception type per version
        raise ValueError(f"{weights} is damaged or no safetensors file ({_first_line(error)})") from None
    load_weights(backbone, tensors, weights)
    return encoder.eval().requires_grad_(False)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__
