"""Rows that were once safe stay, and none is there twice, whenever the process is killed."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from doubles import encoder, noise, picture
from moco.embeddings import shared_writing
from moco.embeddings.embed import embed_to
from moco.embeddings.table import load, read_meta
from moco.method.backbones import build_backbone
from moco.method.encoder import ImageEncoder
from moco.parallel import collectives
from moco.storage.encoder_files import save_encoder

COUNT, BAD = 150, (0, 40, 149)
SETTINGS: dict[str, Any] = {"batch_size": 4, "precision": "fp32"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some with a good header and cut-off pixels, some that are no images at all."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(COUNT):
        path = folder / ("a" if number < 70 else "b") / f"{number:03}.png"
        picture(path, number, (13 + number % 5, 16))
        if number in BAD:
            path.write_bytes(path.read_bytes()[: 120 if number else 5])
    return folder


def run_folder(folder: Path) -> Path:
    """A folder that `load_encoder` takes."""
    about: dict[str, Any] = {"channels": 3, "mean": (0.5,) * 3, "std": (0.25,) * 3, "input_size": 12}
    network = build_backbone("resnet-tiny", stem="small")
    folder.mkdir()
    save_encoder(folder, ImageEncoder(network, name="resnet-tiny", stem="small", **about))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


KILLED = """
import os, random, sys, time
import moco.storage.encoder_files, moco.embeddings.embed
import moco.parallel.fabric
embedding, table = sys.modules["moco.embeddings.embed"], sys.modules["moco.embeddings.writing"]
table.SYNC_EVERY = 0.03
out, both, source, images = sys.argv[1:]
moco.storage.encoder_files.load_encoder(source)  # once, so that children start at once
rows = lambda: os.path.exists(names := os.path.join(out, "images.csv")) and os.path.getsize(names)
kills, codes = 0, []
while 0 not in codes:
    before, child = rows(), os.fork()
    if child == 0:
        embedding.embed_to(out, source, images, batch_size=4, precision="fp32")
        os._exit(0)
    if len(codes) < 5:  # from the sixth on it may come to its end
        until = time.monotonic() + 10
        while rows() == before and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        os.kill(child, 9)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    kills += codes[-1] == -9
