import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms.v2.functional import rgb_to_grayscale

from moco.config import DataConfig
from moco.data import DATASETS, ArrayImages, FileImages, Splits, load_data
from small import write_stl10


def load(**settings):
    return load_data(DataConfig(**settings))


def dump_as_2009(content: dict) -> bytes:
    """A pickle as the authors' Python 2 wrote it: integers for a dtype's flags, the module's old name."""
    data = pickle.dumps(content, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    return data.replace(b"\x89\x88\x87", b"K\x00K\x01\x87", 1)


def write_cifar10(root: Path, *, per_batch: int = 4) -> np.ndarray:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6 * per_batch, 3072), dtype=np.uint8)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        part = pixels[i * per_batch : (i + 1) * per_batch].copy()
        (folder / name).write_bytes(dump_as_2009({"data": part, "labels": [(i + k) % 10 for k in range(per_batch)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{k}" for k in range(10)]}, protocol=2))
    return pixels.reshape(-1, 3, 32, 32)


def test_the_written_pickles_have_what_marks_the_old_ones(tmp_path):
    write_cifar10(tmp_path)
    written = (tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes()
    assert b"K\x00K\x01\x87" in written and b"numpy.core.multiarray" in written


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_keeps_the_contract(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MOCO_DATA", str(tmp_path))
    write_cifar10(tmp_path)
    hundred = tmp_path / "cifar-100-python"
    hundred.mkdir()
    for part in ("train", "test"):
        content = {"data": np.zeros((5, 3072), np.uint8), "fine_labels": [0, 99, 5, 6, 7], "coarse_labels": [1] * 5}
        (hundred / part).write_bytes(dump_as_2009(content))
    (hundred / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"f{k}" for k in range(100)]}))
    for part in ("train", "val"):
        for label in "ab":
            (tmp_path / "imagenet" / part / label).mkdir(parents=True)
            Image.new("RGB", (70, 70)).save(tmp_path / "imagenet" / part / label / "0.png")
    write_stl10(tmp_path / "stl10_binary")
    splits = load(source=name)
    assert isinstance(splits, Splits)
    for images in splits:
        images = images if images.labelled is None else images.labelled
        assert isinstance(images, ArrayImages | FileImages)
        assert len(images) == len(images.paths) == len(images.labels) == len(set(images.paths))
        assert images.labels.dtype == torch.int64 and 0 <= images.labels.min() <= images.labels.max()
        assert images.labels.max() < len(images.classes) == len(set(images.classes))
        assert images.skipped == ()
        assert images.decode(0).dtype == torch.uint8 and images.decode(0).shape[0] == 3


def test_digits_hold_out_the_last_fifth_of_each_class_in_order():
    train, test = load(source="digits", channels=1)
    bunch = load_digits()
    assert len(train) == 1442 and len(test) == 355
    for label in range(10):
        whole = bunch.images[bunch.target == label]
        num_test = int(0.2 * len(whole))
        got = torch.cat([train.images[train.labels == label], test.images[test.labels == label]])
        assert int((test.labels == label).sum()) == num_test
        # Grey level 16 becomes 255, and levels keep their spacing of 15.94 to within rounding.
        assert np.abs(got[:, 0].numpy() - whole * 255 / 16).max() <= 0.5


def test_digits_are_repeated_to_the_channels_asked_for():
    grey = load(channels=1).train
    colour = load(channels=3).train
    assert grey.images.shape[1:] == (1, 8, 8) and colour.images.shape[1:] == (3, 8, 8)
    assert torch.equal(grey.images.expand(-1, 3, -1, -1), colour.images)


def test_select_takes_images_labels_and_names_in_the_given_order():
    train = load().train
    chosen = train.select(torch.tensor([7, 3]))
    assert torch.equal(chosen.images, train.images[[7, 3]]) and torch.equal(chosen.labels, train.labels[[7, 3]])
    assert chosen.paths == ("digits/train/7", "digits/train/3")
    assert torch.equal(chosen.images, train.select([7, 3]).images)


@pytest.mark.parametrize("where", ["environment", "cache", "source", "source itself"])
def test_cifar_is_found_where_it_lies(where, tmp_path, monkeypatch):
    pixels = write_cifar10(tmp_path / ".cache" / "moco" if where == "cache" else tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MOCO_DATA", raising=False)
    if where == "environment":
        monkeypatch.setenv("MOCO_DATA", str(tmp_path / "data"))
    source = {"source": tmp_path / "data", "source itself": tmp_path / "data" / "cifar-10-batches-py"}
    train, test = load(source=str(source.get(where, "cifar10")))
    assert np.array_equal(train.images.numpy(), pixels[:20]) and np.array_equal(test.images.numpy(), pixels[20:])
    assert train.labels[:5].tolist() == [0, 1, 2, 3, 1] and train.classes[3] == "class3"


def test_one_channel_of_cifar_is_its_luma(tmp_path):
    write_cifar10(tmp_path)
    colour = load(source=str(tmp_path)).train.images
    grey = load(source=str(tmp_path), channels=1).train.images
    assert grey.shape == (20, 1, 32, 32)
    assert (grey.int() - rgb_to_grayscale(colour).int()).abs().max() <= 1


class _Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_a_cifar_file_with_code_in_it_is_refused_and_not_run(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    monkeypatch.chdir(tmp_path)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(pickle.dumps({"data": _Hostile(), "labels": []}))
    with pytest.raises(ValueError, match=r"data_batch_3.*is refused.*mkdir"):
        load(source=str(tmp_path))
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "is refused"),
        (pickle.dumps([1]), "holds a list"),
        (pickle.dumps({"data": np.zeros((2, 5), np.uint8), "labels": [0, 1]}), "3072 columns"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "3072 columns"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}), "labels outside 0 to 9"),
    ],
)
def test_a_broken_cifar_file_is_named(content, complaint, tmp_path):
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=f"test_batch.*{complaint}") as caught:
        load(source=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_cifar_that_can_not_be_downloaded_is_one_clear_line(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("<urlopen error\nno route to host>")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", offline)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MOCO_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"cifar100 is neither in.*no route to host.*cifar-100-python") as caught:
        load(source="cifar100")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / ".cache" / "moco").glob("[!.]*")) == []


