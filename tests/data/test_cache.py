import hashlib
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import moco.data.cache
import moco.data.decode
import moco.files
from moco.config import DataConfig
from moco.data import ArrayImages, FileImages, Loader, load_data
from moco.views.specs import VIEWS
from moco.views.two_views import TwoViews
from small import write_stl10


def photos(folder: Path, count: int = 6) -> Path:
    """Of several shapes; 0 is small, 1 lies on its side."""
    folder.mkdir()
    for i in range(count):
        size = (30, 40) if i == 0 else (100 + 20 * i, 90 + i)
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 1 else 1
        Image.effect_noise(size, 30 + 5 * i).convert("RGB").save(folder / f"{i}.jpg", quality=90, exif=exif)
    return folder


def load(folder: Path, cache: Path | None, *, cache_side: int = 64, max_bad: float = 0.5) -> FileImages:
    config = DataConfig(source=str(folder), cache=cache, cache_side=cache_side, max_bad=max_bad)
    train = load_data(config).train
    assert isinstance(train, FileImages)
    return train


def written(cache: Path) -> dict[Path, int]:
    """Pixel files and when they were made."""
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.pixels")}


def test_a_cache_holds_upright_images_of_the_short_side_and_small_ones_as_they_are(tmp_path):
    files, cached = (
        load(photos(tmp_path / "in") if make else tmp_path / "in", cache)
        for make, cache in ((True, None), (False, tmp_path / "cache"))
    )
    assert cached.paths == files.paths and len(list((tmp_path / "cache").glob("in-*"))) == 1
    for i in range(6):
        whole, got = files.decode(i), cached.decode(i)
        short = min(whole.shape[1:])
        size = whole.shape[1:] if i == 0 else (whole.shape[1] * 64 // short, whole.shape[2] * 64 // short)
        want = F.interpolate(whole[None], size=tuple(size), mode="bilinear", antialias=True)[0]
        assert got.shape == want.shape and (got.int() - want.int()).abs().max() <= 1
        got.add_(1)  # a copy, as any decoded image
        (again,) = cached.decode_many([i])
        assert isinstance(again, torch.Tensor) and torch.equal(again, cached.decode(i))
    picked = cached.select([4, 2])
    assert torch.equal(picked.decode(1), cached.decode(2)) and torch.equal(
        picked.select([0]).decode(0), cached.decode(4)
    )


def test_the_files_are_not_opened_again_by_a_later_run(tmp_path, monkeypatch):
    first = load(photos(tmp_path / "in"), tmp_path / "cache")
    made = written(tmp_path / "cache")
    monkeypatch.setattr(moco.data.cache, "decode_shrunk", lambda *_: pytest.fail("decoded again"))
    again = load(tmp_path / "in", tmp_path / "cache")
    assert written(tmp_path / "cache") == made and torch.equal(again.decode(3), first.decode(3))


@pytest.mark.parametrize("change", ["content", "time", "name", "one more", "spoilt", "side"])
def test_a_cache_that_is_not_of_these_files_is_made_anew(change, tmp_path):
    folder, cache, settings = photos(tmp_path / "in"), tmp_path / "cache", {}
    load(folder, cache)
    (pixels,) = written(cache)
    if change == "content":
        Image.new("RGB", (80, 80), (9, 9, 9)).save(folder / "3.jpg")
    elif change == "time":
        os.utime(folder / "3.jpg", ns=(1, 1))
    elif change == "name":
        (folder / "3.jpg").rename(folder / "9.jpg")
    elif change == "one more":
        Image.new("RGB", (80, 80)).save(folder / "7.png")
    elif change == "spoilt":
        pixels.write_bytes(pixels.read_bytes()[:-1])
    else:
        settings = {"cache_side": 32}
    now, files = load(folder, cache, **settings), load(folder, None)
    assert now.paths == files.paths and len(written(cache)) == (2 if change == "side" else 1)
    assert change == "spoilt" or written(cache).keys() != {pixels}
    for i in range(len(files)):
        short = min(32 if change == "side" else 64, *files.decode(i).shape[1:])
        assert min(now.decode(i).shape[1:]) == short
        assert abs(float(now.decode(i).float().mean() - files.decode(i).float().mean())) < 1


@pytest.mark.parametrize("locks", [True, False])
def test_a_cache_whose_making_was_stopped_goes_on(locks, tmp_path, monkeypatch):
    if not locks:
        monkeypatch.setattr(moco.files, "fcntl", None)
    folder, real, read = photos(tmp_path / "in", 9), moco.data.decode.decode_shrunk, []
    want = load(folder, tmp_path / "whole")
    monkeypatch.setattr(moco.data.cache, "CHUNK", 2)

    def stops(path: str, *rest):
        read.append(Path(path).name)
        if path.endswith("5.jpg"):
            raise KeyboardInterrupt
        return real(path, *rest)

    monkeypatch.setattr(moco.data.cache, "decode_shrunk", stops)
    with pytest.raises(KeyboardInterrupt):
        load(folder, tmp_path / "cache")
    assert not written(tmp_path / "cache")
    # As a kill leaves it: pixels beyond the last row, and a part of a row.
    for part in (tmp_path / "cache").rglob("*.part"):
        with part.open("ab") as file:
            file.write(b"half")
    read.clear()
    monkeypatch.setattr(moco.data.cache, "decode_shrunk", lambda *given: (read.append(given[0]), real(*given))[1])
    got = load(folder, tmp_path / "cache")
    assert sorted(Path(each).name for each in read) == [f"{i}.jpg" for i in range(4, 9)]
    assert all(torch.equal(got.decode(i), want.decode(i)) for i in range(9))
    assert not list((tmp_path / "cache").rglob("*.part"))


MAKER = """
import errno, hashlib, os, socket, sys
from pathlib import Path
import moco.files
from moco.config import DataConfig
from moco.data import cache, load_data

source, folder, locks = sys.argv[1:]
made, make, flock = [], cache._make, moco.files.fcntl.flock

def without(file, how):
    if file.name.startswith(folder):
        raise OSError(errno.ENOTSUP, "Operation not supported")
    flock(file, how)

def counted(*given, **named):
    made.append(given)
    print("making", flush=True)
    sys.stdin.readline()
    return make(*given, **named)

cache.CHUNK, cache._make = 2, counted
moco.files.fcntl.flock = flock if locks == "locks" else without
socket.gethostname = lambda: os.environ["MACHINE"]
config = DataConfig(source=source, cache=Path(folder), cache_side=64)
print("ready", flush=True)
sys.stdin.readline()
train = load_data(config).train
digest = hashlib.sha256(b"".join(train.decode(i).numpy().tobytes() for i in range(len(train))))
print(len(made), digest.hexdigest())
"""


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such locks")
@pytest.mark.parametrize("locks", ["locks", "no locks", "no locks, two machines"])
def test_of_two_processes_one_makes_the_cache_and_without_locks_one_of_each_machine(locks, tmp_path):
    folder, cache, apart = photos(tmp_path / "in", 24), tmp_path / "cache", locks.endswith("machines")
    command = [sys.executable, "-c", MAKER, folder, cache, locks]
    both = []
    for number in range(2):
        temporary = tmp_path / (f"tmp-{number}" if apart else "tmp")
        temporary.mkdir(exist_ok=True)
        pipe, environment = subprocess.PIPE, os.environ | {"TMPDIR": str(temporary), "MACHINE": temporary.name}
        both.append(subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True))

    def says(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdout and process.stdout.readline() == f"{line}\n"

    def go_on(process: subprocess.Popen[str]) -> None:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()

    for each in both:
        says(each, "ready")
    go_on(both[0])
    says(both[0], "making")
    go_on(both[1])
    if apart:
        says(both[1], "making")
        go_on(both[1])
    else:
        time.sleep(0.5)  # in which the second comes to the lock; if it does not, only less is tested
    go_on(both[0])
    answers = [each.communicate(timeout=120) for each in both]
    assert [each.returncode for each in both] == [0, 0], answers
    counts, digests = zip(*(out.split() for out, _ in answers), strict=True)
    assert counts == ("1", "1" if apart else "0") and len(set(digests)) == 1
    whole = load(folder, tmp_path / "alone")
    pixels = b"".join(whole.decode(i).numpy().tobytes() for i in range(24))
    assert digests[0] == hashlib.sha256(pixels).hexdigest()
    (place,) = cache.iterdir()
    assert sorted(path.suffix for path in place.iterdir()) == ["", ".pixels", ".rows"]


def test_a_file_system_without_locks_is_said_and_what_was_left_of_other_files_goes(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(moco.files, "fcntl", None)
    folder, cache = photos(tmp_path / "in"), tmp_path / "cache"
    third = load(folder, cache).decode(3)
    assert "has no file locks" in caplog.text
    (place,) = cache.iterdir()
    (place / "0123.killed").mkdir()
    (place / "0123.killed" / "0123.pixels.part").write_bytes(b"half")
    Image.new("RGB", (80, 80)).save(folder / "7.png")
    again = load(folder, cache)
    assert torch.equal(again.decode(3), third) and len(again) == 7
    assert sorted(path.suffix for path in place.iterdir()) == ["", ".pixels", ".rows"]


def test_unreadable_files_are_left_out_named_and_remembered(tmp_path, caplog):
    folder = photos(tmp_path / "in")
    (folder / "2.jpg").write_bytes((folder / "2.jpg").read_bytes()[:700])
    (folder / "4.jpg").write_text("<html>")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="moco"):
            train = load(folder, tmp_path / "cache")
        assert [Path(path).name for path in train.paths] == ["0.jpg", "1.jpg", "3.jpg", "5.jpg"]
        assert [Path(path).name for path in train.skipped] == ["2.jpg", "4.jpg"] and len(caplog.records) == 2
        assert min(train.decode(2).shape[1:]) == 64
    with pytest.raises(ValueError, match="2 of 6 files cannot be read"):
        load(folder, tmp_path / "cache", max_bad=0.1)


def small_folder(folder: Path) -> str:
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (i, i, i)).save(folder / f"{i}.png")
    return str(folder)


