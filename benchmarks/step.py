"""Where a training step's time goes, and how many images a second it makes beside lightly's building blocks.

    uv run --with lightly==1.6.0 python benchmarks/step.py --threads 2

Both train MoCo v2 with a ResNet-18 with small-image stem on CIFAR-sized images, batch 256, K 4,096, SGD: ours through
`moco.pretrain`'s own `Training.step`, lightly's as the textbook loop of its documentation: a DataLoader with its
`MoCoV2Transform`, `NTXentLoss` with memory bank, `update_momentum`. Steps of both are timed in turn, so that a change
in the machine's speed meets both, each in a process of its own: how ours allocates memory (`keep_freed_memory`) would
make the other faster, too. Without lightly only ours is timed.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn

import rows
from moco.config import parse_config
from moco.data import ArrayImages, Splits
from moco.parallel.fabric import build_fabric, resolve
from moco.training.build import prepare
from moco.training.metrics import MetricsWriter
from moco.training.step import Training

BATCH, QUEUE, DIM, NUM_IMAGES = 256, 4096, 128, 2048
PARTS = ("query forward", "key forward", "backward", "views", "optimizer", "key update", "loss and the rest")


def images() -> np.ndarray:
    """CIFAR-sized pictures with some structure: smooth random fields."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (NUM_IMAGES, 8, 8, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(each).resize((32, 32), Image.Resampling.BICUBIC)) for each in coarse])


def ours(pictures: np.ndarray, threads: int, precision: str) -> Training:
    pixels = torch.from_numpy(pictures).movedim(3, 1).contiguous()
    config = parse_config(
        {
            "batch_size": BATCH,
            "epochs": 1000,
            "views": {"recipe": "cifar", "size": 32},
            "model": {"backbone": "resnet18", "stem": "small", "queue_size": QUEUE, "dim": DIM, "mask_own": False},
            "engine": {"threads": threads, "precision": precision, "accelerator": "cpu"},
        }
    )
    config = config.model_copy(update={"engine": resolve(config.engine)})
    fabric = build_fabric(config.engine, (), Path(tempfile.mkdtemp()))
    train = ArrayImages(pixels, None, None, tuple(map(str, range(len(pixels)))))
    return prepare(config, Splits(train, None), fabric)


def endless(training: Training) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    for epoch in itertools.count():
        for batch, ids in training.loader.epoch(epoch):
            yield epoch, batch, ids


