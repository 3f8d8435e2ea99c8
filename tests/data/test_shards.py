import functools
import gzip
import http.server
import io
import json
import logging
import multiprocessing
import os
import tarfile
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from moco.config import DataConfig
from moco.data import ArrayImages, BadImage, FileImages, Loader, epoch_order, fingerprint, load_data, resized, some_of
from moco.data.places import tar_index as indexes
from moco.data.places import tars
from moco.data.places.open import open_image, read_image
from moco.data.places.remote import FETCHES, Unavailable, find, open_copy
from moco.data.places.shard_order import windowed
from moco.data.places.tar_headers import scan
from moco.data.places.tars import let_go
from moco.data.sources import folder as folders
from moco.data.sources.listing import HELD_OUT
from moco.data.sources.shards import expand
from moco.data.spacing import evenly

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    monkeypatch.setenv("MOCO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("moco.data.places.remote._PAUSE", 0)
    yield tmp_path / "cache"
    let_go()
    find.cache_clear()
    fsspec.filesystem("memory").store.clear()


def png(level: int, *, side: int = 70) -> bytes:
    """Grey of this level; larger than what is held in memory."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (level, level, level)).save(file, "png")
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def shards(folder: Path, *, count: int = 3, each: int = 4) -> Path:
    """Image i of all is grey of level i and of class i mod 3."""
    for shard in range(count):
        members = {}
        for i in range(shard * each, (shard + 1) * each):
            members |= {f"{i:04}.png": png(i), f"{i:04}.cls": str(i % 3).encode()}
        tar(folder / f"{shard:04}.tar", members)
    return folder


def load(source: object, **settings: Any) -> Any:
    return load_data(DataConfig.model_validate({"source": str(source)} | settings))


def crop(image: torch.Tensor, id: int, epoch: int) -> torch.Tensor:
    return torch.stack([image[:, :5, :5], torch.full((3, 5, 5), (id + epoch) % 256, dtype=torch.uint8)])


def files(images: object) -> FileImages:
    assert isinstance(images, FileImages)
    return images


def levels(images: FileImages) -> list[int]:
    return [int(each[0, 0, 0]) for each in images.decode_many(range(len(images))) if isinstance(each, torch.Tensor)]


# Headers


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_tarfile_reads_them(kind: int, tmp_path: Path) -> None:
    long = f"{'folder/' * 18}name.jpg"
    names = ["a.jpg", "b/c d.png", f"{'d' * 60}/{'e' * 60}.jpg", long]
    if kind != tarfile.USTAR_FORMAT:
        names += ["é/ü.jpg", f"{'é' * 200}.jpg", os.fsdecode(b"\xff.jpg")]
    path = tar(tmp_path / "a.tar", {name: bytes(number * 300) for number, name in enumerate(names)}, kind)
    with tarfile.open(path, "a", format=kind) as file:
        file.add(tmp_path, "a/folder", recursive=False)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a" * 150 if kind != tarfile.USTAR_FORMAT else "a.jpg"
        file.addfile(link)
        last = tarfile.TarInfo("last.jpg")
        last.size = 3
        file.addfile(last, io.BytesIO(b"end"))
    with tarfile.open(path) as file, path.open("rb") as raw:
        expected = [(each.name, each.offset_data, each.size) for each in file if each.isfile()]
        assert [tuple(each) for each in scan(raw.fileno(), "a.tar").members] == expected
    assert [name for name, _, _ in expected] == [*names, "last.jpg"]


def test_a_member_beyond_what_octal_digits_can_say_is_found(tmp_path: Path) -> None:
    big = tarfile.TarInfo("big.jpg")
    big.size = 9 * 2**30
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "a.tar"
        head = big.tobuf(kind)
        with path.open("wb") as file:  # a file with a hole
            file.write(head)
            file.truncate(len(head) + big.size + 1024)
        with path.open("rb") as file:
            assert scan(file.fileno(), "a.tar").members == [("big.jpg", len(head), big.size)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b"a tar"), "is compressed .gzip.; expected a plain tar"),
        (b"", "is empty"),
        (b"<html>not found</html>", "is no tar; expected an uncompressed tar of images"),
    ],
    ids=["compressed", "empty", "a page"],
)
def test_what_is_no_plain_tar_is_refused_in_one_line(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        load(tmp_path / "a.tar")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is compressed"):
        load(tmp_path / "0000.tar.gz")


# Sources


def test_a_tar_a_pattern_a_glob_and_a_folder_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path / "shards")
    (folder / "classes.json").write_text('["ape", "bee", "cat"]')
    train, test = load(f"{folder}/{{0000..0002}}.tar")
    assert test is None and levels(files(train)) == list(range(12))
    assert train.labels.tolist() == [i % 3 for i in range(12)] and train.classes == ("ape", "bee", "cat")
    assert train.paths[5] == f"{folder}/0001.tar/0005.png"
    for same in (folder, f"{folder}/*.tar", f"{folder}/000{{0,1,2}}.tar"):
        assert load(same).train.paths == train.paths
    monkeypatch.chdir(folder)
    assert load("0001.tar").train.paths == tuple(f"0001.tar/{i:04}.png" for i in range(4, 8))
    with pytest.raises(ValueError, match=r"2 of 5 shards cannot be opened; the first is '.*0003.tar': No such file"):
        load(f"{folder}/{{0000..0004}}.tar")
    with pytest.raises(ValueError, match="no file is called as in"):
        load(f"{folder}/x*.tar")


@pytest.mark.parametrize("held_out", HELD_OUT)
def test_shards_know_the_same_held_out_folders_as_images(tmp_path: Path, held_out: str) -> None:
    shards(tmp_path / "train", count=2), shards(tmp_path / held_out, count=1)
    assert [len(part) for part in load(tmp_path)] == [8, 4]


def test_shards_in_train_and_test_are_the_splits(tmp_path: Path) -> None:
    shards(tmp_path / "train", count=2), shards(tmp_path / "val", count=1)
    train, test = load(tmp_path)
    assert (len(train), len(test)) == (8, 4) and train.classes == test.classes == ("0", "1", "2")
    tar(tmp_path / "val" / "0000.tar", {"a.png": png(0), "a.cls": b"7"})
    with pytest.raises(ValueError, match="class number 7; expected less than 3"):
        load(tmp_path)


def test_numbers_in_braces_keep_their_zeros() -> None:
    assert expand("{08..10}.{a,b}") == ["08.a", "08.b", "09.a", "09.b", "10.a", "10.b"]
    assert expand("{x}/1.tar") == ["{x}/1.tar"]
    with pytest.raises(ValueError, match="counts down"):
        expand("{3..1}.tar")


def test_a_folder_of_images_stays_one_though_a_tar_lies_in_it(tmp_path: Path) -> None:
    (tmp_path / "set.tar").mkdir()
    (tmp_path / "set.tar" / "1.png").write_bytes(png(1))
    shards(tmp_path / "set.tar", count=1)
    assert load(tmp_path / "set.tar").train.paths == (str(tmp_path / "set.tar" / "1.png"),)
    assert levels(files(load(tmp_path / "set.tar").train)) == [1]


@pytest.mark.parametrize(
    ("beside", "labels", "classes"),
    [
        ({"a.cls": b"1\n", "b.cls": b"0"}, [1, 0], ("0", "1")),
        ({"a.json": b'{"label": 2}', "b.json": b'{"cls": 0}'}, [2, 0], ("0", "1", "2")),
        ({"a.cls": b"zebra", "b.json": b'{"label": "ape"}'}, [1, 0], ("ape", "zebra")),
        ({"a.cls": b"1", "b.json": b'{"width": 3}'}, None, None),
        ({"a.json": b"[" * 5000, "b.cls": b"-4"}, [0, 1], None),
        ({}, None, None),
    ],
)
def test_labels_come_from_cls_and_json(beside: Any, labels: Any, classes: Any, tmp_path: Path) -> None:
    members = {"d/a.jpg.png": png(0), "d/b.png": png(1), "d/._b.png": b"x", "d/notes.txt": b"x"}
    train = load(tar(tmp_path / "a.tar", members | {f"d/{name}": content for name, content in beside.items()})).train
    assert [path.rpartition("/")[2] for path in train.paths] == ["a.jpg.png", "b.png"]
    if classes or not labels:
        assert train.classes == classes and (
            train.labels is None if labels is None else train.labels.tolist() == labels
        )


def test_small_images_in_shards_are_held_in_memory(tmp_path: Path) -> None:
    train = load(tar(tmp_path / "a.tar", {f"{i}.png": png(i, side=8) for i in range(3)})).train
    assert isinstance(train, ArrayImages) and train.images[:, 0, 0, 0].tolist() == [0, 1, 2]


# The index


def test_headers_are_read_once_and_again_when_the_tar_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar(tmp_path / "a.tar", {"a.png": png(1)})
    assert len(load(path).train) == 1 and (tmp_path / "a.tar.index").is_file()
    calls, read = [], indexes.read_tar
    monkeypatch.setattr(indexes, "read_tar", lambda *given: calls.append(given) or read(*given))
    assert len(load(path).train) == 1 and not calls
    tar(path, {"a.png": png(1), "b.png": png(2)})
    assert len(load(path).train) == 2 and len(calls) == 1
    for damage in (b"", b"MOCOIDX1", (tmp_path / "a.tar.index").read_bytes()[:-20]):
        (tmp_path / "a.tar.index").write_bytes(damage)
        assert len(load(path).train) == 2


def test_beside_a_tar_that_cannot_be_written_to_the_index_is_in_the_cache(tmp_path: Path, cache: Path) -> None:
    path = tar(tmp_path / "a.tar", {"a.png": png(1)})
    (tmp_path / "a.tar.index").mkdir()
    assert levels(files(load(path).train)) == [1]
    assert len(list((cache / "indexes").iterdir())) == 1
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.index", "cache"]


def test_an_index_finds_each_of_many_names_and_no_other(tmp_path: Path) -> None:
    members = [indexes.Member(f"{i}.png", i * 512, i) for i in range(500)]
    names = [member.name for member in members]
    content = indexes.Content(names, [-1] * 500, None, (), None)
    (tmp_path / "i").write_bytes(indexes.to_bytes(members, content, indexes.Stamp(10**6, 1)))
    index = indexes.Index(tmp_path / "i")
    assert [index.find(f"{i}.png".encode()) for i in range(500)] == [(i * 512, i) for i in range(500)]
    assert index.find(b"500.png") is None and index.content() == content
    (tmp_path / "i").write_bytes(indexes.to_bytes(members, content, indexes.Stamp(600, 1)))
    with pytest.raises(ValueError, match="does not fit its tar"):
        indexes.Index(tmp_path / "i").content()


def test_names_that_lead_out_of_the_tar_are_left_out_and_named(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"../x.png": png(1), "/y.png": png(2), "z.png": png(3)})
    assert files(load(path, max_bad=0.7).train).skipped == (f"{path}/../x.png", f"{path}//y.png")
    with pytest.raises(ValueError, match="its name leads out of the tar"):
        load(path)


def test_of_two_images_of_one_name_the_later_counts(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"x.png": png(1)})
    with tarfile.open(path, "a") as file:
        again = tarfile.TarInfo("x.png")
        again.size = len(png(9))
        file.addfile(again, io.BytesIO(png(9)))
    assert levels(files(load(path).train)) == [9]


def test_suffixes_are_those_of_folders() -> None:
    assert indexes.SUFFIXES == folders.SUFFIXES


# A shard cut in half


def cut(path: Path, name: str, after: int = 10) -> None:
    """So many bytes after the content of a member begins."""
    with tarfile.open(path) as file:
        end = file.getmember(name).offset_data + after
    os.truncate(path, end)


def test_what_a_cut_shard_has_lost_is_counted_by_its_earlier_index(tmp_path: Path, caplog: Any) -> None:
    folder = shards(tmp_path / "s", each=10)
    assert len(load(folder).train) == 30
    cut(folder / "0001.tar", "0015.png")
    with pytest.raises(ValueError, match=r"5 of 30 files cannot be read, .*0001.tar/0015.png' \(it is cut off"):
        load(folder)
    with caplog.at_level(logging.WARNING, "moco"):
        train = files(load(folder, max_bad=0.5).train)
    assert "0001.tar': it is cut off; the 5 images before are used" in caplog.text
    assert train.skipped == tuple(f"{folder}/0001.tar/{i:04}.png" for i in range(15, 20))
    assert levels(train) == [*range(15), *range(20, 30)] and train.labels is not None
    assert files(load(folder, max_bad=0.5).train).skipped == train.skipped  # the new index remembers
    with pytest.raises(BadImage, match="does not hold it"):
        FileImages(train.skipped, None, None).decode(0)


@pytest.mark.parametrize(
    ("name", "after", "lost"),
    [
        ("0015.png", 10, "0015.png"),
        ("0015.cls", 0, "0015.png"),
        ("0015.cls", -300, "0015.png"),
        ("0015.cls", 612, "(the rest)"),
    ],
)
def test_of_a_cut_shard_that_nobody_had_indexed_the_first_lost_image_is_named(
    name: str, after: int, lost: str, tmp_path: Path
) -> None:
    folder = shards(tmp_path / "s", each=10)
    cut(folder / "0001.tar", name, after)
    train = files(load(folder, max_bad=0.1).train)
    assert train.skipped == (f"{folder}/0001.tar/{lost}",)
    assert levels(train) == [*range(16 if lost == "(the rest)" else 15), *range(20, 30)] and train.labels is not None
    with pytest.raises(ValueError, match="1 of 2[67] files cannot be read"):
        load(folder)


def test_a_shard_cut_while_it_is_in_use_gives_bad_images(tmp_path: Path) -> None:
    folder = shards(tmp_path / "s", count=1)
    train = files(load(folder).train)
    assert levels(train) == [0, 1, 2, 3]
    os.truncate(folder / "0000.tar", 1000)
    assert sum(isinstance(each, BadImage) for each in train.decode_many(range(4))) >= 3


# Reading


def test_an_image_is_a_file_wherever_it_lies(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"d/a.png": png(1), "b.png": png(2)})
    assert read_image(f"{path}/d/a.png") == png(1) and read_image(f"{path}/b.png") == png(2)
    with open_image(f"{path}/b.png") as file:
        file.seek(-4, os.SEEK_END)
        assert file.read(2) == png(2)[-4:-2] and file.read() == png(2)[-2:] and file.read() == b""
        assert file.seek(1) == 1 and file.read(3) == b"PNG"
    with pytest.raises(FileNotFoundError):
        open_image(f"{path}/c.png")
    with pytest.raises(FileNotFoundError):
        open_image(f"{tmp_path}/no.tar/c.png")


def test_a_process_keeps_as_many_tars_open_as_its_limit_lets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    for soft, number in ((1024, 256), (256, 16), (10**6, 1024), (resource.RLIM_INFINITY, 1024)):
        monkeypatch.setattr(resource, "getrlimit", lambda which, soft=soft: (soft, soft))
        assert tars.num_open() == number
    monkeypatch.setattr(tars, "resource", None)
    assert tars.num_open() == 1024


def test_hundreds_of_tars_in_turns_are_each_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if tars.num_open() < 200:
        pytest.skip("too few files may be open here")
    paths = [f"{tar(tmp_path / f'{i:03}.tar', {'a.png': png(i % 5)})}/a.png" for i in range(200)]
    calls, opened = [], tars.index_of
    monkeypatch.setattr(tars, "index_of", lambda path: calls.append(path) or opened(path))
    for _ in range(2):
        assert all(read_image(path) == png(i % 5) for i, path in enumerate(paths))
    assert len(calls) == 200


def test_shards_give_a_folders_pictures_and_crops(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 90, 120, 3), dtype=np.uint8)
    members = {}
    for i, pixels in enumerate(noise):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "jpeg")
        members[f"{i}.jpg"] = file.getvalue()
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{i}.jpg").write_bytes(file.getvalue())
    ours, theirs = load(tar(tmp_path / "a.tar", members)).train, load(tmp_path / "folder").train
    assert torch.equal(resized(ours, range(6), size=40), resized(theirs, range(6), size=40))
    assert torch.equal(files(ours).select([3, 1]).decode(0), files(theirs).decode(3))


def test_a_cache_of_pixels_is_made_anew_when_the_tar_has_changed(tmp_path: Path) -> None:
    path, settings = tmp_path / "a.tar", {"cache": tmp_path / "pixels", "cache_side": 40}
    for level in (1, 9):
        train = files(load(tar(path, {"a.png": png(level), "b.png": png(level)}), **settings).train)
        os.utime(path, ns=(level, level))
        assert train.cache is not None and levels(train) == [level, level]


def test_training_and_test_shards_have_caches_of_their_own(tmp_path: Path) -> None:
    for part, level in (("train", 1), ("test", 9)):
        tar(tmp_path / "both" / part / "0000.tar", {"a.png": png(level), "b.png": png(level)})
    for _ in range(2):  # made, and found again
        found = load(tmp_path / "both", cache=tmp_path / "pixels", cache_side=40)
        assert found.test is not None
        assert [levels(files(each)) for each in found] == [[1, 1], [9, 9]]
        made = {path: path.stat().st_mtime_ns for path in (tmp_path / "pixels").rglob("*.pixels")}
        assert len(made) == 2
        time.sleep(0.02)
    assert made == {path: path.stat().st_mtime_ns for path in made}


def test_the_sequence_is_one_for_any_number_of_workers_and_goes_on_from_any_step(tmp_path: Path) -> None:
    images = load(shards(tmp_path / "s", each=7)).train

    def sequence(workers: int, start: int = 0) -> list[list[int]]:
        loader = Loader(images, batch_size=4, seed=5, device=CPU, workers=workers, crop=crop)
        batches = list(loader.epoch(3, start=start))
        assert all(batch[:, 0, 0, 0, 0].tolist() == ids.tolist() for batch, ids in batches)
        return [ids.tolist() for _, ids in batches]

    whole = sequence(1)
    assert len(whole) == 5 and sequence(4) == whole and sequence(2, start=2) == whole[2:]


# Elsewhere


def put(name: str, content: bytes) -> None:
    fsspec.filesystem("memory").pipe_file(f"/{name}", content)


def remote_shards(tmp_path: Path, **given: int) -> list[str]:
    folder = shards(tmp_path / "made", **given)
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        put(f"set/{name}", (folder / name).read_bytes())
    return names


def copies(cache: Path) -> int:
    return len(list((cache / "shards").glob("*.tar")))


def test_shards_behind_a_url_are_read_from_whole_copies(tmp_path: Path, cache: Path) -> None:
    remote_shards(tmp_path)
    train = load("memory://set/{0000..0002}.tar").train
    assert levels(files(train)) == list(range(12)) and train.labels.tolist() == [i % 3 for i in range(12)]
    assert train.paths[4] == "memory://set/0001.tar/0004.png" and copies(cache) == 3
    assert load("memory:///set/*.tar").train.paths == tuple(path.replace("//", "///") for path in train.paths)
    fsspec.filesystem("memory").store.clear()
    let_go()
    assert levels(files(train)) == list(range(12))
    with pytest.raises(ValueError, match="1 of 1 shards cannot be opened; .*there is no such file"):
        load("memory://set/7.tar")
    with pytest.raises(ValueError, match="nowhere://a.tar cannot be read here"):
        load("nowhere://a.tar")


def test_workers_of_several_processes_share_the_copies(tmp_path: Path, cache: Path) -> None:
    remote_shards(tmp_path, each=8)
    images = load("memory://set/{0000..0002}.tar").train
    loader = Loader(images, batch_size=6, seed=1, device=CPU, workers=2, crop=crop)
    batches = list(loader.epoch(0))
    assert [ids.tolist() for _, ids in batches] == epoch_order(24, seed=1, epoch=0).reshape(4, 6).tolist()
    assert all(batch[:, 0, 0, 0, 0].tolist() == ids.tolist() for batch, ids in batches)
    assert sorted(path.suffix for path in (cache / "shards").iterdir()) == sorted(
        [".tar", ".lock", ".index"] * 3 + [".lock"]
    )


def test_the_cache_keeps_to_its_bound_and_what_is_in_use(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote_shards(tmp_path, count=4)
    size = find("memory://set/0000.tar").size
    monkeypatch.setenv("MOCO_CACHE_GIB", str(2.5 * size / 2**30))
    urls = [f"memory://set/000{i}.tar" for i in range(4)]
    held = open_copy(urls[0])
    try:
        os.close(open_copy(urls[1]))
        os.close(open_copy(urls[2]))  # the first is older but in use: the second goes
        assert [find(url).local.exists() for url in urls] == [True, False, True, False]
        monkeypatch.setenv("MOCO_CACHE_GIB", str(1.5 * size / 2**30))
        monkeypatch.setattr("moco.data.places.remote.WAIT", 0)
        with pytest.raises(OSError, match="no room for memory://set/0003.tar .*MOCO_CACHE_GIB allows"):
            open_copy(urls[3])
    finally:
        os.close(held)
    (cache / "shards" / f"{'0' * 24}.{100 * size}.part").touch()  # of a process that was killed
    os.close(open_copy(urls[3]))
    assert [find(url).local.exists() for url in urls] == [False, False, False, True]
    assert not list((cache / "shards").glob("*.part"))
    monkeypatch.setenv("MOCO_CACHE_GIB", "lots")
    with pytest.raises(ValueError, match="MOCO_CACHE_GIB is 'lots'; expected a number"):
        open_copy(urls[0])


def test_images_are_read_one_shard_after_the_other_where_there_is_room_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote_shards(tmp_path, count=4)
    monkeypatch.setenv("MOCO_CACHE_GIB", str(1.5 * find("memory://set/0000.tar").size / 2**30))
    train = load("memory://set/{0000..0003}.tar").train
    assert [int(train.decode(i)[0, 0, 0]) for i in range(16)] == list(range(16))


def test_at_the_documented_room_no_worker_stands_in_anothers_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote_shards(tmp_path, count=40)
    monkeypatch.setattr("moco.data.places.remote.WAIT", 0.5)
    monkeypatch.setenv("MOCO_CACHE_GIB", str(24.5 * find("memory://set/0000.tar").size / 2**30))
    images = load("memory://set/{0000..0039}.tar").train
    loader = Loader(images, batch_size=32, seed=0, device=CPU, workers=4, crop=crop, max_bad=0.5)
    batches = list(loader.epoch(0))
    order = windowed(epoch_order(160, seed=0, epoch=0), images.paths).tolist()
    assert [id for _, ids in batches for id in ids.tolist()] == order and not loader.bad
    assert [level for batch, _ in batches for level in batch[:, 0, 0, 0, 0].tolist()] == order


def test_threads_with_room_for_one_shard_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote_shards(tmp_path, count=8)
    monkeypatch.setattr("moco.data.places.remote.WAIT", 5)
    monkeypatch.setenv("MOCO_CACHE_GIB", str(1.5 * find("memory://set/0000.tar").size / 2**30))
    paths = [f"memory://set/{i // 4:04}.tar/{i:04}.png" for i in range(32)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read_image, paths)) == [png(i) for i in range(32)]


def read_in_turn(seed: int) -> bool:
    places = torch.randint(0, 32, (150,), generator=torch.Generator().manual_seed(seed)).tolist()
    return all(read_image(f"memory://set/{i // 4:04}.tar/{i:04}.png") == png(i) for i in places)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_that_fetch_and_remove_the_same_copies_do_not_harm_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote_shards(tmp_path, count=8)
    monkeypatch.setenv("MOCO_CACHE_GIB", str(3.5 * find("memory://set/0000.tar").size / 2**30))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(read_in_turn, range(4), chunksize=1) == [True] * 4


def test_a_fetch_that_takes_its_time_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote_shards(tmp_path, count=2)
    monkeypatch.setattr("moco.data.places.remote.WAIT", 0.1)
    monkeypatch.setenv("MOCO_CACHE_GIB", str(1.5 * find("memory://set/0000.tar").size / 2**30))
    system = type(fsspec.filesystem("memory"))
    fetch = system.get_file
    monkeypatch.setattr(system, "get_file", lambda *given: (time.sleep(1), fetch(*given))[1])
    with ThreadPoolExecutor(2) as pool:
        paths = ["memory://set/0000.tar/0000.png", "memory://set/0001.tar/0004.png"]
        assert list(pool.map(read_image, paths)) == [png(0), png(4)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("why", ["slow network", "gone", "no room"])
def test_a_shard_that_cannot_be_had_stops_in_one_line_and_no_image_is_replaced(
    why: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = remote_shards(tmp_path, count=2)
    load(tmp_path / "made")
    for name in names:
        put(f"set/{name}.index", (tmp_path / "made" / f"{name}.index").read_bytes())
    loader = Loader(
        load("memory://set/{0000..0001}.tar").train,
        batch_size=4,
        seed=0,
        device=CPU,
        workers=workers,
        crop=crop,
        max_bad=1.0,
    )
    said = "memory://set/000..tar cannot be "
    if why == "slow network":

        def slow(self: Any, remote: str, local: str) -> None:
            raise TimeoutError("no answer\nin time")

        monkeypatch.setattr(type(fsspec.filesystem("memory")), "get_file", slow)
        said += "fetched, 5 times tried .TimeoutError: no answer in time.; give the command again .* --resume"
    elif why == "gone":
        for name in names:
            fsspec.filesystem("memory").rm_file(f"/set/{name}")
        said += "fetched .there is no such file.; see that it is there"
    else:
        monkeypatch.setattr("moco.data.places.remote.WAIT", 0)
        monkeypatch.setenv("MOCO_CACHE_GIB", "1e-9")
        said = "no room for memory://set/000..tar .*; raise it or set MOCO_CACHE"
    with pytest.raises(Unavailable, match=said) as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value) and not loader.bad
    assert not isinstance(caught.value, BadImage)


def test_a_shard_that_comes_cut_or_changed_is_not_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote_shards(tmp_path, count=1)
    with pytest.raises(OSError, match="other bytes than were packed"):
        open_copy("memory://set/0000.tar", sha256="0" * 64)
    system, tries = type(fsspec.filesystem("memory")), []

    def half(self: Any, remote: str, local: str) -> None:
        tries.append(remote)
        Path(local).write_bytes(self.cat_file(remote)[:1000])
        if len(tries) < 3:
            raise TimeoutError("slow")

    monkeypatch.setattr(system, "get_file", half)
    with pytest.raises(OSError, match="came as 1,000 of"):
        open_copy("memory://set/0000.tar")
    assert len(tries) == FETCHES and copies(cache) == 0


def test_a_url_of_a_packed_folder_is_both_parts(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ValueError, match="has no pack.json; expected a folder that `moco pack` wrote"):
        load("memory://set")
    remote_shards(tmp_path, count=2)
    load(tmp_path / "made")
    for name in ("0000", "0001"):
        put(f"set/{name}.tar.index", (tmp_path / "made" / f"{name}.tar.index").read_bytes())
    put("set/pack.json", json.dumps({"shards": {"train": ["0000.tar"], "test": ["0001.tar"]}}).encode())
    train, test = load("memory://set/")
    assert (len(train), len(test)) == (4, 4) and copies(cache) == 0  # the index beside says all that is needed yet
    assert levels(files(test)) == [4, 5, 6, 7] and copies(cache) == 1


def test_a_web_server_is_such_a_place(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    shards(tmp_path / "www", count=2)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler: Callable[..., Any] = functools.partial(Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            images = load(f"http://127.0.0.1:{server.server_port}/{{0000..0001}}.tar").train
            loader = Loader(images, batch_size=4, seed=0, device=CPU, workers=1, crop=crop)
            assert [b[:, 0, 0, 0, 0].tolist() == ids.tolist() for b, ids in loader.epoch(0)] == [True, True]
        finally:
            server.shutdown()
            thread.join()


def test_few_remote_shards_are_needed_at_a_time() -> None:
    paths = [f"memory://s/{shard:03}.tar/{i}.jpg" for shard in range(40) for i in range(25)]
    order = epoch_order(1000, seed=0, epoch=0)
    assert torch.equal(windowed(order, [path.removeprefix("memory://") for path in paths]), order)
    assert torch.equal(windowed(order, paths, window=40), order)
    found = windowed(order, paths, window=8)
    assert found.sort().values.tolist() == list(range(1000))
    shard = found // 25
    first = torch.tensor([int((shard == s).nonzero().min()) for s in range(40)])
    last = torch.tensor([int((shard == s).nonzero().max()) for s in range(40)])
    live = [int(((first <= at) & (at <= last)).sum()) for at in range(1000)]
    assert (
        max(live) <= 13 and max(live[300:-300]) <= 9 and min(live[50:-50]) >= 4 and len(set(shard[:20].tolist())) >= 4
    )
    assert first.argsort().tolist() != list(range(40))  # the shards themselves are shuffled
    assert not torch.equal(windowed(epoch_order(1000, seed=0, epoch=1), paths, window=8), found)


def test_batches_of_many_remote_shards_follow_that_order(tmp_path: Path, cache: Path) -> None:
    remote_shards(tmp_path, count=20, each=2)
    images = load("memory://set/{0000..0019}.tar").train
    ids = [ids for _, ids in Loader(images, batch_size=8, seed=0, device=CPU, workers=0, crop=crop).epoch(0)]
    order = epoch_order(40, seed=0, epoch=0)
    assert torch.equal(torch.cat(ids), windowed(order, images.paths)) and not torch.equal(torch.cat(ids), order)


def test_less_room_than_the_order_needs_is_refused_before_the_first_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote_shards(tmp_path, count=30)
    images = load("memory://set/{0000..0029}.tar").train
    settings: dict[str, Any] = {"batch_size": 8, "seed": 0, "device": CPU, "workers": 0, "crop": crop}
    size = find("memory://set/0000.tar").size
    for shards, enough in ((23.9, False), (24.1, True)):
        monkeypatch.setenv("MOCO_CACHE_GIB", str(shards * size / 2**30))
        if enough:
            Loader(images, **settings)
            continue
        with pytest.raises(
            ValueError, match="has room for .* GiB of shards; expected .* for the 24 that the order"
        ) as e:
            Loader(images, **settings)
        assert "\n" not in str(e.value) and "raise MOCO_CACHE_GIB" in str(e.value)
        Loader(images.select(range(23 * 4)), **settings)  # fewer shards fit


def test_many_shards_elsewhere_are_other_images_than_their_copies_here_for_their_order_is_another(
    tmp_path: Path,
) -> None:
    remote_shards(tmp_path, count=17)
    for count, same in ((16, True), (17, False)):
        here = load(f"{tmp_path}/made/{{0000..{count - 1:04}}}.tar").train
        there = load(f"memory://set/{{0000..{count - 1:04}}}.tar").train
        order = epoch_order(len(here), seed=0, epoch=0)
        assert torch.equal(windowed(order, here.paths), windowed(order, there.paths)) == same
        assert (fingerprint(here) == fingerprint(there)) == same


def test_a_look_at_images_elsewhere_fetches_few_shards(tmp_path: Path, cache: Path, caplog: Any) -> None:
    for name in remote_shards(tmp_path, count=40):
        load(tmp_path / "made" / name)
        put(f"set/{name}.index", (tmp_path / "made" / f"{name}.index").read_bytes())
    images = load("memory://set/{0000..0039}.tar").train
    with caplog.at_level(logging.INFO, "moco"):
        chosen = some_of(images, 50)
    assert "of 160 images elsewhere 50 are looked at, in 16 shards" in caplog.text
    seen = levels(files(chosen))
    assert len(set(seen)) == 50 and seen == sorted(seen) and (seen[0], seen[-1]) == (0, 159)
    assert copies(cache) == 16
    more = {path.partition(".tar/")[0] for path in some_of(images, 79).paths}
    assert len(more) == 20  # as many as hold them
    assert some_of(images.select(range(64)), 10).paths == tuple(images.paths[i] for i in evenly(64, 10))
    assert len({path.partition(".tar/")[0] for path in some_of(load(tmp_path / "made").train, 50).paths}) > 30