def array_file(path: Path) -> str:
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    if path.suffix == ".npy":
        np.save(path, pixels)
    elif path.suffix == ".npz":
        np.savez(path, images=pixels)
    else:
        torch.save(torch.from_numpy(pixels).movedim(-1, 1), path)
    return str(path)


def stl10_folder(folder: Path) -> str:
    write_stl10(folder)
    return str(folder)


@pytest.mark.parametrize("memory", [2.0, 1e-9])
@pytest.mark.parametrize(
    "source",
    [
        lambda folder: "digits",
        lambda folder: small_folder(folder / "small"),
        lambda folder: array_file(folder / "x.npy"),
        lambda folder: array_file(folder / "x.npz"),
        lambda folder: array_file(folder / "x.pt"),
        lambda folder: stl10_folder(folder / "stl10_binary"),
    ],
    ids=["digits", "small folder", "npy", "npz", "pt", "stl10"],
)
def test_who_asks_for_a_cache_of_what_needs_none_is_told_so_once(source, memory, tmp_path, caplog):
    name = source(tmp_path)
    config = DataConfig(source=name, cache=tmp_path / "cache", memory=memory)
    with caplog.at_level(logging.WARNING, "moco"):
        train = load_data(config).train
    told = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    if name.endswith("small") and memory < 1:  # too large to be held: read from the cache
        assert isinstance(train, FileImages) and train.cache is not None and not told
        return
    held = "held in memory" if isinstance(train, ArrayImages) else "rows of an array"
    assert told == [
        f"data.cache {tmp_path / 'cache'} is not used: the images are {held}, so there is nothing to decode"
    ]
    assert held == ("rows of an array" if memory < 1 and name.endswith(("npy", "binary")) else "held in memory")
    assert not (tmp_path / "cache").exists()