children = []
for rank in range(2):  # the two of them at once
    children.append(os.fork())
    if children[-1] == 0:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        told = []
        embedding.embed_to(both, source, images, batch_size=4, precision="fp32", on_progress=lambda *n: told.append(n))
        os._exit(len(told))
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(kills, *codes)
"""


@pytest.fixture(scope="module")
def written(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """One table, `whole`, `killed` at random places, and of `both` processes at once; and the numbers they print."""
    home = tmp_path_factory.mktemp("written")
    source = run_folder(home / "run")
    embed_to(home / "whole", source, photos, batch_size=4, precision="fp32", accelerator="cpu")
    command = [sys.executable, "-c", KILLED, home / "killed", home / "both", source, photos]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return home, [int(number) for number in done.stdout.split()]


def test_killed_at_random_places_the_table_becomes_that_of_an_undisturbed_run(
    photos: Path, written: tuple[Path, list[int]]
) -> None:
    home, (kills, *_) = written
    assert kills >= 1
    assert files(home / "killed") == files(home / "whole")
    emb = load(home / "killed")
    assert emb.paths == tuple(str(path) for i, path in enumerate(sorted(photos.rglob("*.png"))) if i not in BAD)


def test_two_processes_at_once_write_the_table_of_one(written: tuple[Path, list[int]]) -> None:
    home, (_, *batches) = written
    assert batches == [19, 19]  # each did its half of the batches, and ended well
    assert files(home / "both") == files(home / "whole")


class Stop(Exception):
    pass


def stop_after(images: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= images:
            raise Stop

    return progress


@pytest.mark.parametrize("after", [4, 44, 148])
def test_what_was_written_after_the_last_safe_place_is_written_anew(after: int, photos: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "emb", SETTINGS
    with pytest.raises(Stop):
        embed_to(out, encoder(), photos, **settings, on_progress=stop_after(after))
    assert not read_meta(out).complete and read_meta(out).done >= after - 1
    for name in ("vectors.npy", "images.csv", "unreadable.csv"):
        with (out / name).open("ab") as file:
            file.write(b"a torn row")
    (out / ".meta.json.abc.partial").write_text("{")
    told = []
    embed_to(out, encoder(), photos, **settings, on_progress=lambda done, total: told.append(done))
    assert told[0] <= after + 4 and told[-1] == COUNT - 1  # one is no image by its header, and never asked for
    embed_to(tmp_path / "whole", encoder(), photos, **settings)
    assert files(out) == files(tmp_path / "whole")


def test_a_finished_table_is_left_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "emb"
    embed_to(out, encoder(), noise(5))
    before, when = files(out), (out / "vectors.npy").stat().st_mtime_ns
    again = embed_to(out, encoder(), noise(5), on_progress=stop_after(0))
    assert files(out) == before and (out / "vectors.npy").stat().st_mtime_ns == when and len(again) == 5


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "other, message",
    [
        ("encoder", "was begun with another encoder; give the same again, or another --out"),
        ("images", "was begun with other images .names, order, labels or pixels.; give the same again"),
        ("batch_size", "was begun with batch_size 4, now it is 5; give the same again"),
        ("precision", "was begun with precision fp32, now it is bf16"),
    ],
)
def test_another_encoder_images_or_settings_are_refused(
    finished: bool, other: str, message: str, tmp_path: Path
) -> None:
    out, network, images = tmp_path / "emb", encoder(), noise(12)
    settings: dict[str, Any] = {"batch_size": 4, "precision": "fp32"}
    if finished:
        embed_to(out, network, images, **settings)
    else:
        with pytest.raises(Stop):
            embed_to(out, network, images, **settings, on_progress=stop_after(4))
    if other == "encoder":
        next(network.parameters()).data[0, 0, 0, 0] += 1e-3
    elif other == "images":
        images[3, 0, 0, 0] += 1
    else:
        settings |= {other: 5 if other == "batch_size" else "bf16"}
    before = files(out)
    with pytest.raises(ValueError, match=message) as error:
        embed_to(out, network, images, **settings)
    assert "\n" not in str(error.value) and files(out) == before


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="exists and holds no embeddings; give another --out"):
        embed_to(tmp_path, encoder(), noise(3))
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_a_file_that_lost_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        embed_to(tmp_path / "emb", encoder(), noise(12), batch_size=4, on_progress=stop_after(8))
    (tmp_path / "emb" / "vectors.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="vectors.npy is shorter than meta.json says; delete .*emb and embed again"):
        embed_to(tmp_path / "emb", encoder(), noise(12), batch_size=4)


def test_two_processes_do_not_write_one_table(tmp_path: Path) -> None:
    def second(done: int, total: int) -> None:
        with pytest.raises(ValueError, match="is being written by another process; wait for it"):
            embed_to(tmp_path / "emb", encoder(), noise(6), batch_size=2)

    assert len(embed_to(tmp_path / "emb", encoder(), noise(6), batch_size=2, on_progress=second)) == 6


def test_unreadable_files_get_no_row_and_are_listed_with_reasons(photos: Path, tmp_path: Path) -> None:
    emb = embed_to(tmp_path / "emb", encoder(), photos, batch_size=7, precision="fp32")
    listed = list(csv.DictReader((tmp_path / "emb" / "unreadable.csv").read_text().splitlines()))
    assert [row["path"] for row in listed] == [str(photos / ("a" if i < 70 else "b") / f"{i:03}.png") for i in BAD]
    assert all(row["reason"] for row in listed) and len(emb) == COUNT - len(BAD)
    assert read_meta(tmp_path / "emb").unreadable == len(BAD)
    number = emb.paths.index(str(photos / "b" / "100.png"))
    alone = moco_features(photos / "b" / "100.png")
    np.testing.assert_allclose(emb.vectors[number], alone, rtol=1e-4, atol=1e-6)
    assert emb.labels is not None and emb.labels.tolist() == [0] * 68 + [1] * 79


def moco_features(path: Path) -> np.ndarray:
    network = encoder()
    with Image.open(path) as image:
        return network(network.preprocess([image])).detach().numpy()[0]


def test_a_folder_of_nothing_but_cut_off_images_says_so(tmp_path: Path) -> None:
    for number in range(3):
        path = tmp_path / "photos" / f"{number}.png"
        picture(path)
        path.write_bytes(path.read_bytes()[:120])
    with pytest.raises(ValueError, match="has no rows: none of the images could be read; unreadable.csv"):
        embed_to(tmp_path / "emb", encoder(), tmp_path / "photos")


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_write_the_table_of_one(
    world: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"batch_size": 4, "precision": "fp32"}
    embed_to(tmp_path / "one", encoder(), photos, **settings)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    out = tmp_path / "several"

    class Waited(Exception):
        pass

    def waits(seconds: float) -> None:
        raise Waited

    monkeypatch.setattr(shared_writing.time, "sleep", waits)
    for rank in reversed(range(1, world)):  # they wait for the first, which is yet to come
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(Waited):
            embed_to(out, encoder(), photos, **settings)
    with pytest.raises(FileNotFoundError, match="only what several processes have begun to write"):
        load(out)
    monkeypatch.setenv("RANK", "0")
    embed_to(out, encoder(), photos, **settings)
    assert files(out) == files(tmp_path / "one")
    monkeypatch.setenv("RANK", "1")
    assert len(embed_to(out, encoder(), photos, **settings)) == COUNT - len(BAD)


def test_a_process_that_stopped_writing_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared_writing, "LOG_AFTER", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen, out, sleep = list[float](), tmp_path / "emb", time.sleep

    def waits(seconds: float) -> None:
        seen.append(seconds)
        sleep(0.05)  # longer than a tick of the file system's clock
        monkeypatch.setattr(shared_writing, "PATIENCE", -1.0)  # from now on it looks each time
        if len(seen) < 4:  # the other still writes
            (out / "share-00001-of-00002").mkdir(exist_ok=True)
            (out / "share-00001-of-00002" / str(len(seen))).touch()

    monkeypatch.setattr(shared_writing.time, "sleep", waits)
    with caplog.at_level("INFO", logger="moco"), pytest.raises(RuntimeError, match="^no process has written to .*emb"):
        embed_to(out, encoder(), noise(6), batch_size=2)
    assert len(seen) == 4
    assert "waiting for share-00001-of-00002, which other processes write" in caplog.text
    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    monkeypatch.setattr(collectives, "rank", lambda: 2)
    assert shared_writing.rank_and_world_size() == (2, 3)  # in a script, after training


def test_folders_that_are_no_shares_of_this_table_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "emb"
    embed_to(out, encoder(), noise(6), batch_size=2)
    for name in ("share-mine-of-cats", "share-00000-of-00002", "share-1-of-2"):
        (out / name).mkdir()
        (out / name / "holiday.jpg").write_text("precious")
    embed_to(out / "share-00001-of-00002", encoder(), noise(4))  # another table
    (out / ".download.partial").write_text("precious")
    left = out / "share-00002-of-00003"  # of this table, left over
    embed_to(left, encoder(), noise(6), batch_size=2)
    (left / ".meta.json.abc.partial").write_text("{")
    assert len(embed_to(out, encoder(), noise(6), batch_size=2)) == 6
    assert not left.exists() and (out / ".download.partial").exists()
    for name in ("share-mine-of-cats", "share-00000-of-00002", "share-1-of-2"):
        assert os.listdir(out / name) == ["holiday.jpg"]
    assert len(load(out / "share-00001-of-00002")) == 4
    monkeypatch.setenv("WORLD_SIZE", "2")  # its first share has no place
    other = tmp_path / "other"
    (other / "share-00000-of-00002").mkdir(parents=True)
    (other / "share-00000-of-00002" / "holiday.jpg").write_text("precious")
    with pytest.raises(FileExistsError, match="share-00000-of-00002 exists and holds no embeddings"):
        embed_to(other, encoder(), noise(6), batch_size=2)


def test_another_number_of_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(Stop):
        embed_to(tmp_path / "several", encoder(), noise(12), batch_size=2, on_progress=stop_after(1))
    for world in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(ValueError, match=f"was begun by 3 processes, now there are {world}; use as many again"):
            embed_to(tmp_path / "several", encoder(), noise(12), batch_size=2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(Stop):
        embed_to(tmp_path / "one", encoder(), noise(12), batch_size=2, on_progress=stop_after(1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="was begun by one process, now there are 2"):
        embed_to(tmp_path / "one", encoder(), noise(12), batch_size=2)


FLAT = """
import sys, threading, time
import torch
import moco.embeddings.embed
from moco.data import ArrayImages
from moco.method.encoder import ImageEncoder
import numpy as np
embedding = sys.modules["moco.embeddings.embed"]

