import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco.config import DataConfig
from moco.data import ArrayImages, BadImage, FileImages, load_data

ROWS, COLUMNS = np.mgrid[0:30, 0:40]
SMOOTH = np.stack([COLUMNS * 6, ROWS * 8, np.full((30, 40), 80)], axis=-1).astype(np.uint8)  # 30 40 3


def write(path: Path, *, size: tuple[int, int] = (8, 8), colour: tuple[int, int, int] = (200, 30, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def load(folder: Path, **settings):
    return load_data(DataConfig(source=str(folder), **settings))


def names(images, root: Path) -> list[str]:
    return [str(Path(path).relative_to(root)) for path in images.paths]


def decode(path: Path, channels: int = 3) -> torch.Tensor:
    return FileImages((str(path),), labels=None, classes=None, channels=channels).decode(0)


def read_back(tmp_path: Path, image: Image.Image, name: str, channels: int = 3, **options) -> np.ndarray:
    image.save(tmp_path / name, **options)
    return decode(tmp_path / name, channels).permute(1, 2, 0).numpy()


# Layouts


@pytest.mark.parametrize("side", [8, 80])
def test_that_16_bits_become_8_is_said_once(side, tmp_path, caplog):
    for number in range(3):
        Image.fromarray(np.full((side, side), 4095, np.uint16)).save(tmp_path / f"{number}.png")
    load(tmp_path)
    (line,) = caplog.messages
    assert line.startswith(repr(str(tmp_path / "0.png"))) and "scans of 12 bits" in line


def test_class_subfolders_are_labels_in_sorted_order(tmp_path):
    for name in ("dog/2.png", "dog/deep/1.PNG", "cat/9.jpeg", "empty/readme.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x") if name.endswith("txt") else write(tmp_path / name)
    train, test = load(tmp_path)
    assert test is None and train.classes == ("cat", "dog")
    assert names(train, tmp_path) == ["cat/9.jpeg", "dog/2.png", "dog/deep/1.PNG"]
    assert train.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "files",
    [
        ["b.png", "a.jpg"],
        ["b.png", "cats/a.jpg", "dogs/a.jpg"],
        ["only/b.png", "only/a.jpg"],
        ["only/deep/b.png", "only/deeper/still/a.jpg"],
    ],
)
def test_images_beside_subfolders_or_in_one_subfolder_have_no_labels(files, tmp_path):
    for name in files:
        write(tmp_path / name)
    train, test = load(tmp_path)
    assert train.labels is None and train.classes is None and test is None
    assert names(train, tmp_path) == sorted(files)


@pytest.mark.parametrize("held_out", ["test", "val", "valid", "validation"])
def test_train_and_held_out_folders_are_the_splits(held_out, tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "train/c/1.png", f"{held_out}/c/2.png", f"{held_out}/b/3.png"):
        write(tmp_path / name)
    train, test = load(tmp_path)
    assert train.labels.tolist() == [0, 1, 2] and test.labels.tolist() == [1, 2]
    assert train.classes == test.classes == ("a", "b", "c")
    assert names(test, tmp_path) == [f"{held_out}/b/3.png", f"{held_out}/c/2.png"]


def test_of_two_held_out_folders_the_one_with_labels_is_the_test_split(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "val/a/2.png", "test/1.png"):
        write(tmp_path / name)
    assert names(load(tmp_path).test, tmp_path) == ["val/a/2.png"]
    write(tmp_path / "validation" / "zebra" / "3.png")  # in nobody's way, for it is not looked at
    assert names(load(tmp_path).test, tmp_path) == ["val/a/2.png"]


def test_train_without_labels_and_train_alone_are_understood(tmp_path):
    write(tmp_path / "tree" / "train" / "1.png")
    assert load(tmp_path / "tree").train.labels is None and load(tmp_path / "tree").test is None
    write(tmp_path / "tree" / "test" / "1.png")
    assert len(load(tmp_path / "tree").test) == 1
    for name in ("train", "bus"):
        write(tmp_path / "vehicles" / name / "1.png")
    assert load(tmp_path / "vehicles").train.classes == ("bus", "train")


def test_a_test_class_that_training_lacks_is_an_error(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/zebra/1.png"):
        write(tmp_path / name)
    with pytest.raises(ValueError, match="class 'zebra', which training does not have"):
        load(tmp_path)


def test_links_are_followed_but_no_loop_and_hidden_files_are_left_out(tmp_path):
    folder = tmp_path / "photos"
    outside = write(tmp_path / "elsewhere" / "2.png")
    for name in ("sub/1.png", ".hidden.png", ".thumbs/1.png", "._1.png"):
        write(folder / name)
    (folder / "link.png").symlink_to(outside)
    (folder / "more").symlink_to(outside.parent)
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "sub" / "notes.txt").write_text("not an image")
    assert names(load(folder).train, folder) == ["link.png", "more/2.png", "sub/1.png"]


def test_a_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="no images in .*expected files ending in bmp, gif, jpeg"):
        load(tmp_path)


