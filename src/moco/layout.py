"""Places on a plane at which vectors of similar direction lie near each other."""

import importlib
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from moco.spacing import evenly

Method = Literal["tsne", "pca", "umap", "pacmap"]

LANDMARKS = 5000
"""Vectors that a method places; of more, the others are put between the landmarks most like them."""
DIMENSIONS = 50
"""Principal components that a method sees."""
FEWEST = 10
"""Vectors below which a ring shows each."""
STEPS = 500
"""Of t-SNE, of which 250 are its early exaggeration: half as many as usual, for a picture as good to the eye."""
_BLOCK = 2048
_NAMES = {"tsne": "t-SNE", "pca": "the first two principal components", "umap": "UMAP", "pacmap": "PaCMAP"}


class Places(NamedTuple):
    """Where vectors lie.

    Attributes:
        xy: in [0, 1], one scale for both axes.
        components: principal components, which the method saw.
        notes: how the places were found, for people.
    """

    xy: Float32[np.ndarray, "n 2"]
    components: Float32[np.ndarray, "n d"]
    notes: tuple[str, ...]


def coordinates(
    vectors: Float[np.ndarray, "n f"], *, method: Method = "tsne", seed: int = 0, landmarks: int = LANDMARKS
) -> Places:
    """Unit length, principal components, then t-SNE (van der Maaten and Hinton 2008) or another method.

    Args:
        vectors: one row per image; may be memory-mapped.
        method: `tsne`; `pca`, the first two components alone; `umap` or `pacmap`, of the extra `maps`.
        seed: of every draw; the same places each time.
        landmarks: most vectors that the method places.

    Raises:
        ValueError: no rows, or numbers that are not finite.
        ImportError: the method's package is not installed.
    """
    if not len(vectors):
        raise ValueError("there are no vectors to lay out; expected at least one image")
    chosen = evenly(len(vectors), landmarks)
    components = _principal(vectors, chosen, seed)
    places, notes = _places(components, chosen, method, seed)
    low, high = places.min(axis=0), places.max(axis=0)
    side = max(float((high - low).max()), 1e-9)
    return Places((0.5 + (places - (low + high) / 2) / side).astype(np.float32), components, notes)


def _principal(vectors: np.ndarray, chosen: np.ndarray, seed: int) -> Float32[np.ndarray, "n d"]:
    from sklearn.decomposition import PCA

    sample = _unit(vectors[chosen]).numpy()
    if not np.isfinite(sample).all():
        raise ValueError("the vectors hold numbers that are not finite; expected features of a trained encoder")
    if len(chosen) < 3 or np.ptp(sample, axis=0).max() < 1e-6:  # nothing to tell apart: an encoder that collapsed
        return np.zeros((len(vectors), 2), dtype=np.float32)
    pca = PCA(min(DIMENSIONS, *sample.shape), svd_solver="randomized", random_state=seed).fit(sample)
    blocks = [vectors[start : start + _BLOCK] for start in range(0, len(vectors), _BLOCK)]
    return np.concatenate([pca.transform(_unit(block).numpy()) for block in blocks]).astype(np.float32)


def _unit(vectors: np.ndarray) -> Float[Tensor, "n f"]:
    # A copy of a mapped block, for torch warns of memory that it must not write to.
    return F.normalize(torch.from_numpy(np.array(vectors, dtype=np.float32)), dim=1)


def _places(
    components: np.ndarray, chosen: np.ndarray, method: Method, seed: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    total, sample = len(components), components[chosen]
    if len(chosen) < FEWEST or not sample.any():
        turn = 2 * np.pi * np.arange(total) / total
        alike = () if sample.any() or len(chosen) < FEWEST else ("All images look the same to this encoder.",)
        return np.stack([np.cos(turn), np.sin(turn)], axis=1), alike
    if method == "pca":
        placed = _first_two(components)
        return placed, (f"Placed by {_NAMES[method]}: near means alike as far as two directions tell.",)
    placed = np.asarray(_mapping(method, sample, seed), dtype=np.float32)
    if len(chosen) == total:
        return placed, (f"Placed by {_NAMES[method]}: near means alike, far says little.",)
    places = np.empty((total, 2), dtype=np.float32)
    known = torch.from_numpy(sample)
    for first in range(0, total, _BLOCK):
        block = torch.from_numpy(components[first : first + _BLOCK])
        distance, nearest = torch.cdist(block, known).topk(5, largest=False)
        weight = torch.softmax(-((distance / distance[:, -1:].clamp(min=1e-12)) ** 2) * 4, dim=1).numpy()
        places[first : first + _BLOCK] = (weight[:, :, None] * placed[nearest.numpy()]).sum(axis=1)
    places[chosen] = placed
    others = f"The other {total - len(chosen):,} lie between the five of them most like them."
    return places, (f"{_NAMES[method]} placed {len(chosen):,} images: near means alike, far says little.", others)


def _mapping(method: Method, sample: np.ndarray, seed: int) -> Any:
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
    if method not in _NAMES:
        raise ValueError(f"no way {method!r} to lay out a map; expected one of {', '.join(_NAMES)}")
    try:
        package: Any = importlib.import_module(method)
    except ImportError as error:
        raise ImportError(f"a map by {_NAMES[method]} needs an extra: pip install moco-ssl[maps] ({error})") from None
    if method == "umap":
        mapping = package.UMAP(n_neighbors=min(15, len(sample) - 1), init=start, random_state=seed, n_jobs=1)
        return mapping.fit_transform(sample)
    return package.PaCMAP(random_state=seed, apply_pca=False).fit_transform(sample, init=start)


def _first_two(components: np.ndarray) -> Float32[np.ndarray, "n 2"]:
    start = np.zeros((len(components), 2), dtype=np.float32)
    start[:, : components.shape[1]] = components[:, :2]
    return start
