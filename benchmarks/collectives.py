"""What each rank hands to collectives at a step, and what share of its time a GPU then computes: docs/many.md's tables.

    uv run python benchmarks/collectives.py imagenet-v2 --images 32 --seconds 0.19

Nothing is timed here. Bytes follow from the network, and tests/test_processes.py counts them in real runs. Seconds of
a step alone, bandwidth and latency are assumptions, given as flags.
"""

import argparse
from typing import NamedTuple

import torch

from moco.batchnorm import SyncBatchNorm
from moco.encoder import Encoder
from moco.recipes import load_recipe
from moco.variants import build_model, choose_batchnorm

FLAG_EVERY, ROW_EVERY = 10, 10


class Payload(NamedTuple):
    """Bytes that a rank hands over at a step; batch norm's `means` and `sums` in so many messages."""

    gradients: int
    keys: int
    images: int
    means: int
    sums: int
    messages: int


def payload(recipe: str, images: int) -> Payload:
    """Of a recipe with so many images a rank, in fp32."""
    config = load_recipe(recipe)
    with torch.device("meta"):
        model = build_model(config.model.model_copy(update={"batchnorm": "auto"}), channels=config.data.channels)
    encoder = model.query_encoder
    assert isinstance(encoder, Encoder)
    directions = 2 if model.symmetric else 1
    # Forward a mean and a variance, gathered, backward two sums, added up; the key encoder has no backward.
    norms = [(name, module.num_features) for name, module in model.named_modules() if isinstance(module, SyncBatchNorm)]
    learning = [(name, channels) for name, channels in norms if not name.startswith("key_encoder")]
    exchanged = choose_batchnorm(config.model) in ("split", "shuffle") and config.model.variant != "v3"
    return Payload(
        gradients=4 * sum(p.numel() for p in model.parameters() if p.requires_grad),
        keys=4 * directions * images * config.model.dim,
        images=4 * directions * images * config.data.channels * config.views.size**2 if exchanged else 0,
        means=4 * 2 * directions * sum(channels for _, channels in norms),
        sums=4 * 2 * directions * sum(channels for _, channels in learning),
        messages=directions * (len(norms) + len(learning)),
    )


def seconds(of: Payload, ranks: int, *, bandwidth: float, latency: float, gathered: bool) -> float:
    """What a step's collectives take if nothing of them is hidden behind the backward pass.

    A ring sums G bytes in 2 (W - 1) / W x G / B and gathers s bytes of each rank in (W - 1) s / B; sent only to the
    rank that needs them, images take (W - 1) / W s / B.
    """
    share = (ranks - 1) / ranks
    moved = 2 * share * (of.gradients + of.sums) + (ranks - 1) * (of.keys + of.means)
    moved += of.images * ((ranks - 1) if gathered else share)
    return moved / bandwidth + latency * (of.messages + 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="imagenet-v2")
    parser.add_argument("--images", type=int, default=32, help="a rank and step")
    parser.add_argument("--seconds", type=float, default=0.19, help="of a step without collectives: an assumption")
    parser.add_argument("--within", type=float, default=300e9, help="bytes/s of a GPU inside a node: an assumption")
    parser.add_argument("--between", type=float, default=25e9, help="bytes/s of a GPU between nodes: an assumption")
    parser.add_argument("--latency", type=float, default=3e-5, help="seconds of a small message: an assumption")
    chosen = parser.parse_args()
    of = payload(chosen.recipe, chosen.images)
    print(f"{chosen.recipe}, {chosen.images} images a rank, bytes a step: {of._asdict()}")
    print(f"and one word every {FLAG_EVERY} steps, five sums every {ROW_EVERY}")
    print("| GPUs | images to all ranks | images where they are needed |\n|---|---|---|")
    for ranks in (8, 64, 512):
        bandwidth = chosen.within if ranks <= 8 else chosen.between
        shares = []
        for gathered in (True, False):
            waited = seconds(of, ranks, bandwidth=bandwidth, latency=chosen.latency, gathered=gathered)
            shares.append(f"{chosen.seconds / (chosen.seconds + waited):.0%}")
        print(f"| {ranks} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
