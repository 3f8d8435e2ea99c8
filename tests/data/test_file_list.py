"""Lists of image files, as people and other programs write them."""

import builtins
import csv
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

import moco
from moco.cli import main
from moco.config import DataConfig, merge
from moco.data import ArrayImages, FileImages, load_data
from moco.data.sources.file_list import count_listed
from moco.data.sources.listing import HELD_OUT
from moco.doctor import num_images
from moco.embeddings.embed import embed_to
from moco.training.automatic import auto_config
from small import TINY

NAMES = ["b.png", "sub/a.png", "c d.png", "e.png"]


pytestmark = pytest.mark.usefixtures("no_pictures")


def load(source: Path, **settings: Any) -> Any:
    return load_data(DataConfig.model_validate({"source": str(source)} | settings))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of four images, image i of grey level i; larger than what is held in memory."""
    for level, name in enumerate(NAMES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (70, 66), level).save(tmp_path / name)
    return tmp_path


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    """By suffix."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table(columns), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, "excel-tab" if path.suffix == ".tsv" else "excel")
            writer.writerows([columns, *zip(*columns.values(), strict=True)])
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), path.name)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "CSV"])
@pytest.mark.parametrize(("path", "label"), [("path", "label"), ("Filename", "class"), ("image", "Target")])
def test_images_come_in_the_order_of_the_list_and_class_names_in_theirs(
    photos: Path, suffix: str, path: str, label: str
) -> None:
    labels = ["dog", "ant", "dog", "Émile"]
    found = load(write(photos / f"list.{suffix}", {"id": [9, 8, 7, 6], label: labels, path: NAMES}))
    train = found.train
    assert found.test is None and isinstance(train, FileImages)
    assert train.paths == tuple(str(photos / name) for name in NAMES)
    assert [int(train.decode(i).max()) for i in range(4)] == [0, 1, 2, 3]
    assert train.classes == ("ant", "dog", "Émile") and train.labels.tolist() == [1, 0, 1, 2]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_whole_numbers_are_classes_in_the_order_of_their_size(photos: Path, suffix: str) -> None:
    train = load(write(photos / f"list.{suffix}", {"file": NAMES, "target": [10, 9, 10, 100]})).train
    assert train.classes == ("9", "10", "100") and train.labels.tolist() == [1, 0, 1, 2]


def test_without_labels_there_are_none_and_absolute_paths_stay(photos: Path) -> None:
    elsewhere = photos / "lists"
    elsewhere.mkdir()
    paths = [str(photos / "b.png"), "../c d.png"]
    train = load(write(elsewhere / "list.csv", {"path": paths, "label": ["", ""]})).train
    assert train.labels is None and train.classes is None
    assert [int(train.decode(i).max()) for i in range(2)] == [0, 2]


@pytest.mark.parametrize("held_out", HELD_OUT)
def test_the_split_says_which_images_are_kept_for_evaluation(photos: Path, held_out: str) -> None:
    splits = ["train", held_out.upper(), "Train", held_out]
    listed = write(photos / "list.csv", {"path": NAMES, "label": ["x", "y", "y", "y"], "split": splits})
    train, test = load(listed)
    assert [Path(path).name for path in train.paths] == ["b.png", "c d.png"] and train.labels.tolist() == [0, 1]
    assert [Path(path).name for path in test.paths] == ["a.png", "e.png"] and test.labels.tolist() == [1, 1]
    assert train.classes == test.classes == ("x", "y")
    assert count_listed(listed) == num_images(DataConfig(source=str(listed))) == 2


