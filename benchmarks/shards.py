"""Measures tar shards against the same files in a folder, and our index of a tar against Python's tarfile.

Adds a row to results/shards.csv. Rounds of all kinds take turns; each figure is the median, in
microseconds for a member or image: of processor time, but for epochs of the `Loader`, which reads by other processes
and here over many small tars, time on the clock. The files are in memory already: it is not the disk that is measured.

uv run python benchmarks/shards.py --images photos/train --rounds 5
"""

import argparse
import os
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import rows
from moco.config import DataConfig, ViewsConfig
from moco.data import FileImages, Loader, load_data
from moco.data.packing.pack import pack
from moco.data.places.open import read_image
from moco.data.places.tar_headers import scan
from moco.data.places.tar_index import ensure
from moco.data.sources.folder import load_folder
from moco.views.specs import view_specs
from moco.views.two_views import TwoViews

STREAMED = 1e-9
TARS = 200
"""Small ones, about so many, for the epochs."""
SIDE = 64
"""Of the views in an epoch, pixels: small, so that reading counts."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--decoded", type=int, default=300, help="images decoded in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files = load_folder(options.images, DataConfig(memory=STREAMED)).train
    assert isinstance(files, FileImages)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        packed = pack(files, Path(folder) / "out")
        packing = time.perf_counter() - began
        shards = load_data(DataConfig(source=str(packed.folder), memory=STREAMED)).train
        assert isinstance(shards, FileImages) and len(shards) == len(files)
        order = random.Random(0).sample(range(len(files)), len(files))
        some = order[: options.decoded]
        # The largest, and every name in it.
        tar = max(packed.folder.glob("*.tar"), key=lambda path: path.stat().st_size)
        names = [name.encode() for name in ensure(str(tar), Path(folder)).content().names]
        many = pack(files, Path(folder) / "many", shard_size=packed.size / 2**20 / TARS)
        small = load_data(DataConfig(source=str(many.folder), memory=STREAMED)).train
        assert isinstance(small, FileImages) and many.shards > 128, many.shards
        kinds: dict[str, tuple[Callable[[], object], int]] = {
            "scan_us": (lambda: headers(tar), members(tar)),
            "tarfile_us": (lambda: members(tar), members(tar)),
            "index_us": (lambda: anew(tar, Path(folder)), members(tar)),
            "find_us": (lambda: find(tar, names), len(names)),
            "read_shard_us": (lambda: [read_image(shards.paths[i]) for i in order], len(order)),
            "read_folder_us": (lambda: [read_image(files.paths[i]) for i in order], len(order)),
            "decode_shard_us": (lambda: [shards.decode(i) for i in some], len(some)),
            "decode_folder_us": (lambda: [files.decode(i) for i in some], len(some)),
        }
        epochs: dict[str, FileImages] = {"epoch_shard_us": small, "epoch_folder_us": files}
        seconds: dict[str, list[float]] = {kind: [] for kind in (*kinds, *epochs)}
        for number in range(options.rounds):
            for kind, (work, count) in kinds.items():
                began = time.process_time()
                work()
                seconds[kind].append((time.process_time() - began) / count)
            for kind, images in epochs.items():
                began = time.perf_counter()
                count = epoch(images, number, batch_size=options.batch_size, workers=options.workers)
                seconds[kind].append((time.perf_counter() - began) / count)
    row = rows.where() | {"images": len(files), "mean_bytes": packed.size // len(files), "rounds": options.rounds}
    row |= {"packed_per_second": round(len(files) / packing)}
    row |= {kind: round(1e6 * statistics.median(each), 2) for kind, each in seconds.items()}
    row |= {"tars": many.shards, "batch_size": options.batch_size, "workers": options.workers}
    rows.append("shards", row)
    print(", ".join(f"{name} {value}" for name, value in row.items()))


def epoch(images: FileImages, number: int, *, batch_size: int, workers: int) -> int:
    """Reads an epoch as training does; returns the number of its images."""
    views = TwoViews(view_specs(ViewsConfig(recipe="v2", size=SIDE)), SIDE)
    cpu = torch.device("cpu")
    loader = Loader(images, batch_size=batch_size, seed=0, device=cpu, workers=workers, crop=views)
    return sum(len(ids) for _, ids in loader.epoch(number))


def headers(tar: Path) -> int:
    file = os.open(tar, os.O_RDONLY)
    try:
        return len(scan(file, str(tar)).members)
    finally:
        os.close(file)


def members(tar: Path) -> int:
    with tarfile.open(tar, "r:") as file:
        return sum(member.isfile() for member in file)


def anew(tar: Path, cache: Path) -> None:
    Path(f"{tar}.index").unlink()
    ensure(str(tar), cache)


def find(tar: Path, names: list[bytes]) -> None:
    """Where each is, and its first 512 bytes: what a random read costs beside the image's own bytes."""
    index, file = ensure(str(tar), tar.parent), os.open(tar, os.O_RDONLY)
    for name in names:
        place = index.find(name)
        assert place is not None
        os.pread(file, 512, place[0])
    os.close(file)


if __name__ == "__main__":
    main()