def test_of_a_cache_that_is_used_or_was_not_asked_for_nothing_is_said(tmp_path, caplog):
    load(photos(tmp_path / "in"), tmp_path / "cache")
    load_data(DataConfig(source="digits"))
    assert "not used" not in caplog.text


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_room_is_said_before_anything_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(moco.data.cache.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 10_000))
    monkeypatch.setattr(moco.data.cache, "decode_shrunk", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="free; expected about 0.0 for 6 images.*lower --data.cache_side 64"):
        load(photos(tmp_path / "in"), tmp_path / "cache")


def test_a_disk_that_fills_up_or_a_folder_that_cannot_be_is_one_line(tmp_path, monkeypatch):
    folder = photos(tmp_path / "in")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be written.*another folder"):
        load(folder, tmp_path / "file" / "cache")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(moco.data.cache, "_sync", full)
    with pytest.raises(ValueError, match="No space left on device.*goes on from there") as caught:
        load(folder, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_views_of_a_cache_are_those_of_the_files_at_that_size(tmp_path):
    """The same boxes relative to the image; what differs is what shrinking first takes away."""
    files, cached = load(photos(tmp_path / "in"), None), load(tmp_path / "in", tmp_path / "cache")
    views, cpu = TwoViews(VIEWS["v2"](), 24), torch.device("cpu")
    for workers in (0, 1):
        pairs = (
            next(iter(Loader(each, batch_size=6, seed=0, device=cpu, workers=workers, crop=views).epoch(0)))
            for each in (files, cached)
        )
        (direct, ids), (shrunk, same) = pairs
        assert torch.equal(ids, same) and shrunk.shape == direct.shape == (6, 2, 3, 24, 24)
        difference = (direct.int() - shrunk.int()).abs().float().mean(dim=(1, 2, 3, 4))
        assert difference.max() < 12 and difference[ids == 0] == 0
        assert np.allclose(direct.float().mean(dim=(1, 2, 3, 4)), shrunk.float().mean(dim=(1, 2, 3, 4)), atol=2.5)
