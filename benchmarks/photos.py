"""How many photos a second become two views of 224 pixels, beside torchvision's standard pipeline for MoCo v2.

    uv run python benchmarks/photos.py .data/photos/train

Three things are timed in turn, on one thread, so that a change in the machine's speed meets all: the standard (Pillow
images through torchvision's transforms, as the official code has them), our whole pipeline (`Loader`, then
`TwoViews.finish`), and of it what reading processes do (`Loader` alone). Twice: of the photos as they are, and enlarged
to 3 megapixels, as a camera makes them. It is the processor's time that counts. The whole pipeline allocates memory as
`pretrain` does on a CPU (`keep_freed_memory`). The other two have a process of their own, that does not: the standard,
because it would be faster, and the host part, because it is what processes do that read beside a GPU.
"""

import argparse
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter
from torchvision import transforms

import rows
from moco.config import ViewsConfig
from moco.data import FileImages, Loader
from moco.parallel.device import keep_freed_memory
from moco.views.specs import IMAGENET, view_specs
from moco.views.two_views import TwoViews

SIZE, COLLATED = 224, 128
CAMERA = 3_000_000
"""Pixels of the enlarged photos."""


class GaussianBlur:
    """As the official code has it (github.com/facebookresearch/moco, moco/loader.py)."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


STANDARD = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([GaussianBlur()], p=0.5),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(*IMAGENET),
    ]
)


def standard(paths: list[str]) -> None:
    for start in range(0, len(paths), COLLATED):
        pairs = []
        for path in paths[start : start + COLLATED]:
            with Image.open(path) as file:
                image = file.convert("RGB")
            pairs.append((STANDARD(image), STANDARD(image)))
        for views in zip(*pairs, strict=True):
            torch.stack(views)


def pipeline(paths: list[str], batch: int) -> tuple[TwoViews, Loader]:
    views = TwoViews(view_specs(ViewsConfig(recipe="v2", size=SIZE)), SIZE)
    images = FileImages(tuple(paths), None, None)
    cpu, batch = torch.device("cpu"), min(batch, len(paths))
    return views, Loader(images, batch_size=batch, seed=0, device=cpu, workers=0, crop=views)


def host(what: tuple[list[str], int, int]) -> None:
    paths, batch, epoch = what
    for _ in pipeline(paths, batch)[1].epoch(epoch):
        pass


def enlarge(paths: list[str], folder: Path) -> list[str]:
    enlarged = []
    for number, path in enumerate(paths):
        with Image.open(path) as file:
            image = file.convert("RGB")
        scale = (CAMERA / (image.width * image.height)) ** 0.5
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        enlarged.append(str(folder / f"{number}.jpg"))
        image.save(enlarged[-1], quality=90)
    return enlarged


def seconds(function: Callable[[Any], None], argument: Any) -> float:
    start = time.process_time()
    function(argument)
    return time.process_time() - start


def measure(name: str, paths: list[str], batch: int, rounds: int, other: Pool) -> dict[str, object]:
    """Images a second and ratios, medians over rounds after one of warm-up."""
    views, loader = pipeline(paths, batch)

    def whole(epoch: int) -> None:
        for crops, ids in loader.epoch(epoch):
            views.finish(crops, ids, epoch=epoch)

    found = []
    for number in range(rounds + 1):
        theirs, ours = other.apply(seconds, (standard, paths)), seconds(whole, number)
        found.append([theirs, ours, other.apply(seconds, (host, (paths, batch, number)))])
    theirs, ours, read = zip(*found[1:], strict=True)
    row = {
        f"{name}_standard_per_second": round(len(paths) / statistics.median(theirs), 1),
        f"{name}_whole_per_second": round(len(paths) / statistics.median(ours), 1),
        f"{name}_host_per_second": round(len(paths) / statistics.median(read), 1),
        f"{name}_whole_ratio": round(statistics.median(a / b for a, b in zip(theirs, ours, strict=True)), 2),
        f"{name}_host_ratio": round(statistics.median(a / b for a, b in zip(theirs, read, strict=True)), 2),
    }
    for key, value in row.items():
        print(f"  {key:<28} {value}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("photos", type=Path, help="folder of JPEGs, at any depth")
    parser.add_argument("--images", type=int, default=128, help="evenly from all; every fourth is also enlarged")
    parser.add_argument("--batch", type=int, default=128, help="photos that become views at once")
    parser.add_argument("--rounds", type=int, default=7, help="counted ones, after one of warm-up")
    parser.add_argument("--record", action="store_true", help="add the row to results/photos.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    found = sorted(map(str, options.photos.rglob("*.jpg")))
    paths = [found[i * len(found) // options.images] for i in range(options.images)]
    print(f"{rows.where()['processor']}, one thread, {len(paths)} photos, two views of {SIZE} pixels each")
    row = rows.where() | {"images": len(paths), "batch": min(options.batch, len(paths)), "rounds": options.rounds}
    started = multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,))
    with started as other, tempfile.TemporaryDirectory() as folder:
        row |= measure("photo", paths, options.batch, options.rounds, other)
        row |= measure("camera", enlarge(paths[::4], Path(folder)), options.batch, options.rounds, other)
    if options.record:
        rows.append("photos", row)


if __name__ == "__main__":
    main()
