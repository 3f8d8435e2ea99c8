"""Momentum-contrast self-supervised learning of image representations.

`import moco` is instant: torch and everything else is imported when a name is first used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moco.batchnorm import SplitBatchNorm2d
    from moco.checkpoint import load_encoder
    from moco.config import PretrainConfig
    from moco.embed import Embeddings, embed
    from moco.evaluate import evaluate, knn
    from moco.evaluate.probe import linear
    from moco.export import export
    from moco.model import KeyQueue, info_nce
    from moco.optim import LARS
    from moco.pack import pack
    from moco.pretrain import pretrain
    from moco.run import Run
    from moco.search import search
    from moco.variants import create_model
    from moco.views import TwoViews

_WHERE = {
    "Embeddings": "moco.embed",
    "KeyQueue": "moco.model",
    "LARS": "moco.optim",
    "PretrainConfig": "moco.config",
    "Run": "moco.run",
    "SplitBatchNorm2d": "moco.batchnorm",
    "TwoViews": "moco.views",
    "create_model": "moco.variants",
    "embed": "moco.embed",
    "evaluate": "moco.evaluate",
    "export": "moco.export",
    "info_nce": "moco.model",
    "knn": "moco.evaluate",
    "linear": "moco.evaluate.probe",
    "load_encoder": "moco.checkpoint",
    "pack": "moco.pack",
    "pretrain": "moco.pretrain",
    "search": "moco.search",
}
__all__ = [  # noqa: PLE0604
    "LARS",
    "Embeddings",
    "KeyQueue",
    "PretrainConfig",
    "Run",
    "SplitBatchNorm2d",
    "TwoViews",
    "create_model",
    "embed",
    "evaluate",
    "export",
    "info_nce",
    "knn",
    "linear",
    "load_encoder",
    "pack",
    "pretrain",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'moco' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """`moco.embed` is the function, also after the file of that name has been imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
