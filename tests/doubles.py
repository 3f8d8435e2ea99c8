"""What several tests need in place of the real thing, or to watch a run."""

import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moco.method.encoder import ImageEncoder
from moco.storage import checkpoint
from moco.storage.run import Run
from small import SmallBackbone


def leave_out_pictures(patch: pytest.MonkeyPatch) -> None:
    """Train without drawing: pictures take seconds of each run, and have tests of their own."""
    for module, names in (("pretrain", ("draw_results", "draw_start", "refresh")), ("loop", ("refresh",))):
        for name in names:
            patch.setattr(importlib.import_module(f"moco.training.{module}"), name, lambda *_, **__: None)


def wait_for_step(run: Path, step: int, *, at_most: float = 240) -> None:
    """Wait until metrics.csv has a whole row of this step or a later one."""
    end, table = time.monotonic() + at_most, run / "metrics.csv"
    while time.monotonic() < end:
        rows = table.read_text().splitlines()[1:] if table.is_file() else []
        if any(int(row.split(",")[0] or 0) >= step for row in rows if row.count(",") > 5):
            return
        time.sleep(0.005)
    raise AssertionError(f"no step {step} within {at_most} s")


def encoder() -> ImageEncoder:
    """An encoder of a few weights, always the same."""
    torch.manual_seed(0)
    about: dict[str, Any] = {"channels": 3, "mean": (0.5,) * 3, "std": (0.25,) * 3, "input_size": 12}
    return ImageEncoder(SmallBackbone(), name="own", stem="small", **about).eval()


def noise(count: int, side: int = 12) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (20, 14)) -> None:
    """Write a PNG of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")


def official(run: Run, *, epoch: int) -> dict[str, Any]:
    """A run's last checkpoint as the official code would have written it, one update of the key encoder before."""
    state, variant = checkpoint.load(run.last), run.config.model.variant
    ours: dict[str, torch.Tensor] = state["model"]
    sides = ("base_encoder", "momentum_encoder") if variant == "v3" else ("encoder_q", "encoder_k")
    named: dict[str, torch.Tensor] = {}
    momentum = run.config.model.momentum
    if run.config.model.momentum_schedule == "cosine":
        momentum = 1 - 0.5 * (1 + np.cos(np.pi * epoch / run.config.epochs)) * (1 - momentum)
    for side, theirs in zip(("query_encoder", "key_encoder"), sides, strict=True):
        for name, tensor in ours.items():
            if name.startswith(side):
                inner = name.removeprefix(f"{side}.").replace("backbone.", "").replace("projector.", "fc.")
                if side == "key_encoder" and not name.endswith(("_mean", "_var", "_tracked")):
                    query = ours[name.replace("key_encoder", "query_encoder")]
                    tensor = (tensor - (1 - momentum) * query) / momentum
                named[f"module.{theirs}.{inner}"] = tensor
    if variant == "v3":
        named |= {f"module.{name}": tensor for name, tensor in ours.items() if name.startswith("predictor.")}
    else:
        named |= {"module.queue": ours["queue.keys"].T, "module.queue_ptr": ours["queue.pointer"].reshape(1)}
    buffers = ("running_mean", "running_var", "num_batches_tracked", "queue", "queue_ptr")
    parameters = [name for name in named if not name.endswith(buffers)]
    trained = [number for number, name in enumerate(parameters) if sides[1] not in name]
    lars = run.config.optim.name == "lars"
    states = {
        trained[number]: {"mu" if lars else key: value for key, value in each.items()}
        for number, each in state["optimizer"]["state"].items()
    }
    groups = [{"lr": 0.123, "params": list(range(len(parameters)))}]
    return {
        "epoch": epoch,
        "arch": "resnet-tiny",
        "state_dict": named,
        "optimizer": {"state": states, "param_groups": groups},
        "scaler": {"scale": 65536.0},
    }
