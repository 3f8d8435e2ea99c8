"""Seeding, saving and restoring the random generators that training code could use."""

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed every generator that training code could use."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def state() -> dict[str, Any]:
    """The state of every generator that training code could use, as tensors and plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    held: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
    }
    if torch.cuda.is_available():
        held["cuda"] = torch.cuda.get_rng_state()
    return held


def restore(state: dict[str, Any]) -> None:
    """Restore a state returned by `state`."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