def test_the_command_chooses_settings_for_a_list(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = write(photos / "list.csv", {"path": NAMES * 4})
    assert main(["pretrain", "--data", str(listed), "--print_config"]) == 0
    assert f"source: {listed}" in capsys.readouterr().out.replace("\n    ", " ")


def test_of_several_held_out_splits_the_test_images_are_taken(photos: Path) -> None:
    train, test = load(write(photos / "list.csv", {"path": NAMES, "split": ["train", "val", "test", "train"]}))
    assert len(train) == 2 and [Path(path).name for path in test.paths] == ["c d.png"]


def test_a_list_without_header_has_paths_first_and_then_labels(photos: Path) -> None:
    (photos / "plain.csv").write_text("\n".join(NAMES))
    assert [Path(path).name for path in load(photos / "plain.csv").train.paths] == [
        "b.png",
        "a.png",
        "c d.png",
        "e.png",
    ]
    (photos / "two.tsv").write_text("\ufeffb.png\t2\n\nsub/a.png\t1\n", encoding="utf-8")  # as Excel begins a file
    train = load(photos / "two.tsv").train
    assert train.classes == ("1", "2") and train.labels.tolist() == [1, 0] and len(train) == 2


def test_small_images_of_one_size_are_held_and_the_budget_is_for_both_parts(tmp_path: Path) -> None:
    for i in range(8):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
    listed = write(tmp_path / "l.csv", {"path": [f"{i}.png" for i in range(8)], "split": ["train", "test"] * 4})
    held = 4 * 3 * 32 * 32 / 2**30
    assert all(isinstance(part, ArrayImages) for part in load(listed, memory=2 * held))
    train, test = load(listed, memory=1.5 * held)
    assert isinstance(train, ArrayImages) and isinstance(test, FileImages)


def test_a_list_is_cached_as_a_folder_is_each_part_for_itself(photos: Path, tmp_path: Path) -> None:
    listed = write(photos / "list.csv", {"path": NAMES, "split": ["train", "test", "train", "test"]})
    for _ in range(2):
        train, test = load(listed, cache=tmp_path / "cache", cache_side=64)
        assert train.cache is not None and test.cache is not None
        assert [int(train.decode(i).max()) for i in range(2)] == [0, 2]
        assert [int(test.decode(i).max()) for i in range(2)] == [1, 3]
    assert len(list((tmp_path / "cache").glob("*/*.pixels"))) == 2


def test_missing_and_broken_files_are_named_skipped_and_counted(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    (photos / "broken.png").write_bytes(b"no image")
    listed = write(photos / "list.csv", {"path": ["gone.png", *NAMES, "broken.png"], "label": list("xyzxyz")})
    train = load(listed, max_bad=0.4).train
    assert len(train) == 4 and train.labels.tolist() == [1, 2, 0, 1]
    assert train.skipped == (str(photos / "gone.png"), str(photos / "broken.png"))
    assert "gone.png" in caplog.text and "No such file" in caplog.text
    assert refusal(listed).startswith("2 of 6 files cannot be read, expected at most 1.00%")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "'list.csv' lists no images; expected a row for each"),
        (b"path,label\n", "'list.csv' lists no images"),
        (b"photo,label\nb.png,1\n", "has no column of paths, its first row is 'photo, label'; expected a column path,"),
        (b"nowhere.png\nnor-here.png\n", "has no column of paths, its first row is 'nowhere.png'"),
        ("path\nb.png\n".encode("utf-16"), "'list.csv' is not UTF-8 text; save the list as UTF-8"),
        ("path,label\nb.png,caf\xe9\n".encode("latin-1"), "is not UTF-8 text at 'caf\\udce9'; save the list as UTF-8"),
        ("path\nb.png\ncaf\xe9.png\n".encode("latin-1"), "is not UTF-8 text at 'caf\\udce9.png'; save the list as"),
        (
            b"path,label\nb.png,1\ne.png,\n",
            "has no label in 1 of its 2 rows, the first is row 2; expected one in every",
        ),
        (b"path,label\nb.png,1\n,1\n", "has no path in 1 of its 2 rows, the first is row 2; expected one in every row"),
        (b"path,split\nb.png,train\ne.png,\n", "has no split in 1 of its 2 rows, the first is row 2"),
        (b"path,split\nb.png,train\ne.png,dev\n", "has the split 'dev'; expected train, test, val, valid, validation"),
        (b"path,split\nb.png,test\n", "has no row of the split train"),
        (b"path\nb.png\nhttps://here.org/e.png\n", "names 'https://here.org/e.png'; expected files on this machine"),
        (b"path,label\na,b.png,1\n", "has 3 columns in row 2 and 2 in the first; expected as many in every row"),
        (b'path\n"b.png\n', "is not a list in CSV (unexpected end of data)"),
        (b"path,split,label\nb.png,train,x\ne.png,test,y\n", "has the test class 'y', which training does not have"),
    ],
)
def test_a_bad_list_is_one_clear_line(photos: Path, content: bytes, line: str) -> None:
    (photos / "list.csv").write_bytes(content)
    assert line in refusal(photos / "list.csv")


