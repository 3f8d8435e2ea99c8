import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import moco.embeddings.ranking as ranking_module
from doubles import encoder, noise
from moco.embeddings.embed import embed_to
from moco.embeddings.search import answer, picture, read_queries, search
from moco.embeddings.table import Embeddings, load
from moco.figures import save
from moco.storage.encoder_files import save_encoder


def table(vectors: np.ndarray) -> Embeddings:
    labels = np.arange(len(vectors)) % 3
    return Embeddings(vectors.astype(np.float32), tuple(f"p{i}" for i in range(len(vectors))), labels, ("a", "b", "c"))


def ranking(emb: Embeddings, row: int, k: int, *, farthest: bool = False) -> tuple[np.ndarray, np.ndarray]:
    vectors = np.asarray(emb.vectors, dtype=np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit[row]
    order = np.argsort(similarity if farthest else -similarity, kind="stable")
    order = order[order != row][:k]
    return order, similarity[order]


@pytest.mark.parametrize("farthest", [False, True])
@pytest.mark.parametrize("k", [1, 20, 299, 5000])
def test_the_answers_are_those_of_float64(k, farthest):
    emb = table(np.random.default_rng(0).normal(size=(300, 64)))
    found = search(emb, [3, 299, 0], k=k, farthest=farthest)
    for place, row in enumerate((3, 299, 0)):
        rows, similarities = ranking(emb, row, k, farthest=farthest)
        np.testing.assert_array_equal(found.rows[place], rows)
        np.testing.assert_allclose(found.similarities[place], similarities, rtol=0, atol=1e-14)
    assert found.queries == ("p3", "p299", "p0") and found.paths[1][0] == f"p{found.rows[1, 0]}"
    assert found.labels is not None and (found.labels == found.rows % 3).all() and found.classes == ("a", "b", "c")


def test_answers_that_float32_cannot_tell_apart_are_in_float64s_order():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(1, 512)) + 1e-4 * random.normal(size=(800, 512))
    found = search(table(vectors), 0, k=20)
    np.testing.assert_array_equal(found.rows[0], ranking(table(vectors), 0, 20)[0])


@pytest.mark.parametrize("farthest", [False, True])
def test_more_equal_answers_than_are_looked_at_are_still_in_order(farthest, monkeypatch):
    monkeypatch.setattr(ranking_module, "MARGINS", (2, 5))
    monkeypatch.setattr(ranking_module, "BLOCK", 700)
    vectors = np.random.default_rng(0).normal(size=(60, 33)).astype(np.float32)
    vectors[5:55] = vectors[5] * np.geomspace(0.1, 10, 50)[:, None]
    copies = np.random.default_rng(1).permutation(np.tile(vectors[5], (40, 1)))
    vectors[10:50] = copies
    emb = table(vectors)
    for row in (0, 20):
        found, (rows, _) = search(emb, row, k=30, farthest=farthest), ranking(emb, row, 30, farthest=farthest)
        equal = found.rows[0][(found.rows[0] >= 10) & (found.rows[0] < 50)]
        assert equal.tolist() == [each for each in range(10, 50) if each != row][: len(equal)]
        near = [set(each.tolist()) - set(range(5, 55)) for each in (found.rows[0], rows)]
        assert near[0] == near[1]


def test_an_approximate_search_ranks_what_its_graph_finds_as_float64_does(folder, tmp_path):
    pytest.importorskip("usearch", reason="needs the extra ann")
    emb = table(np.random.default_rng(0).normal(size=(3000, 24)) ** 2)
    found, want = (search(emb, list(range(0, 3000, 100)), k=10, approximate=each) for each in (True, False))
    same = sum(len(set(a) & set(b)) for a, b in zip(found.rows.tolist(), want.rows.tolist(), strict=True))
    assert same >= 0.97 * want.rows.size and not (found.rows == np.arange(0, 3000, 100)[:, None]).any()
    assert (np.diff(found.similarities) <= 0).all() and (found.similarities <= want.similarities + 1e-12).all()
    everything = search(folder, 3, k=50, approximate=True)
    np.testing.assert_array_equal(everything.rows, search(folder, 3, k=50).rows)


def test_the_graph_is_kept_beside_the_vectors_and_made_anew_where_it_does_not_fit(folder):
    pytest.importorskip("usearch", reason="needs the extra ann")
    want = search(folder, 3, k=5, approximate=True)
    (graph,) = folder.glob("graph-*.usearch")
    kept = graph.stat().st_mtime_ns
    assert search(folder, 3, k=5, approximate=True).rows.tolist() == want.rows.tolist()
    assert graph.stat().st_mtime_ns == kept
    for spoilt in (b"", b"junk", graph.read_bytes()[:100]):
        graph.write_bytes(spoilt)
        assert search(folder, 3, k=5, approximate=True).rows.tolist() == want.rows.tolist()
    assert graph.stat().st_size > 100 and not list(folder.glob(".graph*"))
    assert len(load(folder)) == 12


