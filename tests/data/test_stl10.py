"""STL-10, from small files in the authors' layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import STL10

import moco
from moco.config import DataConfig, PretrainConfig, merge
from moco.data import ArrayImages, FileImages, load_data, with_labels
from moco.data.sources.stl10 import FOLDER
from moco.doctor import num_images
from moco.embeddings.embed import embed_to
from moco.storage.run import Run
from moco.training.automatic import auto_config
from small import TINY, write_stl10

HELD = 60 * 3 * 96 * 96 / 2**30
"""GiB of the training images that `write_stl10` writes."""


pytestmark = pytest.mark.usefixtures("no_pictures")


def load(source: str | Path, **settings: Any) -> Any:
    return load_data(DataConfig.model_validate({"source": str(source)} | settings))


def labelled_of(images: Any) -> Any:
    return with_labels(images)


@pytest.mark.parametrize("memory", [2.0, 0.5 * HELD])
def test_it_trains_on_all_and_knows_the_labelled_ones(memory: float, tmp_path: Path) -> None:
    pixels = write_stl10(tmp_path / FOLDER)
    train, test = load(tmp_path, memory=memory)
    assert isinstance(train, ArrayImages if memory == 2.0 else FileImages)
    assert len(train) == 60 and train.labels is None and len(test) == 10
    expected = np.concatenate([pixels["unlabeled"], pixels["train"]])
    for i in (0, 39, 40, 59):
        assert np.array_equal(train.decode(i).numpy(), expected[i])
    labelled = labelled_of(train)
    assert len(labelled) == 20 and labelled.labels.tolist() == [*range(10), *range(10)]
    assert labelled.classes == test.classes and labelled.classes[3] == "cat"
    assert np.array_equal(labelled.decode(7).numpy(), pixels["train"][7])
    assert np.array_equal(test.decode(4).numpy(), pixels["test"][4]) and test.labels.tolist() == list(range(10))
    assert labelled.paths == train.paths[40:] and len({*train.paths, *test.paths}) == 70


def test_pixels_and_labels_are_those_that_torchvision_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stl10(tmp_path / FOLDER)
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    theirs = STL10(str(tmp_path), split="train")
    ours = labelled_of(load(tmp_path).train)
    assert np.array_equal(ours.images.numpy(), theirs.data) and np.array_equal(ours.labels, np.asarray(theirs.labels))
    assert list(ours.classes) == theirs.classes


@pytest.mark.parametrize("where", ["environment", "cache", "source", "source itself"])
def test_it_is_found_where_it_lies(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / ".cache" / "moco" if where == "cache" else tmp_path / "data"
    write_stl10(root / FOLDER)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MOCO_DATA", raising=False)
    if where == "environment":
        monkeypatch.setenv("MOCO_DATA", str(root))
    source = {"source": str(root), "source itself": str(root / FOLDER)}.get(where, "stl10")
    assert len(load(source).train) == 60
    assert num_images(DataConfig(source=source)) == 105_000  # what the authors' files hold


def test_it_is_downloaded_with_its_checksum_and_said_in_one_line_where_it_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(url: str, root: str, filename: str, md5: str) -> None:
        assert url.endswith("stl10_binary.tar.gz") and len(md5) == 32
        write_stl10(Path(root) / FOLDER)

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MOCO_DATA", raising=False)
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", offline)
    with pytest.raises(ValueError, match=r"stl10 is neither in.*no route to host.*stl10_binary") as caught:
        load("stl10")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", download)
    assert len(load("stl10").train) == 60
    assert [path.name for path in (tmp_path / ".cache" / "moco").glob("[!.]*")] == [FOLDER]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("train_X.bin", b"\0" * 100, "train_X.bin' has 100 bytes; expected 27648 for each image"),
        ("unlabeled_X.bin", b"", "unlabeled_X.bin' has 0 bytes"),
        ("test_y.bin", b"\1\2", "has 10 test images and 2 labels"),
        ("train_y.bin", b"\0" * 20, "train_y.bin' has labels outside 1 to 10"),
        ("train_y.bin", b"\x0b" * 20, "train_y.bin' has labels outside 1 to 10"),
    ],
)
def test_a_broken_file_is_named(name: str, content: bytes, line: str, tmp_path: Path) -> None:
    write_stl10(tmp_path / FOLDER)
    (tmp_path / FOLDER / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_channels_are_one_or_three(tmp_path: Path) -> None:
    write_stl10(tmp_path / FOLDER)
    assert load(tmp_path, channels=1).train.images.shape == (60, 1, 96, 96)
    with pytest.raises(ValueError, match="data.channels is 4"):
        load(tmp_path, channels=4)


@pytest.mark.parametrize("memory", [2.0, 0.5 * HELD])
def test_training_watches_knn_of_the_labelled_images(memory: float, tmp_path: Path) -> None:
    write_stl10(tmp_path / FOLDER, train=30)
    settings = {"batch_size": 16, "model": TINY["model"] | {"queue_size": 32}, "steps": 2}
    data = {"source": str(tmp_path / FOLDER), "size": 16, "memory": memory, "workers": 0}
    config = merge(PretrainConfig(), TINY | settings | {"data": data})
    run = moco.pretrain(config, out=tmp_path / "run")
    assert "knn_top1" in Run.open(tmp_path / "run").metrics[-1] and run.results
    assert "top1" in moco.evaluate(tmp_path / "run", "knn").figures
    table = embed_to(tmp_path / "emb", tmp_path / "run", tmp_path / FOLDER)
    assert len(table) == 70 and table.labels is None and np.isfinite(table.vectors).all()
    tests = embed_to(tmp_path / "test", tmp_path / "run", tmp_path / FOLDER, part="test")
    assert tests.labels is not None and tests.labels.tolist() == list(range(10))


def test_settings_are_chosen_for_it(tmp_path: Path) -> None:
    write_stl10(tmp_path / FOLDER)
    config, _ = auto_config(DataConfig(source=str(tmp_path), memory=0.5 * HELD))
    assert config.views.size in (32, 96)
