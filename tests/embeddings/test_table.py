import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import moco
from doubles import encoder, noise, picture
from moco.data import DATASETS, ArrayImages, BadImage, Splits
from moco.embeddings.embed import embed_to
from moco.embeddings.table import Embeddings, absolute_source, images_of, load, read_meta


@pytest.fixture
def table(tmp_path: Path) -> Path:
    embed_to(tmp_path / "emb", encoder(), noise(9), precision="fp32")
    return tmp_path / "emb"


def test_a_table_is_plain_files_that_numpy_and_csv_readers_open(table: Path) -> None:
    assert sorted(os.listdir(table)) == ["images.csv", "meta.json", "unreadable.csv", "vectors.npy"]
    vectors = np.load(table / "vectors.npy", mmap_mode="r")
    assert vectors.dtype == np.float32 and vectors.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(vectors, moco.embed(encoder(), noise(9), batch_size=256, precision="fp32").vectors)
    rows = list(csv.DictReader((table / "images.csv").read_text().splitlines()))
    assert rows == [{"path": str(number), "label": "", "class": ""} for number in range(9)]
    assert (table / "unreadable.csv").read_text() == "path,reason\n"
    meta = json.loads((table / "meta.json").read_text())
    assert (meta["rows"], meta["columns"], meta["complete"], meta["unreadable"]) == (9, 6, True, 0)
    assert meta["settings"]["precision"] == "fp32" and meta["encoder"]["input_size"] == 12
    assert torch.__version__.startswith(meta["versions"]["torch"])


def test_a_loaded_table_is_mapped_and_read_only(table: Path) -> None:
    emb = load(table)
    assert isinstance(emb, Embeddings) and isinstance(emb.vectors, np.memmap) and len(emb) == 9
    assert emb.paths == tuple(map(str, range(9))) and emb.labels is None and emb.folder == table
    with pytest.raises(ValueError, match="read-only"):
        emb.vectors[0] = 0


HOSTILE = [
    b"new\nline.png",
    b'qu"ote,.png',
    b"tab\tand\rreturn.png",
    b"<script>.png",
    "東京.png".encode(),
    b"\xff\xfe.png",
]


def test_any_file_name_comes_back_as_it_was(tmp_path: Path) -> None:
    names = [
        tmp_path / "photos" / folder / os.fsdecode(name + b".png") for folder in ("b\nb", 'c"') for name in HOSTILE
    ]
    for seed, name in enumerate(names):
        picture(name, seed)
    emb = embed_to(tmp_path / "emb", encoder(), tmp_path / "photos", precision="fp32")
    assert sorted(emb.paths) == sorted(map(str, names)) and len(emb) == 12
    again = load(tmp_path / "emb")
    assert again.paths == emb.paths and again.classes == ("b\nb", 'c"') and again.labels is not None
    assert [again.classes[label] for label in again.labels] == [Path(path).parent.name for path in again.paths]
    assert all(Path(path).is_file() for path in again.paths)


def test_a_class_name_that_is_no_utf8_comes_back(tmp_path: Path) -> None:
    for name in (b"\xff", b"ok"):
        picture(tmp_path / "photos" / os.fsdecode(name) / "a.png")
    embed_to(tmp_path / "emb", encoder(), tmp_path / "photos")
    assert load(tmp_path / "emb").classes == ("ok", os.fsdecode(b"\xff"))


@pytest.mark.parametrize("where", ["files", "name", "lost"])
def test_the_images_of_the_rows_are_found_again_where_they_still_are(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        picture(tmp_path / "photos" / f"{seed}.png", seed)
    mine = ArrayImages(noise(4), None, None, ("mine/0", "mine/1", "mine/2", "mine/3"))
    monkeypatch.setitem(DATASETS, "mine", lambda config: Splits(mine.select([0]), mine))
    emb = {
        "files": lambda: embed_to(tmp_path / "emb", encoder(), tmp_path / "photos"),
        "name": lambda: embed_to(tmp_path / "emb", encoder(), "mine", part="test"),
        "lost": lambda: embed_to(tmp_path / "emb", encoder(), noise(3)),
    }[where]()
    found = images_of(emb)
    if where == "lost":
        assert found is None
        return
    assert found is not None and found.paths == emb.paths and found.decode(2).shape[0] == 3
    if where == "name":
        assert found.decode(2).equal(noise(4)[2])
        some = replace(emb, paths=("mine/3", "mine/1"))
        picked = images_of(some)
        assert picked is not None and picked.decode(0).equal(noise(4)[3])
        assert images_of(replace(emb, paths=("mine/7",))) is None


def test_of_files_some_of_which_are_gone_the_others_are_found(tmp_path: Path) -> None:
    for seed in range(5):
        picture(tmp_path / "photos" / f"{seed}.png", seed)
    emb = embed_to(tmp_path / "emb", encoder(), tmp_path / "photos")
    for gone in (0, 3, 4):
        Path(emb.paths[gone]).unlink()
        found = images_of(emb)
        assert found is not None and found.paths == emb.paths and found.decode(1).shape == (3, 20, 14)
        with pytest.raises(BadImage, match=f"{gone}.png"):
            found.decode(gone)


def test_images_that_are_gone_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "photos" / "a.png")
    emb = embed_to(tmp_path / "emb", encoder(), tmp_path / "photos")
    Path(emb.paths[0]).unlink()
    assert images_of(emb) is None  # no images in the folder
    (tmp_path / "photos").rmdir()
    assert images_of(emb) is None


