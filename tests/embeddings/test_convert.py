import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from doubles import encoder, noise, picture
from moco.embeddings.convert import check_format, convert
from moco.embeddings.embed import embed_to
from moco.embeddings.table import Embeddings, load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(("a", "tab\tand\nline", 'quote"', "東京", "\udcff", "z")):
        picture(home / "photos" / ("cats" if seed < 2 else "dogs") / f"{name}.png", seed)
    embed_to(home / "emb", encoder(), home / "photos", precision="fp32")
    return home / "emb"


def assert_same(emb: Embeddings, paths: list[str], labels: list[int], classes: list[str], vectors: object) -> None:
    assert emb.labels is not None and emb.classes is not None
    assert paths == [path.replace("\udcff", "\\xff") for path in emb.paths]
    assert labels == emb.labels.tolist() and classes == [emb.classes[label] for label in emb.labels]
    np.testing.assert_array_equal(np.array(vectors, dtype=np.float32), emb.vectors)


@pytest.mark.parametrize("block", [2**24, 12])
def test_parquet_holds_a_row_per_image(block, folder, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    monkeypatch.setattr("moco.embeddings.convert.BLOCK", block)
    path = convert(folder, "parquet")
    assert path == folder / "embeddings.parquet"
    rows = parquet.read_table(path).to_pydict()
    assert list(rows) == ["path", "label", "class", "vector"]
    assert_same(load(folder), rows["path"], rows["label"], rows["class"], rows["vector"])
    assert parquet.ParquetFile(path).schema_arrow.field("vector").type.list_size == 6


def test_pandas_polars_and_duckdb_read_the_parquet_file(folder):
    pytest.importorskip("pyarrow", reason="needs the extra parquet")
    path, emb = convert(folder, "parquet"), load(folder)
    frame = pytest.importorskip("pandas").read_parquet(path)
    assert_same(emb, list(frame["path"]), list(frame["label"]), list(frame["class"]), np.stack(frame["vector"]))
    frame = pytest.importorskip("polars").read_parquet(path)
    assert_same(emb, *(frame[name].to_list() for name in ("path", "label", "class", "vector")))
    with pytest.importorskip("duckdb").connect() as database:
        rows = database.execute(f"select path, label, class, vector from '{path}'").fetchall()
    assert_same(emb, *(list(column) for column in zip(*rows, strict=True)))


def test_parquet_of_images_without_labels_has_nulls(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    embed_to(tmp_path / "emb", encoder(), noise(5))
    rows = parquet.read_table(convert(tmp_path / "emb", "parquet")).to_pydict()
    assert rows["path"] == list("01234") and rows["label"] == rows["class"] == [None] * 5


def test_parquet_without_its_extra_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for call in (lambda: convert(folder, "parquet"), lambda: check_format("parquet")):
        with pytest.raises(ImportError, match=r'Parquet needs an extra: run pip install "moco-ssl\[parquet\]"'):
            call()


def test_the_projector_gets_vectors_names_and_thumbnails(folder):
    out, emb = convert(folder, "tensorboard"), load(folder)
    np.testing.assert_array_equal(np.loadtxt(out / "tensors.tsv", dtype=np.float32, delimiter="\t"), emb.vectors)
    lines = (out / "metadata.tsv").read_text().splitlines()
    assert lines[0] == "row\tpath\tclass" and len(lines) == 7
    for row, line in enumerate(lines[1:]):
        number, path, name = line.split("\t")
        assert number == str(row) and name == ("cats" if row < 2 else "dogs") and path.endswith(".png")
    with Image.open(out / "sprite.png") as sprite:
        assert sprite.size == (3 * 64, 3 * 64)
        with Image.open(emb.paths[4]) as fifth:  # is smaller, and wider than high or not
            width, height = fifth.size
            left, top = 64 + (64 - width) // 2, 64 + (64 - height) // 2
            cell = np.asarray(sprite)[64:128, 64:128]
            shown = np.asarray(sprite)[top : top + height, left : left + width]
            np.testing.assert_array_equal(shown, np.asarray(fifth))
            assert (cell == 255).all(axis=2).sum() >= 64 * 64 - width * height  # white around it


def test_tensorboards_projector_understands_its_files(folder):
    plugin = pytest.importorskip("tensorboard.plugins.projector.projector_config_pb2", reason="needs tensorboard")
    from google.protobuf import text_format

    out = convert(folder, "tensorboard")
    config = plugin.ProjectorConfig()
    text_format.Parse((out / "projector_config.pbtxt").read_text(), config)
    (one,) = config.embeddings
    assert list(one.tensor_shape) == [6, 6] and list(one.sprite.single_image_dim) == [64, 64]
    for name in (one.tensor_path, one.metadata_path, one.sprite.image_path):
        assert (out / name).is_file()


def test_of_many_rows_the_projector_gets_some_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr("moco.embeddings.convert.MAX_POINTS", 10)
    emb = embed_to(tmp_path / "emb", encoder(), noise(100), precision="fp32")
    out = convert(tmp_path / "emb", "tensorboard")
    rows = [int(line.split("\t")[0]) for line in (out / "metadata.tsv").read_text().splitlines()[1:]]
    assert rows == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    np.testing.assert_array_equal(np.loadtxt(out / "tensors.tsv", dtype=np.float32), emb.vectors[rows])
    assert not (out / "sprite.png").exists()  # a program handed the images over


def test_images_that_are_handed_over_again_make_thumbnails(tmp_path):
    from moco.data import as_images

    embed_to(tmp_path / "emb", encoder(), noise(5))
    out = convert(tmp_path / "emb", "tensorboard", images=as_images(noise(5)))
    with Image.open(out / "sprite.png") as sprite:
        assert sprite.size == (192, 192)


def test_npy_is_what_it_is(folder):
    assert convert(folder, "npy") == folder


def test_an_unknown_format_names_the_known_ones(folder):
    for call in (lambda: convert(folder, "parket"), lambda: check_format("parket")):
        with pytest.raises(ValueError, match="unknown format 'parket': expected one of npy, parquet, tensorboard; did"):
            call()


def test_a_point_too_many_fits_the_largest_picture():
    from moco.data import as_images

    side, content = sys.modules["moco.embeddings.convert"]._sprite(
        as_images(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)), np.zeros(4097, np.int64)
    )
    assert side == 63 and content[:4] == b"\x89PNG"
