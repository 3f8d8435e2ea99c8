"""Momentum contrast: the model, its encoders, batch norm and optimizers."""

from typing import Any

__all__ = ["vision_transformer"]


def __getattr__(name: str) -> Any:
    if name != "vision_transformer":
        raise AttributeError(f"module 'moco.method' has no attribute {name!r}")
    from moco.method.vit import vision_transformer  # with timm, which takes seconds that model.py need not wait for

    return vision_transformer
