"""The published augmentations as data, by name."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from moco.config import ViewsConfig
from moco.messages import closest

# Mean and standard deviation of each channel.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ViewSpec:
    """How one view is made: the operations, their probabilities (`flip` and names in `_p`) and their strengths."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Fraction of the image's area that the crop keeps."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Strength of brightness, contrast, saturation and hue, applied in random order."""
    jitter_p: float = 0.8
    grey_p: float = 0.2
    grey_first: bool = False
    """Convert to grey before the jitter (v1) instead of after it."""
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Pixels."""
    solarize_p: float = 0.0
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]


_V1 = ViewSpec(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, grey_first=True)
_V2 = ViewSpec(blur_p=0.5)
_V3 = ViewSpec(jitter=(0.4, 0.4, 0.2, 0.1), blur_p=1.0)
_CIFAR = ViewSpec(crop_scale=(0.08, 1.0), mean=CIFAR10[0], std=CIFAR10[1])
_DIGITS = ViewSpec(crop_scale=(0.4, 1.0), flip=0.0, jitter=(0.4, 0.4, 0, 0), grey_p=0.0, mean=HALF[0], std=HALF[1])

VIEWS: dict[str, Callable[[], tuple[ViewSpec, ViewSpec]]] = {
    "v1": lambda: (_V1, _V1),
    "v2": lambda: (_V2, _V2),
    "v3": lambda: (_V3, replace(_V3, blur_p=0.1, solarize_p=0.2)),
    "cifar": lambda: (_CIFAR, _CIFAR),
    "digits": lambda: (_DIGITS, _DIGITS),
}


def view_specs(config: ViewsConfig) -> tuple[ViewSpec, ViewSpec]:
    """Return the specifications of the two views, from `VIEWS` or from a user's `package.module:function`.

    Raises:
        ValueError: the name is unknown, or the function cannot be imported or does not return a pair of `ViewSpec`.
    """
    if config.recipe in VIEWS:
        specs = VIEWS[config.recipe]()
    elif ":" in config.recipe:
        specs = _imported(config.recipe)
    else:
        raise ValueError(
            f"unknown views.recipe {config.recipe!r}: expected one of {', '.join(VIEWS)}, or package.module:function"
            + closest(config.recipe, list(VIEWS))
        )
    if config.crop_min is not None:
        first, second = (replace(spec, crop_scale=(config.crop_min, spec.crop_scale[1])) for spec in specs)
        specs = first, second
    return specs


def _imported(name: str) -> tuple[ViewSpec, ViewSpec]:
    module, _, function = name.partition(":")
    try:
        specs = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"views.recipe {name!r} cannot be imported ({error}); expected package.module:function, on the Python path"
        ) from error
    if not (isinstance(specs, tuple) and len(specs) == 2 and all(isinstance(spec, ViewSpec) for spec in specs)):
        raise ValueError(f"views.recipe {name!r} returns {specs!r:.80}; expected a pair of moco.views.ViewSpec")
    return specs