def test_an_approximate_search_says_what_it_cannot_do(monkeypatch):
    with pytest.raises(ValueError, match="farthest was given with approximate, which finds the most similar"):
        search(table(np.eye(4)), 0, approximate=True, farthest=True)
    monkeypatch.setitem(sys.modules, "usearch", None)
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    said = r'approximate search needs an extra: run pip install "moco-ssl\[ann\]", or in a clone: uv pip install -e'
    with pytest.raises(ImportError, match=said):
        search(table(np.eye(4)), 0, approximate=True)


def test_of_equal_answers_the_first_rows_come_first():
    found = search(table(np.ones((50, 4))), 20, k=30)
    assert found.rows[0].tolist() == [row for row in range(50) if row != 20][:30]


def test_vectors_that_are_no_numbers_are_an_error():
    vectors = np.random.default_rng(0).normal(size=(50, 4))
    vectors[17] = np.nan
    with pytest.raises(ValueError, match="the vector of a query or of row 17 is not finite"):
        search(table(vectors), 0)


@pytest.fixture(scope="module")
def folder(run: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("emb")
    embed_to(out, run, photos / "in", precision="fp32", accelerator="cpu")
    return out


def test_a_new_image_is_embedded_by_the_encoder_that_the_table_names(folder, run, photos):
    found = search(folder, photos / "new.png", k=4)
    emb = embed_to(folder, run, photos / "in", precision="fp32", accelerator="cpu")
    assert emb.encoder is not None
    with Image.open(photos / "new.png") as image:
        query = emb.encoder(emb.encoder.preprocess([image])).numpy().astype(np.float64)[0]
    unit = emb.vectors / np.linalg.norm(emb.vectors, axis=1, keepdims=True)
    similarity = unit @ (query / np.linalg.norm(query))
    assert found.rows[0].tolist() == np.argsort(-similarity)[:4].tolist()
    np.testing.assert_allclose(found.similarities[0], np.sort(similarity)[::-1][:4], atol=1e-5)
    assert found.queries == (str(photos / "new.png"),)


def test_a_picture_an_array_and_a_tensor_are_asked_about_like_the_file(folder, photos):
    want = search(folder, str(photos / "new.png"), k=12)
    with Image.open(photos / "new.png") as image:
        array = np.array(image)
        for same in (image, array, [image], torch.from_numpy(array).movedim(2, 0)):
            found = search(folder, same, k=12)
            assert found.rows.tolist() == want.rows.tolist() and found.queries == ("query 0",)
            np.testing.assert_allclose(found.similarities, want.similarities, atol=1e-6)
        several = search(folder, [photos / "new.png", 3, image], k=12)
    assert several.rows[0].tolist() == several.rows[2].tolist() == want.rows[0].tolist()


def test_a_query_that_is_in_the_table_shortens_nobody_elses_answers(folder, photos):
    found, alone = search(folder, [photos / "new.png", 3], k=50), search(folder, 3, k=50)
    assert found.rows.shape == found.similarities.shape == (2, 12) and alone.rows.shape == (1, 11)
    assert sorted(found.rows[0]) == list(range(12)) and len(found.paths[0]) == 12
    assert found.rows[1].tolist() == [*alone.rows[0], -1] and found.paths[1] == alone.paths[0]
    assert found.labels is not None and (found.labels < 0).tolist() == (found.rows < 0).tolist()
    assert np.isnan(found.similarities).tolist() == (found.rows < 0).tolist()
    figure = picture(load(folder), read_queries(load(folder), [photos / "new.png", 3]), count=50)
    assert len(figure.axes) == (1 + 12 + 12) + (1 + 11 + 11)


def test_a_file_of_the_table_is_its_row(folder, photos, monkeypatch):
    monkeypatch.chdir(photos / "in")
    row = 7
    for query in (photos / "in" / "dogs" / "07.png", "dogs/07.png", Path("dogs/07.png"), np.int64(7), np.array([7])):
        found = search(folder, query, k=11)
        assert found.rows.tolist() == search(folder, row, k=11).rows.tolist() and row not in found.rows


def test_a_table_of_a_relative_folder_is_searched_from_anywhere(run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    embed_to(tmp_path / "emb", run, "in", precision="fp32", accelerator="cpu")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    emb = load("../emb")
    assert emb.paths[7] == str(photos / "in" / "dogs" / "07.png")
    (tmp_path / "link").symlink_to(photos)
    for query in (emb.paths[7], tmp_path / "link" / "in" / "dogs" / "07.png"):
        assert 7 not in search(emb, query, k=11).rows
    figure = picture(emb, read_queries(emb, 7), count=2)
    assert all(np.ptp(np.asarray(axes.images[0].get_array())) > 0 for axes in figure.axes)


def test_a_query_that_cannot_be_read_is_named(folder, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    for name in ("cut.png", "none.png"):
        with pytest.raises(ValueError, match=f"{name}' cannot be read as an image"):
            search(folder, tmp_path / name)


@pytest.mark.parametrize("row", [-1, 12])
def test_a_row_that_is_not_there_is_refused(row, folder):
    with pytest.raises(ValueError, match=f"row {row} was asked for; expected 0 to 11"):
        search(folder, row)


@pytest.mark.parametrize("query", [True, [1, False], np.array([True])])
def test_yes_and_no_are_no_rows(query, folder):
    with pytest.raises(ValueError, match="a query is (True|False); expected an image file, an image or a row number"):
        search(folder, query)


def test_no_query_and_no_answers_are_refused(folder):
    with pytest.raises(ValueError, match="there is no query; expected an image file"):
        search(folder, [])
    with pytest.raises(ValueError, match="k is 0; expected at least 1"):
        search(folder, 1, k=0)


def test_an_encoder_that_was_trained_on_is_refused(run, photos, tmp_path):
    from moco import load_encoder

    own = tmp_path / "run"
    own.mkdir()
    save_encoder(own, load_encoder(run))
    embed_to(tmp_path / "emb", own, photos / "in", accelerator="cpu")
    other = load_encoder(run)
    next(other.parameters()).data.mul_(1.01)
    save_encoder(own, other)
    with pytest.raises(ValueError, match="is not what .*emb was embedded with .its hash differs") as error:
        search(tmp_path / "emb", photos / "new.png")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="the encoder is not what .*emb was embedded with"):
        search(tmp_path / "emb", photos / "new.png", encoder=other)
    assert search(tmp_path / "emb", photos / "new.png", encoder=run).rows.shape == (1, 10)  # the same, elsewhere
    assert search(tmp_path / "emb", 0).rows.shape == (1, 10)  # needs none
    (own / "config.json").unlink()
    with pytest.raises(ValueError, match="was embedded with .*run, which is no longer there .*give the encoder"):
        search(tmp_path / "emb", photos / "new.png")


def test_embeddings_in_memory_search_with_their_encoder_or_ask_for_it():
    import moco

    network, images = encoder(), noise(20)
    emb = moco.embed(network, images, precision="fp32")
    assert search(emb, images[4], k=1).rows.tolist() == [[4]]
    with pytest.raises(ValueError, match="do not say which encoder computed them; give the encoder"):
        search(table(np.eye(9)), images[4])
    with pytest.raises(ValueError, match="the encoder gives 6 features, these embeddings have 9"):
        search(table(np.eye(9)), images[4], encoder=network)


def test_the_picture_shows_the_query_and_both_ends_with_class_and_score_in_their_proportions(folder, photos, tmp_path):
    emb = load(folder)
    queries = read_queries(emb, [photos / "new.png", 7])
    figure = picture(emb, queries, count=3)
    written = [text.get_text() for text in figure.texts[3:]]  # behind the headings
    near, far = (answer(emb, queries, k=3, farthest=farthest) for farthest in (False, True))
    assert near.labels is not None and emb.classes is not None
    for query, name in enumerate(("new.png", "dogs")):
        want = [name]
        for found in (near, far):
            assert found.labels is not None
            pairs = zip(found.labels[query], found.similarities[query], strict=True)
            want += [text for label, similarity in pairs for text in (emb.classes[label], f"{similarity:.2f}")]
        assert written[13 * query : 13 * query + 13] == want
    shapes = [np.asarray(axes.images[0].get_array()).shape[:2] for axes in figure.axes]
    assert shapes[0] == (16, 40) and shapes[7] == (37, 20)
    for axes in figure.axes:
        assert axes.get_aspect() == 1
    save(figure, tmp_path / "search.png")
    with Image.open(tmp_path / "search.png") as image:
        assert image.size[0] > 700


def test_images_that_are_gone_are_grey_in_the_picture():
    figure = picture(table(np.eye(9)), read_queries(table(np.eye(9)), 4), count=2)
    assert len(figure.axes) == 5
    assert all((np.asarray(axes.images[0].get_array()) == 128).all() for axes in figure.axes)
