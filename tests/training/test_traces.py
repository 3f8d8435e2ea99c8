"""A refactoring must not change the numbers: losses of 20 steps in fp32 on one thread, compared with committed ones.

`python tests/training/test_traces.py` writes them anew, which only a change that is meant to change them may do.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import moco
from moco.config import parse_config

TRACES = Path(__file__).with_name("traces.json")
COMMON: dict[str, Any] = {
    "epochs": 2,
    "steps": 20,
    "batch_size": 96,
    "data": {"source": "digits", "size": 12, "channels": 1},
    "views": {"recipe": "digits", "size": 8},
    "monitor": {"every": 0, "log_every": 1},
    "engine": {"accelerator": "cpu", "precision": "fp32", "threads": 1, "channels_last": False},
}
SMALL = {"backbone": "resnet-tiny", "stem": "small", "dim": 16}
QUEUE = {"queue_size": 256, "bn_splits": 4}
RUNS: dict[str, dict[str, Any]] = {
    "v1": {"model": {**SMALL, **QUEUE, "variant": "v1", "temperature": 0.07}},
    "v2": {"model": {**SMALL, **QUEUE, "variant": "v2", "symmetric": True, "momentum": 0.99}},
    "v3": {
        "model": {**SMALL, "variant": "v3", "queue_size": 0, "hidden_dim": 64, "momentum_schedule": "cosine"},
        "optim": {"name": "lars", "base_lr": 0.3, "weight_decay": 1e-6, "warmup_epochs": 1},
    },
    "v2 from files": {
        "model": {**SMALL, **QUEUE, "variant": "v2"},
        "data": {"source": "FOLDER", "memory": 1e-6, "workers": 0},
        "views": {"recipe": "v2", "size": 16},
        "optim": {"accumulate": 2, "clip_norm": 1.0},
    },
}


def processor() -> str:
    """The processor's name; the bits of a sum depend on it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    named = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines)}
    return " ".join(named.get(key, "?") for key in ("model name", "cpu family", "model", "stepping"))


def write_pictures(folder: Path) -> None:
    """960 digits in changing colours, as files."""
    folder.mkdir()
    for number, digit in enumerate(load_digits().images[:960]):
        grey = torch.tensor(digit * 15).byte().repeat_interleave(3, 0).repeat_interleave(3, 1)
        pixels = torch.stack([grey, 255 - grey, grey.roll(number % 7, 0)], dim=2)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:04}.png")


def losses(name: str, folder: Path) -> list[float]:
    config = json.loads(json.dumps(RUNS[name]).replace("FOLDER", str(folder / "pictures")))
    if name.endswith("files"):
        write_pictures(folder / "pictures")
    merged = {
        key: {**COMMON.get(key, {}), **config.get(key, {})}
        for key in (*COMMON, *config)
        if isinstance(COMMON.get(key, config.get(key)), dict)
    }
    run = moco.pretrain(parse_config({**COMMON, **merged}), out=folder / "run")
    return [row["loss"] for row in run.metrics]


@pytest.mark.parametrize("name", RUNS)
def test_the_losses_of_twenty_steps_are_those_committed(name: str, tmp_path: Path, no_pictures: None) -> None:
    committed = json.loads(TRACES.read_text())
    found, expected = losses(name, tmp_path), committed["losses"][name]
    assert len(found) == len(expected) == 20
    if (committed["processor"], committed["torch"]) == (processor(), torch.__version__):
        assert found == expected
    else:  # sums are rounded otherwise, and each step makes the difference larger
        assert found[:5] == pytest.approx(expected[:5], rel=1e-3)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as room:
        measured = {}
        for each in RUNS:
            Path(room, each).mkdir()
            measured[each] = losses(each, Path(room, each))
    TRACES.write_text(
        json.dumps({"processor": processor(), "torch": torch.__version__, "losses": measured}, indent=1) + "\n"
    )
