"""Evenly spaced selections."""

import numpy as np
from jaxtyping import Int64


def evenly(total: int, most: int) -> Int64[np.ndarray, " m"]:
    """Evenly spaced indices below `total`, in ascending order: at most `most`, including the first and the last."""
    return np.linspace(0, total - 1, min(total, most)).round().astype(np.int64)
