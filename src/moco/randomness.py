"""The generators that training code could draw from: begun from a seed, read, and put back."""

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Starts every generator that training code could draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def state() -> dict[str, Any]:
    """Of every generator that training code could draw from, as tensors and plain values."""
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
    """Puts back what `state` gave."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
