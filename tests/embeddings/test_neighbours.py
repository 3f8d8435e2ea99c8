import numpy as np
import pytest
import torch

from moco.embeddings.neighbours import nearest


def reference(bank: np.ndarray, queries: np.ndarray, k: int, own: np.ndarray | None = None):
    bank, queries = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (bank, queries))
    similarity = queries @ bank.T
    if own is not None:
        asked = np.flatnonzero(own >= 0)
        similarity[asked, own[asked]] = -np.inf
    order = np.argsort(-similarity, axis=1)[:, :k]
    return order, np.take_along_axis(similarity, order, axis=1)


def sets(dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    bank, queries = (random.normal(size=(n, 6)) * random.uniform(0.1, 9, (n, 1)) for n in (90, 13))
    return bank.astype(dtype), queries.astype(dtype)


@pytest.mark.parametrize("k", [1, 7, 90, 1000])
@pytest.mark.parametrize("numbers", [2**26, 500, 30])
@pytest.mark.parametrize("at_once", [1024, 5])
def test_the_nearest_are_those_of_the_whole_matrix_of_cosines(k, numbers, at_once):
    bank, queries = sets()
    for given in (bank, torch.from_numpy(bank)):
        found = nearest(given, torch.from_numpy(queries), k, at_once=(at_once, numbers))
        order, similarity = reference(bank, queries, k)
        np.testing.assert_array_equal(found.index.numpy(), order)
        np.testing.assert_allclose(found.similarity.numpy(), similarity, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("numbers", [2**26, 30])
def test_the_row_that_a_query_is_does_not_find_itself(numbers):
    bank, queries = sets()
    own = np.array([0, 5, -1, 89, 40, -1, 7, 8, 9, 10, 11, 12, 13])
    queries[own >= 0] = bank[own[own >= 0]]
    found = nearest(bank, torch.from_numpy(queries), 6, own=torch.from_numpy(own), at_once=(4, numbers))
    np.testing.assert_array_equal(found.index.numpy(), reference(bank, queries, 6, own)[0])
    assert not (found.index.numpy() == own[:, None]).any()


def test_a_mapped_table_is_read_only_and_stays_so(tmp_path):
    bank, queries = sets(np.float32)
    np.save(tmp_path / "bank.npy", bank)
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    found = nearest(mapped, torch.from_numpy(queries), 3)
    assert found.index.equal(nearest(bank, torch.from_numpy(queries), 3).index)
    np.testing.assert_array_equal(mapped, bank)
