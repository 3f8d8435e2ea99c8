"""Versions of packages, and how to install an extra."""

from importlib.metadata import PackageNotFoundError, version


def install(extra: str) -> str:
    """Return how to install the packages of an extra, with the released package and in a clone."""
    return f'pip install "moco-ssl[{extra}]", or in a clone: uv pip install -e ".[{extra}]"'


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed, or is run from its source folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that are involved in computing embeddings."""
    names = ("moco-ssl", "torch", "torchvision", "torchcodec", "timm", "numpy", "pillow")
    return {name: number for name in names if (number := version_of(name)) is not None}
