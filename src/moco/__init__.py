"""Momentum-contrast self-supervised learning of image representations.

`import moco` is instant: torch and everything else is imported when a name is first used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moco.config import PretrainConfig
    from moco.data.packing.pack import pack
    from moco.embeddings.embed import embed
    from moco.embeddings.search import search
    from moco.embeddings.table import Embeddings
    from moco.evaluate import evaluate, knn
    from moco.evaluate.linear_fast import linear
    from moco.export import export
    from moco.method.batchnorm import SplitBatchNorm2d
    from moco.method.model import KeyQueue, info_nce
    from moco.method.optim import LARS
    from moco.method.variants import create_model
    from moco.storage.encoder_files import load_encoder
    from moco.storage.run import Run
    from moco.training.pretrain import pretrain
    from moco.views.two_views import TwoViews

_WHERE = {
    "Embeddings": "moco.embeddings.table",
    "KeyQueue": "moco.method.model",
    "LARS": "moco.method.optim",
    "PretrainConfig": "moco.config",
    "Run": "moco.storage.run",
    "SplitBatchNorm2d": "moco.method.batchnorm",
    "TwoViews": "moco.views.two_views",
    "create_model": "moco.method.variants",
    "embed": "moco.embeddings.embed",
    "evaluate": "moco.evaluate",
    "export": "moco.export",
    "info_nce": "moco.method.model",
    "knn": "moco.evaluate",
    "linear": "moco.evaluate.linear_fast",
    "load_encoder": "moco.storage.encoder_files",
    "pack": "moco.data.packing.pack",
    "pretrain": "moco.training.pretrain",
    "search": "moco.embeddings.search",
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
