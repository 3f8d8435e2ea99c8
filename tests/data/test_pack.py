import json
import os
import re
import signal
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moco.config import DataConfig
from moco.data import FileImages, as_images, load_data
from moco.data.packing.pack import pack
from moco.data.places.tar_index import Index

KIB = 1 / 1024


def photo(path: Path, level: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (70, 80), (level, level, level)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve files of about half a KiB, in three classes."""
    for i in range(12):
        photo(tmp_path / "photos" / "ape bee cat".split()[i % 3] / f"{i:02}.jpg", i)
    return tmp_path / "photos"


def contents(out: Path) -> dict[str, bytes]:
    """All members of all shards."""
    found = {}
    for path in sorted(out.rglob("*.tar")):
        with tarfile.open(path) as file:
            found |= {member.name: _bytes(file, member) for member in file}
    return found


def _bytes(file: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = file.extractfile(member)
    assert content
    return content.read()


def everything(out: Path) -> dict[str, bytes]:
    """All files but the indexes, which know when their tar was written."""
    return {str(path): path.read_bytes() for path in out.rglob("*") if path.is_file() and path.suffix != ".index"}


def load(source: Path, **settings: Any) -> tuple[FileImages, FileImages | None]:
    train, test = load_data(DataConfig.model_validate({"source": str(source)} | settings))
    assert isinstance(train, FileImages) and (test is None or isinstance(test, FileImages))
    return train, test


def test_bytes_and_classes_are_in_tars_that_others_read(folder: Path, tmp_path: Path) -> None:
    packed = pack(folder, tmp_path / "out", shard_size=8 * KIB)
    assert packed.images == 12 and packed.shards == len(list((tmp_path / "out").glob("*.tar"))) > 1
    found = contents(tmp_path / "out")
    assert {name: found[f"{name}.jpg"] for name in (n[:-4] for n in found if n.endswith(".cls"))} == {
        f"{path.parent.name}/{path.stem}": path.read_bytes() for path in folder.rglob("*.jpg")
    }
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["ape", "bee", "cat"]
    assert found["bee/01.cls"] == b"1" and len(found) == 24
    with tarfile.open(tmp_path / "out" / "0000.tar") as file:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in file} == {(0, 0, 0, "", 0o644)}
    assert packed.size == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))


def test_packed_images_are_those_of_the_folder_shuffled(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "out", shard_size=8 * KIB)
    (theirs, _), (ours, _) = load(folder), load(tmp_path / "out")
    assert ours.classes == theirs.classes and ours.labels is not None and theirs.labels is not None

    def described(images: FileImages) -> list[tuple[str, int, int]]:
        labels = [] if images.labels is None else images.labels.tolist()
        levels = (int(images.decode(i)[0, 0, 0]) for i in range(len(images)))
        return list(zip((path[-10:] for path in images.paths), labels, levels, strict=True))

    assert sorted(described(ours)) == sorted(described(theirs)) and described(ours) != described(theirs)


def test_the_same_images_give_the_same_bytes_for_any_number_of_workers(folder: Path, tmp_path: Path) -> None:
    one, three = pack(folder, tmp_path / "a", shard_size=8 * KIB, workers=1), tmp_path / "b"
    pack(folder, three, shard_size=8 * KIB, workers=3)
    assert one.shards > 2
    assert list(everything(tmp_path / "a").values()) == list(
        {name.replace("/b/", "/a/"): content for name, content in everything(three).items()}.values()
    )


def test_train_and_test_are_packed_apart(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("ape", "bee"):
            photo(tmp_path / "photos" / part / name / "1.jpg", 1)
    packed = pack(tmp_path / "photos", tmp_path / "out")
    assert packed.shards == 2 and sorted(os.listdir(tmp_path / "out" / "test")) == [
        "0000.tar",
        "0000.tar.index",
        "classes.json",
    ]
    assert json.loads((tmp_path / "out" / "pack.json").read_text())["shards"] == {
        "train": ["train/0000.tar"],
        "test": ["test/0000.tar"],
    }
    train, test = load(tmp_path / "out")
    assert test is not None and train.classes == test.classes == ("ape", "bee") and len(train) == len(test) == 2


def test_images_without_classes_have_no_cls(folder: Path, tmp_path: Path) -> None:
    pack(folder / "ape", tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["00.jpg", "03.jpg", "06.jpg", "09.jpg"]
    assert load(tmp_path / "out")[0].labels is None


def test_progress_counts_images_up_to_all(folder: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    pack(folder, tmp_path / "out", workers=2, shard_size=8 * KIB, on_progress=lambda *done: told.append(done))
    assert told == [(i, 12) for i in range(1, 13)]


# Names


def test_names_become_safe_and_stay_unique(tmp_path: Path) -> None:
    names = ["a.jpg", "a.png", "A.jpg", "b.c.jpg", "b c.jpg", "ü.jpg", os.fsdecode(b"\xff.jpg"), f"{'l' * 200}.jpg"]
    for level, name in enumerate(names):
        photo(tmp_path / "p" / name, level)
    pack(tmp_path / "p", tmp_path / "out")
    found = contents(tmp_path / "out")
    assert sorted(found.values()) == sorted((tmp_path / "p" / name).read_bytes() for name in names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+\.(jpg|png)", name) and len(name) <= 100 for name in found)
    assert len({name.partition(".")[0].lower() for name in found}) == len(names) and "A.jpg" in found


def test_a_name_that_lies_gets_the_suffix_of_what_the_file_is(tmp_path: Path) -> None:
    content = photo(tmp_path / "p" / "real.png", 3).read_bytes()
    (tmp_path / "p" / "liar.jpg").write_bytes(content)
    photo(tmp_path / "p" / "w.webp", 3).rename(tmp_path / "p" / "x.gif")
    pack(tmp_path / "p", tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["liar.png", "real.png", "x.webp"]


def test_shards_are_packed_anew_from_shards(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "small", shard_size=8 * KIB)
    packed = pack(tmp_path / "small", tmp_path / "large")
    assert packed.shards == 1 and contents(tmp_path / "large") == contents(tmp_path / "small")


# Killed, and begun again


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_any_image_it_goes_on_and_ends_as_if_undisturbed(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "whole", shard_size=8 * KIB)
    expected = {name.replace("/whole/", "/out/"): each for name, each in everything(tmp_path / "whole").items()}
    out, kept = tmp_path / "out", dict[str, int]()
    for at in (0, 5, 9):
        child = os.fork()
        if child == 0:

            def die(done: int, total: int, at: int = at) -> None:
                if done == at + 1:
                    os.kill(os.getpid(), signal.SIGKILL)

            pack(folder, out, shard_size=8 * KIB, workers=1, on_progress=die)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not (out / "pack.json").exists()
        for name, time in kept.items():
            assert (out / name).stat().st_mtime_ns == time, "a finished shard was written again"
        kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert kept
    pack(folder, out, shard_size=8 * KIB)
    assert everything(out) == expected
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}.items()


def test_a_part_of_what_was_packed_is_refused(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "out", shard_size=8 * KIB)
    tars = sorted((tmp_path / "out").rglob("*.tar"))
    assert len(tars) > 1
    tars[-1].rename(tmp_path / "elsewhere.tar")
    with pytest.raises(
        ValueError, match=f"lacks 1 of the shards that its pack.json names, the first is '{tars[-1].name}'"
    ):
        load_data(DataConfig(source=str(tmp_path / "out")))
    (tmp_path / "out" / "pack.json").unlink()
    with pytest.raises(ValueError, match="is not packed to its end; the same `moco pack` command goes on"):
        load_data(DataConfig(source=str(tmp_path / "out")))


def test_a_shard_that_was_damaged_is_written_again(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "out", shard_size=8 * KIB)
    before = everything(tmp_path / "out")
    with (tmp_path / "out" / "0001.tar").open("r+b") as file:
        file.seek(700)
        file.write(b"X")
    (tmp_path / "out" / "0000.tar.index").unlink()
    pack(folder, tmp_path / "out", shard_size=8 * KIB)
    assert everything(tmp_path / "out") == before
    stamp = Index(tmp_path / "out" / "0000.tar.index").stamp
    assert stamp.time == (tmp_path / "out" / "0000.tar").stat().st_mtime_ns


def test_a_folder_with_something_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "out")
    before = everything(tmp_path / "out")
    with pytest.raises(ValueError, match="was begun with other images or another shard size"):
        pack(folder, tmp_path / "out", shard_size=8 * KIB)
    photo(folder / "ape" / "new.jpg", 5)
    with pytest.raises(ValueError, match="was begun with other images"):
        pack(folder, tmp_path / "out")
    with pytest.raises(FileExistsError, match="has something else in it"):
        pack(folder, folder)
    assert everything(tmp_path / "out") == before


# What can go wrong


def test_files_that_vanish_are_left_out_and_named(folder: Path, tmp_path: Path) -> None:
    images, _ = load(folder)
    (folder / "bee" / "04.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 12 files cannot be read.*bee/04.jpg' \(No such file"):
        pack(images, tmp_path / "strict")
    assert not list((tmp_path / "strict").glob("*.tar"))
    for _ in range(2):  # the second time they are known from the index
        packed = pack(images, tmp_path / "out", max_bad=0.1)
        assert packed.images == 11 and packed.unreadable == (str(folder / "bee" / "04.jpg"),)
    assert json.loads((tmp_path / "out" / "pack.json").read_text())["unreadable"] == list(packed.unreadable)
    assert len(load(tmp_path / "out")[0]) == 11


def test_what_only_has_an_images_name_is_in_no_shard(folder: Path, tmp_path: Path) -> None:
    images, _ = load(folder)
    for name in ("bee/04.jpg", "ape/00.jpg"):
        (folder / name).write_bytes(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    with pytest.raises(ValueError, match=r"1 of 12 files cannot be read.*\.jpg' \(not an image in a known format\)"):
        pack(images, tmp_path / "strict", workers=1)
    packed = pack(images, tmp_path / "out", max_bad=0.2)
    assert packed.unreadable == (str(folder / "ape" / "00.jpg"), str(folder / "bee" / "04.jpg"))
    assert packed.images == 10 and not any(b"PRIVATE" in path.read_bytes() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "bmp", "gif"])
def test_every_format_that_is_read_is_packed(kind: str, tmp_path: Path) -> None:
    photo(tmp_path / "p" / f"a.{kind}", 3)
    pack(tmp_path / "p", tmp_path / "out")
    assert list(contents(tmp_path / "out")) == [f"a.{kind}"]


def test_of_two_that_pack_into_one_folder_the_second_is_refused(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def again(done: int, total: int) -> None:
        if not said:
            with pytest.raises(ValueError, match="out is being written by another `moco pack`; wait for it") as caught:
                pack(folder, tmp_path / "out")
            said.append(str(caught.value))

    assert pack(folder, tmp_path / "out", workers=1, on_progress=again).images == 12
    assert len(said) == 1 and "\n" not in said[0]
    assert pack(folder, tmp_path / "out").images == 12  # nothing is left locked


def test_a_disk_that_gives_back_other_bytes_is_found_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def spoil(file: int) -> None:
        sync(file)
        if os.fstat(file).st_size > 2000:
            os.pwrite(file, b"X", 1000)

    monkeypatch.setattr(os, "fsync", spoil)
    with pytest.raises(OSError, match="0000.tar could not be written: what is read back is not what was written"):
        pack(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar")) and not list((tmp_path / "out").glob(".*.part"))


def test_without_room_nothing_is_begun(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1049))
    with pytest.raises(OSError, match="the shards take .* GiB, and .* has room for 9.77e-07 GiB"):
        pack(folder, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == [".plan.json"]


def test_what_cannot_be_packed_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the 2 images are arrays, not image files"):
        pack(as_images(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)), tmp_path / "out")
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 4, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="the 2 images are arrays, not image files"):
        pack(tmp_path / "x.npy", tmp_path / "out")
    with pytest.raises(ValueError, match="shard_size is 0"):
        pack(folder, tmp_path / "out", shard_size=0)
    assert not (tmp_path / "out").exists()