class Wide(torch.nn.Module):
    num_features = 3072
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
    def forward(self, images):
        return images.flatten(1) * self.scale

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

encoder = ImageEncoder(Wide(), name="own", stem="small", channels=3, mean=(0.5,) * 3, std=(0.2,) * 3, input_size=32)
done, most = False, 0.0
def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.002)

def peak(count, out):
    global most, done
    images = torch.from_numpy(np.memmap(out + ".pixels", np.uint8, "w+", shape=(count, 3, 32, 32)))
    done, most = False, 0.0
    watcher = threading.Thread(target=watch)
    watcher.start()
    embedding.embed_to(out, encoder, ArrayImages(images, None, None, tuple(map(str, range(count)))), precision="fp32")
    done = True
    watcher.join()
    return most

peak(500, sys.argv[1] + "/first")  # whatever is loaded once
small, large = peak(1000, sys.argv[1] + "/small"), peak(8000, sys.argv[1] + "/large")
print(large / small)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_in_the_number_of_images(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FLAT, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.2
    assert (tmp_path / "large" / "vectors.npy").stat().st_size > 90e6  # which would show


def test_the_state_of_an_unfinished_table_is_in_its_meta(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        embed_to(tmp_path / "emb", encoder(), noise(12), batch_size=4, on_progress=stop_after(8))
    meta = json.loads((tmp_path / "emb" / "meta.json").read_text())
    assert (meta["complete"], meta["done"], meta["rows"], meta["stop"]) == (False, 8, 8, 12)
    assert meta["written"]["vectors.npy"] == (tmp_path / "emb" / "vectors.npy").stat().st_size
