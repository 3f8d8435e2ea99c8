"""Image sets of the Hugging Face hub, and folders that its library wrote."""

import io
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from moco.config import DataConfig
from moco.data import ArrayImages, BadImage, FileImages, Loader, load_data
from moco.data.packing.pack import pack
from moco.data.places import hub_rows
from moco.data.places.open import read_image
from moco.data.sources import hugging_face


def png(level: int, *, side: int = 70) -> bytes:
    """Grey of this level; larger than what is held in memory."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (level, level, level)).save(file, "png")
    return file.getvalue()


def load(source: object, **settings: Any) -> Any:
    return load_data(DataConfig.model_validate({"source": str(source)} | settings))


def levels(images: object) -> list[int]:
    assert isinstance(images, FileImages)
    return [int(each[0, 0, 0]) for each in images.decode_many(range(len(images))) if isinstance(each, torch.Tensor)]


def crop(image: torch.Tensor, id: int, epoch: int) -> torch.Tensor:
    return torch.stack([image[:, :5, :5], image[:, :5, :5]])


def rows_of(levels: list[int], labels: list[int] | None = None, *, side: int = 70) -> Any:
    """Rows of pictures; with labels they are of two classes."""
    datasets = pytest.importorskip("datasets")
    kinds = {"picture": datasets.Image()} | ({"kind": datasets.ClassLabel(names=["ape", "bee"])} if labels else {})
    columns = {"picture": [Image.open(io.BytesIO(png(level, side=side))) for level in levels], "kind": labels}
    return datasets.Dataset.from_dict({key: columns[key] for key in kinds}, features=datasets.Features(kinds))


def saved(path: Path, **parts: Any) -> Path:
    pytest.importorskip("datasets").DatasetDict(parts).save_to_disk(path)
    return path


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'hf:somebody/photos needs an extra: run pip install "moco-ssl\[hf\]"'):
        load("hf:somebody/photos")


@pytest.mark.parametrize("kind", ["a folder", "of the hub"])
def test_a_row_names_no_file_outside_of_its_set(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "home" / "secret.png").write_bytes(png(1))
    (tmp_path / "set" / "own.png").write_bytes(png(2))
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "home" / "secret.png")
    named = ["set/own.png", "home/secret.png", "set/link.png", "set/../home/secret.png"]
    rows = [{"image": {"bytes": None, "path": str(tmp_path / name)}} for name in named]
    library = SimpleNamespace(config=SimpleNamespace(HF_DATASETS_CACHE=tmp_path / "set"))
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr(hub_rows, "rows_of", lambda name, part: (rows, "image"))
    name = f"hf:{tmp_path / 'set'}" if kind == "a folder" else "hf:somebody/photos"
    assert read_image(f"{name}/train/0") == png(2)
    for row in (1, 2, 3):
        with pytest.raises(BadImage, match="the row names '.*png', a file outside of its set"):
            FileImages((f"{name}/train/{row}",), None, None).decode(0)


def test_a_hugging_face_set_is_read_row_by_row(tmp_path: Path) -> None:
    rows = rows_of([0, 1, 2, 3], [0, 1, 0, 1])
    train, test = load(saved(tmp_path / "set", train=rows, test=rows.select([2])))
    assert levels(train) == [0, 1, 2, 3] and levels(test) == [2]
    assert train.labels.tolist() == [0, 1, 0, 1] and train.classes == ("ape", "bee")
    assert load(f"hf:{tmp_path / 'set'}").train.paths == train.paths
    with pytest.raises(ValueError, match="hf:.* cannot be loaded"):
        load(f"hf:{tmp_path / 'nowhere'}")


def test_rows_saved_as_tensors_are_read_as_others(tmp_path: Path) -> None:
    train = load(saved(tmp_path / "set", train=rows_of([4, 5], [1, 0]).with_format("torch"))).train
    assert levels(train) == [4, 5] and train.labels.tolist() == [1, 0]


def test_the_first_held_out_part_with_pictures_and_labels_is_taken_and_no_further_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets, opened, real = pytest.importorskip("datasets"), [], hugging_face._listing
    texts = datasets.Dataset.from_dict({"text": ["a", "b"]})
    hidden, train = rows_of([1], [-1]), rows_of([0, 5], [0, 1])
    monkeypatch.setattr(hugging_face, "_listing", lambda name, part: (opened.append(part), real(name, part))[1])
    parts = {"train": train, "test": hidden, "val": texts, "valid": rows_of([2], [1]), "validation": rows_of([3], [0])}
    test = load(saved(tmp_path / "all", **parts)).test
    assert levels(test) == [2] and test.labels.tolist() == [1] and "validation" not in opened
    test = load(saved(tmp_path / "hidden", train=train, val=texts, test=hidden)).test
    assert levels(test) == [1] and test.labels is None
    assert load(saved(tmp_path / "texts", train=train, test=texts)).test is None
    with pytest.raises(ValueError, match="hf:.*/none has no column of images, it has text"):
        load(saved(tmp_path / "none", train=texts))


def test_a_set_of_the_hub_is_asked_for_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets, asked = pytest.importorskip("datasets"), []
    parts = {"train": rows_of([7, 8], [0, 1]), "validation": rows_of([9], [1])}

    def load_dataset(name: str) -> Any:
        asked.append(name)
        if name != "somebody/animals":
            raise ConnectionError("the hub\ndoes not answer")
        return datasets.DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, test = load("hf:somebody/animals")
    assert levels(train) == [7, 8] and levels(test) == [9] and asked == ["somebody/animals"]
    assert train.paths == ("hf:somebody/animals/train/0", "hf:somebody/animals/train/1")
    with pytest.raises(ValueError, match=r"^hf:no/such cannot be loaded \(the hub does not answer\)$"):
        load("hf:no/such")


def test_a_hugging_face_set_is_packed_and_reading_processes_deal_it_out(tmp_path: Path) -> None:
    source = f"hf:{saved(tmp_path / 'set', train=rows_of(list(range(12)), [0, 1] * 6), test=rows_of([40], [1]))}"
    assert pack(source, tmp_path / "out").images == 13
    packed, test = load(tmp_path / "out")
    assert sorted(levels(packed)) == list(range(12)) and levels(test) == [40]
    assert packed.classes == test.classes == ("ape", "bee")
    assert [level % 2 for level in levels(packed)] == packed.labels.tolist()
    for workers in (0, 2):
        loader = Loader(
            load(source).train, batch_size=4, seed=0, device=torch.device("cpu"), workers=workers, crop=crop
        )
        seen = {}
        for batch, ids in loader.epoch(0):
            seen |= dict(zip(ids.tolist(), batch[:, 0, 0, 0, 0].tolist(), strict=True))
        assert seen == {i: i for i in range(12)} and not loader.bad


def test_small_pictures_of_a_set_are_held_within_the_budget_for_both_parts(tmp_path: Path) -> None:
    rows = rows_of([3, 4, 5, 6], [0, 1, 0, 1], side=16)
    source, held = saved(tmp_path / "set", train=rows, test=rows), 4 * 3 * 16 * 16 / 2**30
    for memory, kinds in (
        (2 * held, (ArrayImages, ArrayImages)),
        (1.5 * held, (ArrayImages, FileImages)),
        (0.5 * held, (FileImages, FileImages)),
    ):
        for part, kind in zip(load(source, memory=memory), kinds, strict=True):
            assert isinstance(part, kind) and part.labels.tolist() == [0, 1, 0, 1] and part.classes == ("ape", "bee")
            assert [int(part.decode(i)[0, 0, 0]) for i in range(4)] == [3, 4, 5, 6]


def test_rows_that_hold_no_picture_are_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [{"bytes": each, "path": None} for each in (png(1), b"<html>", png(3))]
    features = datasets.Features({"picture": datasets.Image()})
    rows = datasets.Dataset.from_dict({"picture": [*pictures, None]}, features=features)
    train = load(saved(tmp_path / "set", train=rows), max_bad=0.5).train
    assert levels(train) == [1, 3] and [path[-1] for path in train.skipped] == ["1", "3"]
    assert "set/train/1' cannot be read" in caplog.text and "the row holds no image" in caplog.text
    with pytest.raises(ValueError, match="2 of 4 files cannot be read"):
        load(tmp_path / "set")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: rows.select([]))
    with pytest.raises(ValueError, match="hf:somebody/nothing has no rows in its part train"):
        load("hf:somebody/nothing")


def test_a_cache_of_a_set_is_made_once_and_anew_when_the_set_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, settings = tmp_path / "set", {"cache": tmp_path / "cache", "cache_side": 50}
    saved(source, train=rows_of([1, 2], [0, 1]), test=rows_of([3], [1]))
    for part, expected in zip(load(source, **settings), ([1, 2], [3]), strict=True):
        assert part.cache is not None and part.decode(0).shape == (3, 50, 50) and levels(part) == expected
    with monkeypatch.context() as patched:
        patched.setattr("moco.data.cache.decode_shrunk", lambda *_: pytest.fail("decoded again"))
        train = load(source, **settings).train
        patched.setattr(hub_rows, "rows_of", lambda *_: pytest.fail("a row was read"))
        loader = Loader(train, batch_size=2, seed=0, device=torch.device("cpu"), workers=0, crop=crop)
        (batch, ids), *_ = loader.epoch(0)
        assert batch[:, 0, 0, 0, 0].tolist() == [i + 1 for i in ids.tolist()]
    shutil.rmtree(source)
    saved(source, train=rows_of([8, 9], [0, 1]), test=rows_of([3], [1]))  # the same rows, by their names
    train, test = load(source, **settings)
    assert levels(train) == [8, 9] and train.cache is not None and levels(test) == [3]
    assert len(list((tmp_path / "cache").glob("*/*.pixels"))) == 2


def test_a_cache_of_a_set_of_the_hub_is_found_from_any_folder_and_knows_the_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets, hub = pytest.importorskip("datasets"), {"train": rows_of([1, 2])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(hub))

    def again(folder: Path) -> list[int]:
        """As another process would, somewhere."""
        for known in (hub_rows.parts_of, hub_rows.rows_of, hub_rows.facts_of_part):
            known.cache_clear()
        folder.mkdir()
        monkeypatch.chdir(folder)
        return levels(load("hf:somebody/numbers", cache=tmp_path / "cache").train)

    assert again(tmp_path / "a") == [1, 2]
    (pixels,) = (tmp_path / "cache").glob("*/*.pixels")
    made = pixels.stat().st_mtime_ns
    assert again(tmp_path / "b") == [1, 2] and pixels.stat().st_mtime_ns == made
    hub["train"] = rows_of([6, 7])
    assert again(tmp_path / "c") == [6, 7] and not pixels.exists()
