import importlib

import numpy as np
import pytest

from doubles import encoder, noise
from moco.embeddings.duplicates import duplicates, outliers
from moco.embeddings.embed import embed_to
from moco.embeddings.table import Embeddings

module = importlib.import_module("moco.embeddings.duplicates")


def table(vectors: np.ndarray) -> Embeddings:
    return Embeddings(vectors.astype(np.float32), tuple(map(str, range(len(vectors)))), None, None)


def cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return unit @ unit.T


def groups_by_walking(near: np.ndarray) -> list[tuple[int, ...]]:
    """Everything that can be reached over pairs that are near."""
    left, groups = set(range(len(near))), []
    while left:
        group, waiting = set(), {min(left)}
        while waiting:
            row = waiting.pop()
            group.add(row)
            waiting |= set(np.flatnonzero(near[row]).tolist()) - group
        left -= group
        groups.append(tuple(sorted(group)))
    return sorted((group for group in groups if len(group) > 1), key=lambda group: (-len(group), group[0]))


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("block", [2048, 7, 64])
def test_groups_are_what_hangs_together_by_pairs_above_the_threshold(threshold, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    vectors = np.random.default_rng(0).normal(size=(150, 4))
    found = duplicates(table(vectors), threshold)
    assert list(found) == groups_by_walking(cosines(vectors) >= threshold)
    assert found


@pytest.mark.parametrize("block", [2048, 8])
def test_exact_copies_are_found_at_a_threshold_of_one(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    vectors = np.random.default_rng(0).normal(size=(60, 33)) * 7
    vectors[[5, 50, 17]] = vectors[0]
    vectors[59] = 0.3 * vectors[30]
    assert duplicates(table(vectors), 1) == ((0, 5, 17, 50), (30, 59))


def test_images_that_were_copied_are_found_by_their_embeddings(tmp_path):
    images = noise(40)
    images[[7, 31]], images[12] = images[3].clone(), images[20].clone()
    emb = embed_to(tmp_path / "emb", encoder(), images, precision="fp32")
    assert duplicates(emb, 1.0) == duplicates(tmp_path / "emb", 1.0) == ((3, 7, 31), (12, 20))


def test_without_near_pairs_there_are_no_groups():
    assert duplicates(table(np.eye(9)), 0.9) == ()
    assert duplicates(table(np.zeros((4, 3))), 0.9) == ()


@pytest.mark.parametrize("threshold", [0, -1, 1.01, 95])
def test_a_threshold_that_is_no_similarity_is_refused(threshold):
    with pytest.raises(ValueError, match="expected a cosine similarity above 0 and up to 1, such as 0.95"):
        duplicates(table(np.eye(3)), threshold)


@pytest.mark.parametrize("block", [2048, 6])
def test_outliers_have_the_largest_mean_distance_to_their_nearest(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    vectors = np.random.default_rng(1).normal(size=(100, 5)) + 2
    similarity = cosines(vectors)
    np.fill_diagonal(similarity, -np.inf)
    wanted = 1 - np.sort(similarity, axis=1)[:, -7:].mean(axis=1)
    found = outliers(table(vectors), 12, k=7)
    np.testing.assert_array_equal(found.rows, np.argsort(-wanted)[:12])
    np.testing.assert_allclose(found.distances, np.sort(wanted)[::-1][:12], atol=1e-6)


def test_more_outliers_or_neighbours_than_images_are_all():
    vectors = np.random.default_rng(1).normal(size=(6, 5))
    assert sorted(outliers(table(vectors), 50, k=10).rows) == list(range(6))


@pytest.mark.parametrize(
    "count, n, k, message",
    [
        (1, 5, 5, "no others to compare 1 image with; expected at least 2 images"),
        (5, 0, 5, "0 outliers were asked for; expected at least 1"),
        (5, 5, 0, "outliers by 0 neighbours were asked for; expected at least 1"),
    ],
)
def test_outliers_of_nothing_are_refused(count, n, k, message):
    with pytest.raises(ValueError, match=message):
        outliers(table(np.eye(5)[:count]), n, k=k)


def test_progress_is_told():
    told = []
    duplicates(table(np.eye(9)), 0.5, on_progress=lambda *numbers: told.append(numbers))
    outliers(table(np.eye(9)), on_progress=lambda *numbers: told.append(numbers))
    assert told == [(1, 1), (9, 9)]
