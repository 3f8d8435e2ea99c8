"""Versions of packages, and how to install an extra."""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version


def install(extra: str) -> str:
    """How to install the packages of an extra, for whoever has the released package and for whoever has a clone."""
    return f'pip install "moco-ssl[{extra}]", or in a clone: uv pip install -e ".[{extra}]"'


def versions() -> dict[str, str]:
    """Versions of the packages involved in computing embeddings."""
    found = {}
    for name in ("moco-ssl", "torch", "torchvision", "torchcodec", "timm", "numpy", "pillow"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
