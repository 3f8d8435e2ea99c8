"""Images that a program hands over: tensors, arrays, lists of pictures, datasets."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moco.data.decode import with_channels
from moco.data.images import ArrayImages, FileImages, Images
from moco.data.places.array_rows import planes
from moco.views.pixels import pixels_of


def as_images(given: Any, *, channels: int = 3) -> Images:
    """Images from whatever holds them.

    Args:
        given: uint8 tensor `[n, c, h, w]` or `[n, h, w]`; uint8 array `[n, h, w, c]`, `[n, h, w]` or, where the second
            axis alone can be that of the channels, `[n, c, h, w]`; PIL images; a map-style dataset of PIL images or
            uint8 tensors, alone or as (image, label); or what `load_data` gives.
        channels: of the result; grey is repeated to 3, colour averaged to 1. PIL images have 1 or 3.

    Raises:
        ValueError: none of these, no images, or images of several sizes.
    """
    if isinstance(given, ArrayImages | FileImages):
        if given.channels != channels:
            raise ValueError(
                f"images have {given.channels} channels; expected {channels}: load them with --data.channels {channels}"
            )
        return given
    return array_images(given, channels)


def array_images(given: Any, channels: int) -> ArrayImages:
    """Return images in memory from what `as_images` takes, except a set of images."""
    labels = None
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8:
            raise ValueError(f"images are {given.dtype} of shape {given.shape}; expected uint8 [n, h, w, c], n > 0")
        # torch refuses reversed axes and warns of read-only memory, such as a mapped file's.
        shareable = given.flags.writeable and min(given.strides, default=0) >= 0
        pixels = torch.from_numpy(given if shareable else given.copy())
        pixels = torch.from_numpy(planes(pixels.numpy(), channels)) if pixels.ndim in (3, 4) else pixels
    elif isinstance(given, Tensor):
        pixels = given[:, None] if given.ndim == 3 else given
    elif hasattr(given, "__getitem__") and hasattr(given, "__len__") and not isinstance(given, str | bytes | dict):
        pixels, labels = _from_sequence(given, channels)
    else:
        raise ValueError(
            f"images are {type(given).__name__}; expected a tensor, an array, a list of PIL images or a Dataset"
        )
    if pixels.ndim != 4 or pixels.dtype != torch.uint8 or len(pixels) == 0:
        raise ValueError(
            f"images are {pixels.dtype} of shape {tuple(pixels.shape)}; expected uint8 [n, c, h, w], n > 0"
        )
    pixels = with_channels(pixels, channels)
    classes = None if labels is None else tuple(str(number) for number in range(int(labels.max()) + 1))
    return ArrayImages(pixels.contiguous(), labels, classes, tuple(str(number) for number in range(len(pixels))))


def _from_sequence(given: Any, channels: int) -> tuple[Tensor, Tensor | None]:
    pictures, labels = [], []
    for index in range(len(given)):
        item = given[index]
        if isinstance(item, tuple | list) and len(item) == 2:
            item, label = item
            labels.append(-1 if label is None else int(label))
        if isinstance(item, Image.Image):
            item = torch.from_numpy(pixels_of(item, channels))
        if not isinstance(item, Tensor):
            raise ValueError(
                f"image {index} is a {type(item).__name__}; expected a PIL image or a uint8 tensor [c, h, w]"
            )
        pictures.append(item)
        if item.shape != pictures[0].shape:
            raise ValueError(
                f"image {index} is {tuple(item.shape)}, the first {tuple(pictures[0].shape)}; expected one size: "
                "resize them, or put them into a folder, where sizes may differ"
            )
    if not pictures:
        raise ValueError("there are no images in the list; expected at least one")
    # Datasets mark a picture without label by None or -1.
    labelled = len(labels) == len(pictures) and min(labels) >= 0
    return torch.stack(pictures), torch.tensor(labels) if labelled else None
