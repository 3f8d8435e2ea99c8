"""Images -> features, in order."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moco.config import DataConfig
from moco.data import ArrayImages, Images, as_images, load_data, resized
from moco.encoder import ImageEncoder
from moco.transforms import normalise

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Embeddings:
    """One row per image, in the order of the images.

    Attributes:
        vectors: float32 `[N, F]`.
        paths: a name per row.
        labels: class numbers `[N]`, or None.
        classes: names of the class numbers, or None.
    """

    vectors: np.ndarray
    paths: tuple[str, ...]
    labels: np.ndarray | None
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.vectors)


def embed(
    encoder: ImageEncoder,
    images: "Images | Tensor | np.ndarray | list[Any] | Dataset[Any] | str | Path",
    *,
    batch_size: int = 256,
    precision: str = "auto",
    on_progress: Report | None = None,
) -> Embeddings:
    """Features of all images.

    Args:
        encoder: what `load_encoder` gives, on the device that is to do the work.
        images: a folder or data name (its training part, if it has parts), uint8 tensor `[n, c, h, w]`, array
            `[n, h, w, c]`, list of PIL images, map-style dataset, or what `load_data` gives.
        batch_size: images at a time.
        precision: `fp32`, `bf16`, or `auto`: bf16 where it is fast.
        on_progress: called with (images done, images in all).

    Raises:
        ValueError: not images, images of several sizes that are in no folder, or another precision.

    Example:
        >>> emb = moco.embed(encoder, "photos/")                                             # doctest: +SKIP
        >>> emb.vectors.shape, emb.paths[0]                                                  # doctest: +SKIP
        ((1200, 512), 'photos/cat.jpg')
    """
    if isinstance(images, str | Path):
        images = load_data(DataConfig.model_validate({"source": str(images), "channels": encoder.channels})).train
    images = as_images(images, channels=encoder.channels)
    return Embeddings(
        vectors=features(encoder, images, batch_size=batch_size, precision=precision, on_progress=on_progress).numpy(),
        paths=images.paths,
        labels=None if images.labels is None else images.labels.numpy(),
        classes=images.classes,
    )


@torch.inference_mode()
def features(
    encoder: ImageEncoder,
    images: Images,
    *,
    batch_size: int = 256,
    precision: str = "auto",
    on_progress: Report | None = None,
) -> Tensor:
    """The same as a float32 tensor `[n, f]` on the CPU; the encoder is left in the mode it was in."""
    from moco.engine import choose_precision

    if precision not in ("auto", "fp32", "bf16", "fp64"):
        raise ValueError(f"precision is {precision!r}; expected fp32, bf16 or auto")
    first = next(encoder.parameters())
    kind = choose_precision(first.device.type) if precision == "auto" else precision
    was_training = encoder.training
    encoder.eval()
    out = torch.empty(len(images), encoder.num_features)
    layout = torch.channels_last if kind == "bf16" else torch.contiguous_format
    try:
        for start in range(0, len(images), batch_size):
            which = range(start, min(start + batch_size, len(images)))
            pixels = resized(images, list(which), size=encoder.input_size).to(first.device)
            batch = normalise(pixels, encoder.mean, encoder.std).to(first.dtype).to(memory_format=layout)
            with torch.autocast(first.device.type, dtype=torch.bfloat16, enabled=kind == "bf16"):
                out[start : which.stop] = encoder(batch).float().cpu()
            if on_progress:
                on_progress(which.stop, len(images))
    finally:
        encoder.train(was_training)
    return out


def pixels(images: Images, *, size: int) -> Tensor:
    """Raw pixels as features, float32 `[n, c * size * size]` in [0, 1]: what an encoder has to beat."""
    if isinstance(images, ArrayImages) and tuple(images.images.shape[2:]) == (size, size):
        return images.images.flatten(1).float() / 255
    return resized(images, list(range(len(images))), size=size).flatten(1).float() / 255
