"""Lay out vectors on a plane so that those with similar directions are near each other."""

import importlib
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32

from moco.data.spacing import evenly
from moco.embeddings.neighbours import unit
from moco.messages import closest
from moco.packages import install

Method = Literal["tsne", "pca", "umap", "pacmap"]

LANDMARKS = 5000
"""Most vectors that a method places; any others are placed between the most similar of these."""
DIMENSIONS = 50
"""Number of principal components passed to a method."""
FEWEST = 10
"""Fewer vectors than this are placed on a ring."""
STEPS = 500
"""Iterations of t-SNE, including 250 of early exaggeration: half of the usual number, with no visible difference."""
_BLOCK = 2048
_NAMES = {"tsne": "t-SNE", "pca": "the first two principal components", "umap": "UMAP", "pacmap": "PaCMAP"}


class Places(NamedTuple):
    """Positions of vectors on a plane.

    Attributes:
        xy: positions in [0, 1], with the same scale for both axes.
        components: principal components that were passed to the method.
        notes: remarks on how the positions were found.
    """

    xy: Float32[np.ndarray, "n 2"]
    components: Float32[np.ndarray, "n d"]
    notes: tuple[str, ...]


def coordinates(
    vectors: Float[np.ndarray, "n f"], *, method: Method = "tsne", seed: int = 0, landmarks: int = LANDMARKS
) -> Places:
    """Lay out unit vectors by t-SNE (van der Maaten and Hinton 2008) or another method, after principal components.

    Args:
        vectors: one row per image; may be memory-mapped.
        method: `tsne`; `pca`, the first two components; `umap` or `pacmap`, which need the extra `maps`.
        seed: seed of all random numbers; the same seed gives the same positions.
        landmarks: most vectors that the method places directly.

    Raises:
        ValueError: there are no rows, or values are not finite.
        ImportError: the method's package is not installed.
    """
    check_method(method)
    if not len(vectors):
        raise ValueError("there are no vectors to lay out; expected at least one image")
    chosen = evenly(len(vectors), landmarks)
    components = _principal(vectors, chosen, seed)
    places, notes = _places(components, chosen, method, seed)
    low, high = places.min(axis=0), places.max(axis=0)
    side = max(float((high - low).max()), 1e-9)
    return Places((0.5 + (places - (low + high) / 2) / side).astype(np.float32), components, notes)


def check_method(method: str) -> None:
    """Raise those errors of `coordinates` that are known before anything is computed."""
    if method not in _NAMES:
        raise ValueError(
            f"unknown layout {method!r}; expected one of {', '.join(_NAMES)}{closest(method, list(_NAMES))}"
        )
    if method in ("umap", "pacmap") and find_spec(method) is None:
        raise ImportError(f"{_NAMES[method]} needs an extra: run {install('maps')}")


def _principal(vectors: np.ndarray, chosen: np.ndarray, seed: int) -> Float32[np.ndarray, "n d"]:
    """Return principal components of all unit vectors, fitted to the chosen ones."""
    from sklearn.decomposition import PCA

    sample = unit(vectors[chosen]).numpy()
    if not np.isfinite(sample).all():
        raise ValueError("some vectors are not finite; expected features of a sound encoder: embed the images again")
    if len(chosen) < 3 or np.ptp(sample, axis=0).max() < 1e-6:  # nothing to tell apart: a collapsed encoder
        return np.zeros((len(vectors), 2), dtype=np.float32)
    pca = PCA(min(DIMENSIONS, *sample.shape), svd_solver="randomized", random_state=seed).fit(sample)
    blocks = [vectors[start : start + _BLOCK] for start in range(0, len(vectors), _BLOCK)]
    return np.concatenate([pca.transform(unit(block).numpy()) for block in blocks]).astype(np.float32)


def _places(
    components: np.ndarray, chosen: np.ndarray, method: Method, seed: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the positions of all vectors, the chosen ones by the method, and notes on how they were found."""
    total, sample, name = len(components), components[chosen], _NAMES[method]
    if len(chosen) < FEWEST or not sample.any():
        turn = 2 * np.pi * np.arange(total) / total
        alike = () if sample.any() or len(chosen) < FEWEST else ("All images look the same to this encoder.",)
        return np.stack([np.cos(turn), np.sin(turn)], axis=1), alike
    if method == "pca":
        note = f"Placed by {name}: images that are near are similar in these two directions."
        return _first_two(components), (note,)
    meaning = "images that are near are similar; far distances mean little"
    placed = np.asarray(_mapping(method, sample, seed), dtype=np.float32)
    if len(chosen) == total:
        return placed, (f"Placed by {name}: {meaning}.",)
    places = np.empty((total, 2), dtype=np.float32)
    known = torch.from_numpy(sample)
    for first in range(0, total, _BLOCK):
        block = torch.from_numpy(components[first : first + _BLOCK])
        distance, nearest = torch.cdist(block, known).topk(5, largest=False)
        weight = torch.softmax(-((distance / distance[:, -1:].clamp(min=1e-12)) ** 2) * 4, dim=1).numpy()
        places[first : first + _BLOCK] = (weight[:, :, None] * placed[nearest.numpy()]).sum(axis=1)
    places[chosen] = placed
    others = f"Each of the other {total - len(chosen):,} is placed between the five most similar of these."
    return places, (f"{name} placed {len(chosen):,} images: {meaning}.", others)


def _mapping(method: Method, sample: np.ndarray, seed: int) -> Any:
    """Lay out principal components by t-SNE, UMAP or PaCMAP, each starting from the first two."""
    start = _first_two(sample)
    if method == "tsne":
        from sklearn.manifold import TSNE

        mapping = TSNE(
            init=start / start.std() * 1e-4,  # as far apart as scikit-learn puts them
            perplexity=min(30.0, (len(sample) - 1) / 3),
            max_iter=STEPS,
            random_state=seed,
            n_jobs=1,  # one map from one seed, on any number of cores
        )
        return mapping.fit_transform(sample)
    package: Any = importlib.import_module(method)
    if method == "umap":
        mapping = package.UMAP(n_neighbors=min(15, len(sample) - 1), init=start, random_state=seed, n_jobs=1)
        return mapping.fit_transform(sample)
    return package.PaCMAP(random_state=seed, apply_pca=False).fit_transform(sample, init=start)


def _first_two(components: np.ndarray) -> Float32[np.ndarray, "n 2"]:
    """Return the first two components; zeros stand for the second if there is only one."""
    return np.pad(components[:, :2], ((0, 0), (0, max(0, 2 - components.shape[1]))))