def test_a_downloaded_cifar_is_kept_and_read(tmp_path, monkeypatch):
    def download(url, root, filename, md5):
        assert url.endswith("cifar-10-python.tar.gz") and len(md5) == 32
        write_cifar10(Path(root))

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", download)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MOCO_DATA", raising=False)
    assert len(load(source="cifar10").train) == 20
    assert [path.name for path in (tmp_path / ".cache" / "moco").glob("[!.]*")] == ["cifar-10-batches-py"]


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_want_cifar_at_once_wait_for_one_that_downloads_it(locks, tmp_path, monkeypatch):
    asked = []

    def download(url, root, filename, md5):
        asked.append(root)
        time.sleep(0.2)
        write_cifar10(Path(root))

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", download)
    if not locks:
        monkeypatch.setattr("moco.files.fcntl", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MOCO_DATA", raising=False)
    with ThreadPoolExecutor() as pool:  # each opens the lock's file, as processes do
        assert [len(each.train) for each in pool.map(lambda _: load(source="cifar10"), range(4))] == [20] * 4
    assert len(asked) == 1 if locks else len(asked) > 1


def test_an_unknown_name_lists_the_known_ones_and_the_closest():
    with pytest.raises(ValueError, match=r"'cifar1O'.*digits, cifar10, cifar100.*folder.*did you mean cifar10"):
        load(source="cifar1O")


def test_a_missing_folder_and_a_file_are_said_to_be_that(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load(source=str(tmp_path / "nowhere"))
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file"):
        load(source=str(tmp_path / "a.jpg"))
