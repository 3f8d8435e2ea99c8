import sys

import numpy as np
import pytest

from moco.embeddings.coordinates import coordinates


def groups(number: int = 30) -> np.ndarray:
    """Three directions, and vectors of any length about each."""
    rng = np.random.default_rng(0)
    centres = np.eye(3, 16, dtype=np.float32)
    vectors = [centre + 0.05 * rng.standard_normal((number, 16), dtype=np.float32) for centre in centres]
    return np.concatenate(vectors) * rng.uniform(0.1, 10, (3 * number, 1)).astype(np.float32)


@pytest.mark.parametrize("method", ["tsne", "pca", "umap", "pacmap"])
def test_vectors_of_similar_direction_lie_together_by_every_method(method):
    if method in ("umap", "pacmap"):
        pytest.importorskip(method)
    vectors = groups()
    places = coordinates(vectors, method=method).xy
    assert places.shape == (90, 2) and places.min() >= 0 and places.max() <= 1
    parts = places.reshape(3, 30, 2)
    middles = parts.mean(axis=1)
    within = np.linalg.norm(parts - middles[:, None], axis=2).max()
    between = min(np.linalg.norm(middles[i] - middles[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert between > 2 * within
    np.testing.assert_array_equal(places, coordinates(vectors, method=method).xy)


@pytest.mark.parametrize("method", ["umap", "pacmap"])
def test_a_method_whose_package_is_missing_names_the_extra(method, monkeypatch):
    monkeypatch.setitem(sys.modules, method, None)
    with pytest.raises(ImportError, match=r'pip install "moco-ssl\[maps\]"'):
        coordinates(groups(5), method=method)


def test_of_many_vectors_some_are_placed_and_the_others_lie_between_them():
    found = coordinates(groups(), landmarks=30)
    assert any("30 images" in note for note in found.notes) and any("other 60" in note for note in found.notes)
    parts = found.xy.reshape(3, 30, 2)
    middles = np.median(parts, axis=1)
    assert (np.linalg.norm(found.xy[:, None] - middles, axis=2).argmin(axis=1) == np.repeat([0, 1, 2], 30)).all()


@pytest.mark.parametrize("vectors", [np.ones((1, 4)), np.ones((30, 4)), np.zeros((3, 4)), np.eye(2, 1), np.eye(5)])
def test_few_or_equal_vectors_have_places_too(vectors):
    places = coordinates(vectors.astype(np.float32)).xy
    assert places.shape == (len(vectors), 2) and np.isfinite(places).all()
    assert places.min() >= 0 and places.max() <= 1


def test_what_is_no_vector_is_refused():
    with pytest.raises(ValueError, match="no vectors"):
        coordinates(np.zeros((0, 4), dtype=np.float32))
    with pytest.raises(ValueError, match="not finite"):
        coordinates(np.full((20, 4), np.nan, dtype=np.float32))
