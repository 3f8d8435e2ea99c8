"""Some of many, from everywhere."""

import numpy as np
from jaxtyping import Int64


def evenly(total: int, most: int) -> Int64[np.ndarray, " m"]:
    """Numbers below `total`, ascending: all, or so many at even distances, the first and the last among them."""
    return np.linspace(0, total - 1, min(total, most)).round().astype(np.int64)