class Timer:
    """Seconds spent inside calls, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, name: str, function: Callable) -> Callable:
        def timed(*arguments, **named):
            start = time.perf_counter()
            result = function(*arguments, **named)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return timed


def instrument(training: Training) -> Timer:
    timer, core = Timer(), training.core
    core.query_encoder.forward = timer.wrap("query forward", core.query_encoder.forward)
    core.key_encoder.forward = timer.wrap("key forward", core.key_encoder.forward)
    training.fabric.backward = timer.wrap("backward", training.fabric.backward)
    training.views = timer.wrap("views", training.views)  # ty: ignore[invalid-assignment]
    training.optimizer.step = timer.wrap("optimizer", training.optimizer.step)
    core.update = timer.wrap("key update", core.update)
    return timer


def lightly_step(pictures: np.ndarray, threads: int) -> Callable[[], float]:
    """The textbook loop of lightly's documentation; each call is a step and gives its seconds.

    Its images are read in this process, so that no worker of it runs while ours is timed; that time is then divided by
    the number of threads, as if as many workers had shared it perfectly.
    """
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms import MoCoV2Transform

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(pictures)

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return transform(Image.fromarray(pictures[index])), 0

    network = torchvision.models.resnet18()
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool, network.fc = nn.Identity(), nn.Identity()
    head = MoCoProjectionHead(512, 512, DIM)
    key_network, key_head = copy.deepcopy(network), copy.deepcopy(head)
    deactivate_requires_grad(key_network)
    deactivate_requires_grad(key_head)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(QUEUE, DIM))
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=0.03, momentum=0.9, weight_decay=5e-4)
    transform = MoCoV2Transform(input_size=32, gaussian_blur=0.0, min_scale=0.08)
    loader = torch.utils.data.DataLoader(Pictures(), batch_size=BATCH, shuffle=True, drop_last=True, num_workers=0)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> float:
        start = time.perf_counter()
        (view1, view2), *_ = next(batches)
        read = time.perf_counter()
        update_momentum(network, key_network, m=0.99)
        update_momentum(head, key_head, m=0.99)
        query = head(network(view1))
        with torch.no_grad():
            key = key_head(key_network(view2))
        loss = criterion(query, key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return (read - start) / threads + time.perf_counter() - read

    return step


PEER: list[Callable[[], float]] = []


def start_peer(pictures: np.ndarray, threads: int) -> None:
    torch.set_num_threads(threads)
    if importlib.util.find_spec("lightly"):
        PEER.append(lightly_step(pictures, threads))


def peer_step() -> float:
    return PEER[0]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each, after one of warm-up")
    parser.add_argument("--precision", default="auto", help="of ours; lightly's loop runs as documented, in fp32")
    parser.add_argument("--record", action="store_true", help="add the row to results/step.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pictures = images()
    training = ours(pictures, options.threads, options.precision)
    timer, batches = instrument(training), endless(training)
    started = multiprocessing.get_context("spawn").Pool(1, start_peer, (pictures, options.threads))
    peer = importlib.util.find_spec("lightly") is not None

    def our_step() -> None:
        epoch, batch, ids = next(batches)
        training.step(batch, ids, epoch)

    training.clock.start()
    ours_seconds, peer_seconds, logging_seconds = [], [], []
    with started as other, tempfile.TemporaryDirectory() as folder:
        metrics = MetricsWriter(Path(folder) / "metrics.csv", ("step", "loss"), keep_until=0)
        for number in range(options.steps + 1):
            if number == 1:
                timer.seconds.clear()
            start = time.perf_counter()
            our_step()
            middle = time.perf_counter()
            metrics.write({"step": number, "loss": training.meter.read()["loss"]})
            logged = time.perf_counter()
            theirs = other.apply(peer_step) if peer else 0.0
            if number:
                ours_seconds.append(middle - start)
                logging_seconds.append(logged - middle)
                peer_seconds.append(theirs)
        metrics.close()

    total = sum(ours_seconds) + sum(logging_seconds)
    rest = sum(ours_seconds) - sum(timer.seconds.values())
    parts = timer.seconds | {"loss and the rest": rest, "logging": sum(logging_seconds)}
    outside = 1 - sum(parts[name] for name in ("query forward", "key forward", "backward")) / total
    step = statistics.median(ours_seconds)
    print(f"{rows.where()['processor']}, {options.threads} threads, batch {BATCH}, {training.config.engine.precision}")
    for name, seconds in parts.items():
        print(f"  {name:<18} {1000 * seconds / options.steps:8.1f} ms  {100 * seconds / total:5.1f} %")
    print(f"  outside encoder forward and backward: {100 * outside:.1f} %")
    print(f"ours: {BATCH / step:.1f} images/s")
    row = rows.where() | {
        "threads": options.threads,
        "lightly": importlib.metadata.version("lightly") if peer else "",
        "batch": BATCH,
        "precision": training.config.engine.precision,
        "steps": options.steps,
        "images_per_second": round(BATCH / step, 1),
        "outside_encoder_percent": round(100 * outside, 1),
    }
    if peer:
        theirs = statistics.median(peer_seconds)
        ratio = statistics.median(b / a for a, b in zip(ours_seconds, peer_seconds, strict=True))
        print(f"lightly: {BATCH / theirs:.1f} images/s; ours is {ratio:.2f} times as fast (median of pairs)")
        row |= {"lightly_images_per_second": round(BATCH / theirs, 1), "ratio": round(ratio, 2)}
    if options.record:
        rows.append("step", row)


if __name__ == "__main__":
    main()