def test_who_only_counts_a_list_is_told_of_urls_too(photos: Path) -> None:
    listed = write(photos / "list.csv", {"path": ["b.png", "https://here.org/e.png"]})
    for count in (lambda: count_listed(listed), lambda: num_images(DataConfig(source=str(listed)))):
        with pytest.raises(ValueError, match=r"names 'https://here\.org/e\.png'; expected files on this machine"):
            count()


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (
            {"photo": ["b.png"]},
            "has no column of paths, it has photo; expected path, image, file, filename or filepath",
        ),
        ({"path": [3]}, "has int64 in the column 'path'; expected text"),
        ({"path": ["b.png"], "label": [0.5]}, "has double in the column 'label'; expected text or whole numbers"),
        ({"path": ["b.png", None]}, "has no path in 1 of its 2 rows"),
        ({"path": ["b.png", "e.png"], "label": [1, None]}, "has no label in 1 of its 2 rows, the first is row 2"),
        ({"path": pyarrow.array([], "string")}, "lists no images"),
    ],
)
def test_a_bad_parquet_list_is_one_clear_line(photos: Path, columns: dict[str, Any], line: str) -> None:
    assert line in refusal(write(photos / "list.parquet", columns))


def test_what_is_no_parquet_and_a_missing_extra_are_said(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "list.parquet").write_bytes(b"PAR1 and no more")
    assert "'list.parquet' cannot be read as Parquet (" in refusal(photos / "list.parquet")
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert 'needs an extra: run pip install "moco-ssl[parquet]"' in refusal(photos / "list.parquet")


@pytest.mark.skipif(os.name != "posix", reason="names are bytes")
def test_a_file_whose_name_is_no_utf8_is_found_by_its_bytes(photos: Path) -> None:
    os.rename(photos / "b.png", os.fsencode(photos) + b"/caf\xe9.png")
    (photos / "list.csv").write_bytes(b"path\ncaf\xe9.png\n")
    assert len(load(photos / "list.csv").train) == 1


def test_a_long_list_takes_seconds_and_its_files_are_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = 300_000
    lines = "".join(f"images/{i:07}.png,{i % 999},{'train' if i % 10 else 'val'}\n" for i in range(number))
    (tmp_path / "list.csv").write_text("path,label,split\n" + lines)
    (tmp_path / "images").mkdir()
    for first in (0, 1):  # of each part one is decoded, to see whether all are small
        Image.new("L", (70, 70)).save(tmp_path / "images" / f"{first:07}.png")
    opened: list[str] = []
    monkeypatch.setattr("moco.data.sources.listing.check_header", opened.append)
    begin = time.process_time()
    train, test = load(tmp_path / "list.csv")
    assert time.process_time() - begin < 15  # one and a half, where nothing else runs
    assert (len(train), len(test)) == (0.9 * number, 0.1 * number) and len(train.classes) == 999
    assert len(opened) == len(test)  # as of a folder: every header of up to 100,000 files, none of more


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_settings_are_chosen_for_a_list_and_it_trains_embeds_and_packs(tmp_path: Path, suffix: str) -> None:
    generator = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(60)]
    for name in names:
        Image.fromarray(generator.integers(0, 255, (12, 12, 3), np.uint8)).save(tmp_path / name)
    columns = {"path": names, "label": ["cow", "ant", "bee"] * 20, "split": ["train"] * 48 + ["test"] * 12}
    listed = write(tmp_path / f"list.{suffix}", columns)
    config, _ = auto_config(DataConfig(source=str(listed)))
    assert config.views.size == 8 and config.data.source == str(listed)
    tiny = {"engine": TINY["engine"], "model": {"backbone": "resnet-tiny"}, "steps": 2}
    run = moco.pretrain(merge(config, tiny), out=tmp_path / "run")
    assert run.results and 0 <= moco.evaluate(tmp_path / "run", "knn").figures["top1"] <= 100
    table = embed_to(tmp_path / "emb", tmp_path / "run", listed)
    assert len(table) == 48 and table.paths == tuple(str(tmp_path / name) for name in names[:48])
    # What embed has written is a list in turn, with the names of the classes.
    again = load(tmp_path / "emb" / "images.csv").train
    assert again.paths == table.paths and again.classes == ("ant", "bee", "cow")
    assert torch.equal(again.labels, torch.from_numpy(table.labels))
    packed = moco.pack(listed, tmp_path / "shards")
    assert packed.images == 60