def test_a_relative_folder_and_its_files_are_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "photos" / "a.png")
    monkeypatch.chdir(tmp_path)
    emb, held = embed_to("emb", encoder(), "photos"), moco.embed(encoder(), "photos")
    assert emb.paths == (str(tmp_path / "photos" / "a.png"),) and held.paths == ("photos/a.png",)
    assert read_meta("emb").images_source == str(tmp_path / "photos")
    monkeypatch.chdir("/")
    found = images_of(load(tmp_path / "emb"))
    assert found is not None and found.decode(0).shape == (3, 20, 14)


def test_a_table_with_relative_names_opens(table: Path) -> None:
    meta = json.loads((table / "meta.json").read_text()) | {"images_source": "photos"}
    (table / "meta.json").write_text(json.dumps(meta))
    text = (table / "images.csv").read_text()
    (table / "images.csv").write_text(text.replace('"0"', '"photos/0.png"'))
    emb = load(table)
    assert emb.paths[0] == "photos/0.png" and images_of(emb) is None


@pytest.mark.parametrize("name", ["digits", "hf:mnist", "https://a.example/{0..3}.tar", "cifar11"])
def test_names_that_are_no_folders_stay_as_they_are(name: str) -> None:
    assert absolute_source(name) == name


def test_folders_and_shards_get_their_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert absolute_source("photos") == absolute_source("./photos/") == str(tmp_path / "photos")
    assert absolute_source("s/{0..3}.tar") == str(tmp_path / "s" / "{0..3}.tar")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute_source("~/photos") == str(tmp_path / "photos")


def test_an_unfinished_table_is_refused_in_one_line_that_says_how_to_go_on(table: Path) -> None:
    meta = json.loads((table / "meta.json").read_text()) | {"complete": False, "done": 4}
    (table / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(
        ValueError, match="is unfinished: 4 of 9 images; run the same `moco embed` command again"
    ) as error:
        load(table)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("meta.json", b"{", "meta.json does not describe embeddings"),
        ("meta.json", b"[]", "meta.json does not describe embeddings"),
        ("meta.json", b'{"format": 99, "complete": true}', "does not describe embeddings .columns: Field required"),
        ("vectors.npy", b"", "is damaged"),
        ("vectors.npy", b"\x93NUMPY\x01\x00", "is damaged"),
        ("images.csv", b"path,label,class\n", "is damaged: float32 vectors of shape .9, 6. and 0 names"),
        ("images.csv", b"path,label,class\na\n", "is damaged"),
        ("images.csv", b"path,label,class\n" + b"a,1,\n" * 9, "images.csv does not match meta.json"),
        ("images.csv", b"path,label,class\n" + b"a,-1,\n" * 9, "images.csv does not match meta.json"),
        ("images.csv", b"a,b,c\n" + b"a,,\n" * 9, "images.csv does not match meta.json"),
    ],
)
def test_a_damaged_table_is_refused_in_one_line(name: str, content: bytes, message: str, table: Path) -> None:
    (table / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load(table)
    assert "\n" not in str(error.value)


def test_a_pickle_in_place_of_vectors_is_not_run(table: Path) -> None:
    np.save(table / "vectors.npy", np.array([{"a": 1}] * 9, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="is damaged"):
        load(table)


def test_a_newer_format_is_refused(table: Path) -> None:
    meta = json.loads((table / "meta.json").read_text()) | {"format": 2}
    (table / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="has format 2, but this version reads formats up to 1; update moco"):
        read_meta(table)


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_without_a_table_is_named(made: bool, tmp_path: Path) -> None:
    if made:
        (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="none holds no meta.json; expected a folder that `moco embed`"):
        load(tmp_path / "none")