# Unreadable files

BROKEN = {"html.jpg", "zero.png", "cut.jpg", "cut.png", "dangling.jpg", "pipe.png"}


def write_broken(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if name == "html.jpg":
        path.write_text("<html><body>404 Not Found</body></html>")
    elif name == "zero.png":
        path.write_bytes(b"")
    elif name.startswith("cut"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:1500])
    elif name == "dangling.jpg":
        path.symlink_to(folder / "gone.jpg")
    else:
        os.mkfifo(folder / "fifo")
        path.symlink_to(folder / "fifo")


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_decoding_a_broken_file_names_it_in_one_line(name, tmp_path):
    write_broken(tmp_path, name)
    with pytest.raises(BadImage, match=name) as caught:
        decode(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_broken_files_among_small_ones_are_named_skipped_and_logged(tmp_path, caplog):
    for i in range(10):
        write(tmp_path / "a" / f"{i}.png")
        write(tmp_path / "b" / f"{i}.png", colour=(i, i, i))
    for name in BROKEN:
        write_broken(tmp_path / "a", name)
    with caplog.at_level(logging.WARNING, logger="moco"):
        train = load(tmp_path, max_bad=0.5).train
    assert isinstance(train, ArrayImages) and len(train) == 20
    assert {Path(path).name for path in train.skipped} == BROKEN
    assert train.labels.tolist() == [0] * 10 + [1] * 10
    assert train.images[10:, 0, 0, 0].tolist() == list(range(10))
    assert len(caplog.records) == len(BROKEN)
    assert all(any(name in line for line in caplog.messages) for name in BROKEN)


def test_broken_headers_among_large_ones_are_skipped_before_training(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.png", size=(100 + i, 90))
    for name in BROKEN:
        write_broken(tmp_path, name)
    train = load(tmp_path, max_bad=0.7).train
    assert isinstance(train, FileImages)
    # A file cut off after its header shows only when it is read.
    assert {Path(path).name for path in train.skipped} == BROKEN - {"cut.jpg", "cut.png"}
    assert len(train) == 6


def test_many_broken_files_are_counted_in_the_log(tmp_path, caplog):
    for i in range(30):
        write(tmp_path / f"{i}.png")
    for i in range(14):
        (tmp_path / f"bad{i:02}.jpg").write_bytes(b"x")
    with caplog.at_level(logging.WARNING, logger="moco"):
        load(tmp_path, max_bad=0.5)
    assert len(caplog.records) == 11 and "4 more files, 14 of 44" in caplog.messages[-1]


def test_more_broken_files_than_allowed_are_an_error_with_the_first(tmp_path):
    for i in range(9):
        write(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"1 of 10 files.*at most 9.00%.*broken\.png"):
        load(tmp_path, max_bad=0.09)
    assert len(load(tmp_path, max_bad=0.1).train) == 9


def test_only_broken_files_are_an_error_whatever_is_allowed(tmp_path):
    write_broken(tmp_path, "html.jpg")
    with pytest.raises(ValueError, match="1 of 1 files"):
        load(tmp_path, max_bad=1.0)


@pytest.mark.parametrize("num_pixels", [800, 1500])
def test_a_decompression_bomb_is_a_bad_image(num_pixels, tmp_path, monkeypatch):
    write(tmp_path / "bomb.png", size=(num_pixels, 1))
    # Pillow warns above its limit and refuses above twice the limit.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(BadImage, match=r"bomb\.png.*million pixels"):
        decode(tmp_path / "bomb.png")


# Small sets in memory


def test_small_images_of_one_size_are_held_others_are_not(tmp_path):
    for i in range(3):
        write(tmp_path / "small" / f"{i}.png", size=(64, 60))
        write(tmp_path / "large" / f"{i}.png", size=(65, 60))
        write(tmp_path / "mixed" / f"{i}.png", size=(20 + i, 20))
    small = load(tmp_path / "small").train
    assert isinstance(small, ArrayImages) and small.images.shape == (3, 3, 60, 64)
    assert isinstance(load(tmp_path / "large").train, FileImages)
    assert isinstance(load(tmp_path / "mixed").train, FileImages)


def test_train_and_test_share_the_memory_allowed(tmp_path):
    for i in range(4):
        write(tmp_path / "train" / f"{i}.png")
        write(tmp_path / "test" / f"{i}.png")
    one_split = 4 * 3 * 8 * 8 / 2**30
    assert [type(part) for part in load(tmp_path, memory=2 * one_split)] == [ArrayImages, ArrayImages]
    assert [type(part) for part in load(tmp_path, memory=1.5 * one_split)] == [ArrayImages, FileImages]
    assert [type(part) for part in load(tmp_path, memory=0.5 * one_split)] == [FileImages, FileImages]


def test_held_and_decoded_pixels_are_equal(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / f"{i}.jpg")
    held, files = load(tmp_path).train, load(tmp_path, memory=1e-9).train
    assert isinstance(held, ArrayImages) and isinstance(files, FileImages) and held.paths == files.paths
    for i in range(5):
        assert torch.equal(held.decode(i), files.decode(i))
        expected = np.asarray(Image.open(held.paths[i]).convert("RGB"))
        assert np.abs(expected.astype(int) - held.decode(i).permute(1, 2, 0).numpy()).max() <= 1


def test_select_keeps_paths_and_labels_together(tmp_path):
    for name in ("a/1.png", "b/2.png", "b/3.png"):
        write(tmp_path / name, size=(70, 70))
    chosen = load(tmp_path).train.select([2, 0])
    assert names(chosen, tmp_path) == ["b/3.png", "a/1.png"] and chosen.labels.tolist() == [1, 0]


# Real images


def test_cifar10_jpegs_become_one_tensor_with_the_labels_of_their_folders(moco_data, tmp_path):
    # Links to the first few of each class: all 60,000 take longer than a test should.
    for split, count in (("train", 20), ("test", 5)):
        for folder in sorted((moco_data / "cifar10" / split).iterdir()):
            (tmp_path / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                (tmp_path / split / folder.name / path.name).symlink_to(path)
    train, test = load(tmp_path)
    assert isinstance(train, ArrayImages) and train.images.shape == (200, 3, 32, 32) and train.skipped == ()
    assert test.images.shape == (50, 3, 32, 32) and test.classes == train.classes
    assert train.classes[:3] == ("airplane", "automobile", "bird") and len(train.classes) == 10
    assert train.labels.tolist() == [label for label in range(10) for _ in range(20)]
    for i in (0, 77, 199):
        with Image.open(train.paths[i]) as image:
            assert np.array_equal(np.asarray(image).transpose(2, 0, 1), train.images[i].numpy())
