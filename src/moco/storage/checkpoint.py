"""Reading and writing our checkpoints, which hold only tensors and plain values, and reading those of other programs.

No code from any file is run.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moco.files import write_atomically
from moco.method.model import MoCo
from moco.method.variants import build_model
from moco.storage.run import Run
from moco.storage.unpickle import first_line

log = logging.getLogger("moco")

FORMAT = 1
"""Version of the checkpoint format; raised when older versions could no longer read new files correctly."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; the previous one stays in place until the new one is complete."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT} | state, file))


def load(path: Path) -> dict[str, Any]:
    """Read one of our checkpoints onto the CPU.

    Raises:
        FileNotFoundError: it does not exist.
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
    except Exception as error:  # on bytes that are not a checkpoint, the unpickler may raise anything
        raise ValueError(f"{path} is damaged, or not a moco checkpoint ({first_line(error)})") from None
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise ValueError(f"{path} is not a moco checkpoint; give one that `moco pretrain` wrote")
    refuse_newer(state["format"], path)
    return state


def refuse_newer(number: int, path: Path) -> None:
    if number > FORMAT:
        raise ValueError(f"{path} has format {number}, but this version reads formats up to {FORMAT}; update moco")


def load_weights(module: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Load weights whose names and shapes must all match.

    Raises:
        ValueError: one line that says how many do not match, and names the first.
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
                f"{path} has another architecture: it {what} {len(names)} of {len(ours)} tensors, first "
                f"{names[0]!r}{shapes}; use the settings it was trained with"
            )
    module.load_state_dict(weights)


def load_model(run: Run) -> MoCo:
    """Load the whole model from a run's last checkpoint: both encoders, queue, predictor.

    Raises:
        ValueError: the run's settings name code, or do not fit its checkpoint.
    """
    run.refuse_code()
    model = build_model(run.config.model.model_copy(update={"pretrained": False}), channels=run.config.data.channels)
    if run.config.engine.precision == "fp64":
        model = model.double()
    load_weights(model, load(run.last)["model"], run.last)
    return model.eval().requires_grad_(False)
