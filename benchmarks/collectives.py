"""What each rank hands to collectives at a step, and what share of its time a GPU then computes: docs/many.md's tables.

    uv run python benchmarks/collectives.py imagenet-v2 --images 32 --seconds 0.19

Nothing is timed here. Bytes follow from the network, and tests/test_processes.py counts them in real runs. Seconds of
a step alone, bandwidth and latency are assumptions, given as flags.
"""

import argparse
from typing import NamedTuple

import torch
from torch import nn

from moco.config import PretrainConfig
from moco.method.batchnorm import SyncBatchNorm
from moco.method.variants import build_model
from moco.parallel.signals import ASK_EVERY
from moco.recipes import load_recipe

WITHIN, BETWEEN, LATENCY = 300e9, 25e9, 3e-5
"""Assumptions: bytes/s of a GPU inside a node of 8 and between nodes, seconds of a small message."""


class Payload(NamedTuple):
    """Bytes that a rank hands over at a step; batch norm's `means` and `sums` in so many messages."""

    gradients: int
    keys: int
    images: int
    means: int
    sums: int
    messages: int


def payload(config: PretrainConfig, images: int, *, backbone: nn.Module | None = None) -> Payload:
    """Of settings with so many images a rank, in fp32 if not in fp64; `backbone`, if given, replaces theirs.

    Own keys count as masked only if the settings say so: left open, it depends on the number of images.
    """
    with torch.device("meta"):
        model = build_model(config.model, backbone=backbone, channels=config.data.channels)
    number, parts = 8 if config.engine.precision == "fp64" else 4, config.optim.accumulate
    directions = 2 if model.symmetric else 1
    # Forward a mean and a variance, gathered, backward two sums, added up; the key encoder has no backward.
    norms = [(name, module.num_features) for name, module in model.named_modules() if isinstance(module, SyncBatchNorm)]
    learning = [(name, channels) for name, channels in norms if not name.startswith("key_encoder")]
    # Built on one process, `auto` has groups there; on several it is images that are exchanged.
    exchanged = model.shuffle is not None and config.model.batchnorm != "split"
    pixels = config.data.channels * config.views.size**2
    return Payload(
        gradients=number * sum(p.numel() for p in model.parameters() if p.requires_grad),
        keys=number * directions * images * config.model.dim + (8 * images if config.model.mask_own else 0),
        images=number * directions * images * pixels if exchanged else 0,
        means=number * 2 * directions * parts * sum(channels for _, channels in norms),
        sums=number * 2 * directions * parts * sum(channels for _, channels in learning),
        messages=directions * parts * (len(norms) + len(learning)),
    )


def in_words(of: Payload) -> list[str]:
    """Cells of docs/many.md: gradients, keys, images, batch norm."""
    norms = of.means + of.sums
    return [*map(_size, of[:3]), f"{_size(norms)} in {of.messages} messages" if norms else "none"]


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 5e5 else f"{number / 1e3:.0f} kB" if number else "none"


def seconds(of: Payload, ranks: int, *, bandwidth: float, latency: float, gathered: bool) -> float:
    """What a step's collectives take if nothing of them is hidden behind the backward pass.

    A ring sums G bytes in 2 (W - 1) / W x G / B and gathers s bytes of each rank in (W - 1) s / B; sent only to the
    rank that needs them, images take (W - 1) / W s / B.
    """
    share = (ranks - 1) / ranks
    moved = 2 * share * (of.gradients + of.sums) + (ranks - 1) * (of.keys + of.means)
    moved += of.images * ((ranks - 1) if gathered else share)
    return moved / bandwidth + latency * (of.messages + 4)


def efficiency(
    of: Payload,
    ranks: int,
    *,
    alone: float,
    gathered: bool,
    within: float = WITHIN,
    between: float = BETWEEN,
    latency: float = LATENCY,
) -> str:
    """Share of its time that a GPU computes, for a step that takes `alone` seconds without collectives."""
    waited = seconds(of, ranks, bandwidth=within if ranks <= 8 else between, latency=latency, gathered=gathered)
    return f"{100 * alone / (alone + waited):.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="imagenet-v2")
    parser.add_argument("--images", type=int, default=32, help="a rank and step")
    parser.add_argument("--seconds", type=float, default=0.19, help="of a step without collectives: an assumption")
    parser.add_argument("--within", type=float, default=WITHIN, help="bytes/s of a GPU inside a node: an assumption")
    parser.add_argument("--between", type=float, default=BETWEEN, help="bytes/s of a GPU between nodes: an assumption")
    parser.add_argument("--latency", type=float, default=LATENCY, help="seconds of a small message: an assumption")
    chosen = parser.parse_args()
    config = load_recipe(chosen.recipe)
    of = payload(config, chosen.images)
    print(f"{chosen.recipe}, {chosen.images} images a rank, bytes a step: {of._asdict()}")
    for what, size in zip(("gradients", "keys", "images", "batch norm"), in_words(of), strict=True):
        print(f"{what}: {size}")
    print(f"and two words every {ASK_EVERY} steps, five sums every {config.monitor.log_every}")
    print("| GPUs | images to all ranks | images where they are needed |\n|---|---|---|")
    assumed = {"within": chosen.within, "between": chosen.between, "latency": chosen.latency}
    for ranks in (8, 64, 512):
        shares = [efficiency(of, ranks, alone=chosen.seconds, gathered=each, **assumed) for each in (True, False)]
        print(f"| {ranks} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
