"""Does reading keep up with training? A step alone, views alone, and both at once, in images a second.

    uv run python benchmarks/overlap.py --data photos/train --batch 256 --record

Trains MoCo v2 on full-size photos (ResNet-50, 224 pixels, bf16 where the device has it), on a GPU where there is one.
`views` is all that comes before the network: files are decoded and cropped by reading processes, copied, and coloured
and blurred on the device. `step` trains on one batch of ready views again and again. `both` is training as it is. The
share that the device waits for files and the memory that an image takes come with it. Rounds of all three are taken in
turn. The row goes to results/overlap.csv.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import rows
from moco.config import parse_config
from moco.data import load_data
from moco.data.loader import num_workers
from moco.parallel.fabric import build_fabric, resolve
from moco.training.build import prepare
from moco.training.step import Training


def training_of(options: argparse.Namespace) -> Training:
    config = parse_config(
        {
            "batch_size": options.batch,
            # However few: files are read.
            "data": {"source": str(options.data), "memory": 1e-9, "workers": options.workers},
            "views": {"recipe": "v2", "size": options.size},
            "model": {"backbone": options.backbone, "queue_size": 65536, "mask_own": False},
            "engine": {"compile": options.compile, "devices": 1},
        }
    )
    config = config.model_copy(update={"engine": resolve(config.engine)})
    fabric = build_fabric(config.engine, (), Path(tempfile.mkdtemp()))
    return prepare(config, load_data(config.data), fabric)


def endless(training: Training) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    for epoch in itertools.count():
        for images, ids in training.loader.epoch(epoch):
            yield epoch, images, ids


class Ready(NamedTuple):
    """In place of `TwoViews`: two views that are there."""

    pair: tuple[torch.Tensor, torch.Tensor]

    def finish(self, images: torch.Tensor, ids: torch.Tensor, *, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pair


def timed(work: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds of a step, the device's work included."""
    start = time.perf_counter()
    for _ in range(steps):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--rounds", type=int, default=5, help="counted ones, after one of warm-up")
    parser.add_argument("--workers", type=int, default=num_workers(1), help="reading processes")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--record", action="store_true", help="add the row to results/overlap.csv")
    options = parser.parse_args()
    training = training_of(options)
    device, batches = training.fabric.device, endless(training)
    epoch, images, ids = next(batches)
    images, views_of = images.to(device), training.views
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def views() -> None:
        number, pictures, which = next(batches)
        views_of.finish(pictures.to(device, non_blocking=True), which, epoch=number)

    ready = Ready(views_of.finish(images, ids, epoch=epoch))

    def step() -> None:
        training.views = ready  # ty: ignore[invalid-assignment]
        training.step(images, ids, epoch)

    def both() -> None:
        training.views = views_of
        number, pictures, which = next(batches)
        training.step(pictures, which, number)

    found, waits = {"views": [], "step": [], "both": []}, []
    for number in range(options.rounds + 1):
        for name, work in (("views", views), ("step", step), ("both", both)):
            training.loader.wait_seconds  # noqa: B018 - reading it sets it back
            seconds = timed(work, options.steps, device)
            if number:
                found[name].append(options.batch / seconds)
                waits += [training.loader.wait_seconds / (seconds * options.steps)] if name == "both" else []
    most = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    row = rows.where() | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "backbone": options.backbone,
        "size": options.size,
        "batch": options.batch,
        "precision": training.config.engine.precision,
        "compiled": options.compile,
        "workers": options.workers,
        **{f"{name}_images_per_second": round(statistics.median(each), 1) for name, each in found.items()},
        "wait_percent": round(100 * statistics.median(waits), 1),
        "mib_per_image": round(most / options.batch / 2**20, 1) if most else "",
    }
    print(", ".join(f"{name} {value}" for name, value in row.items()))
    if options.record:
        rows.append("overlap", row)


if __name__ == "__main__":
    main()
