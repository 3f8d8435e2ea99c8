"""Measures `moco embed` against the bare encoder's forward, and adds rows to results/embed.csv.

From decoded arrays at least 90 % of the bare forward's images/s are due, from JPEG files 70 %. The three are measured
in turn, so that a busy machine is busy for all.

uv run python benchmarks/embed.py --backbone resnet50 --size 224 --images 256 --rounds 3
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

import rows
from moco.data import ArrayImages
from moco.embeddings.embed import embed_to
from moco.embeddings.features import features
from moco.method.backbones import build_backbone
from moco.method.encoder import ImageEncoder
from moco.parallel.device import choose_accelerator, choose_precision


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--stem", default="imagenet")
    parser.add_argument("--size", type=int, default=224, help="that the encoder takes")
    parser.add_argument("--picture", type=int, nargs=2, default=[500, 375], help="width and height of the JPEG files")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = choose_accelerator("auto")
    precision = choose_precision(device) if options.precision == "auto" else options.precision
    network = build_backbone(options.backbone, stem=options.stem)
    encoder = ImageEncoder(
        network, name=options.backbone, stem=options.stem, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
        input_size=options.size,
    ).to(device).eval()  # fmt: skip
    arrays = torch.randint(0, 256, (options.images, 3, options.size, options.size), dtype=torch.uint8)
    given = ArrayImages(arrays, None, None, tuple(map(str, range(options.images))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder / "photos", options.images, tuple(options.picture))
        settings = {"batch_size": options.batch_size, "precision": precision}
        features(encoder, given.select(range(min(options.batch_size, options.images))), **settings)
        seconds: dict[str, list[float]] = {"bare": [], "arrays": [], "jpeg": []}
        batch = encoder.preprocess(arrays[: options.batch_size]).to(device)
        for turn in range(options.rounds):
            seconds["bare"].append(timed(lambda: bare(encoder, batch, options.images, precision)))
            for kind, images in (("arrays", given), ("jpeg", folder / "photos")):
                out = folder / f"{kind}{turn}"
                seconds[kind].append(timed(lambda out=out, images=images: embed_to(out, encoder, images, **settings)))
            print({kind: round(options.images / times[-1], 1) for kind, times in seconds.items()}, flush=True)
    speed = {kind: options.images / float(np.median(times)) for kind, times in seconds.items()}
    row = rows.where() | {
        "backbone": options.backbone,
        "size": options.size,
        "picture": "x".join(map(str, options.picture)),
        "images": options.images,
        "batch_size": options.batch_size,
        "device": device,
        "precision": precision,
        "threads": options.threads,
        "rounds": options.rounds,
    }
    row |= {f"{kind}_images_per_second": round(value, 1) for kind, value in speed.items()}
    rows.append("embed", row | {f"{kind}_share": round(speed[kind] / speed["bare"], 3) for kind in ("arrays", "jpeg")})


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@torch.inference_mode()
def bare(encoder: ImageEncoder, batch: torch.Tensor, images: int, precision: str) -> None:
    """The encoder alone, on the same batch again and again."""
    batch = batch.to(memory_format=torch.channels_last if precision == "bf16" else torch.contiguous_format)
    for start in range(0, images, len(batch)):
        with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            encoder(batch[: images - start]).float().cpu()


def write_photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """JPEG files about as hard to decode as photographs: smooth, with some grain."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (size[1] // 25, size[0] // 25, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2)))
        grainy = smooth + random.normal(0, 6, smooth.shape)
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=90)


if __name__ == "__main__":
    main()
