"""A network small enough to be written out by hand, and the loop that trains it as a user would."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import moco
from moco.method.model import BatchMoCo, MoCo, QueueMoCo
from moco.parallel import collectives
from published import Batches, Trace

Model = TypeVar("Model", bound=MoCo)


# A run of a few seconds.
TINY: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 96,
    "data": {"source": "digits", "size": 12, "channels": 1},
    "views": {"recipe": "digits", "size": 8},
    "model": {"backbone": "resnet-tiny", "stem": "small", "dim": 16, "queue_size": 128, "bn_splits": 4},
    "monitor": {"knn_k": 20},
    "engine": {"accelerator": "cpu", "precision": "fp32", "threads": 1},
}


def write_stl10(folder: Path, unlabeled: int = 40, train: int = 20, test: int = 10) -> dict[str, np.ndarray]:
    """The authors' files with fewer images: channel by channel, column by column, labels from 1. Returns n c h w."""
    folder.mkdir(parents=True)
    pixels, generator = {}, np.random.default_rng(0)
    for part, number in (("unlabeled", unlabeled), ("train", train), ("test", test)):
        pixels[part] = generator.integers(0, 256, (number, 3, 96, 96), dtype=np.uint8)
        pixels[part].swapaxes(2, 3).tofile(folder / f"{part}_X.bin")
        if part != "unlabeled":
            (np.arange(number) % 10 + 1).astype(np.uint8).tofile(folder / f"{part}_y.bin")
    names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    return pixels


class SmallBackbone(nn.Sequential):
    """Any module images -> features that says how many features there are is a backbone."""

    num_features = 6

    def __init__(self, *, vit: bool = False) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, stride=2, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        if vit:  # v3 has other heads behind a vision transformer
            self.add_module("patch_embed", nn.Identity())


class Pixels(nn.Module):
    """An encoder whose projections are the pixels, so that a test can choose them."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.linear.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


def small_v1(
    batchnorm: str = "plain",
    *,
    variant: str = "v1",
    splits: int = 2,
    symmetric: bool = False,
    queue_size: int = 20,
    seed: int = 0,
) -> QueueMoCo:
    torch.manual_seed(seed)
    model = moco.create_model(
        variant,
        backbone=SmallBackbone(),
        dim=5,
        queue_size=queue_size,
        temperature=0.2,
        symmetric=symmetric,
        batchnorm=batchnorm,
        bn_splits=splits,
    )
    assert isinstance(model, QueueMoCo)
    return off_one(model)


def small_v3(*, resnet: bool = True) -> BatchMoCo:
    torch.manual_seed(0)
    model = moco.create_model("v3", backbone=SmallBackbone(vit=not resnet), dim=5, hidden_dim=16, temperature=0.5)
    assert isinstance(model, BatchMoCo)
    return off_one(model)


def off_one(model: Model) -> Model:
    """In float64, scales and shifts other than the 1 and 0 they start at: leaving one out shows."""
    for query, key in zip(model.query_encoder.parameters(), model.key_encoder.parameters(), strict=True):
        if query.ndim == 1:
            nn.init.normal_(query, mean=0.5, std=0.2)
            key.data.copy_(query)
    return model.double()


def trained(model: MoCo) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def weights(model: MoCo) -> dict[str, Tensor]:
    """All that learns by gradient, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def make_batches(count: int = 10, size: int = 8, side: int = 9) -> Batches:
    random = torch.Generator().manual_seed(1)
    shape = (count, 2, size, 3, side, side)
    return [(pair[0], pair[1]) for pair in torch.randn(shape, generator=random, dtype=torch.float64)]


def cosine_momentum(step: int) -> float:
    """Rises from 0.6 to 1 over ten steps, so that a step's neighbour would be seen."""
    return [0.6 + 0.04 * step for step in range(11)][step]


def train(
    model: MoCo,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    momentum: Callable[[int], float],
) -> Trace:
    """The loop of a user; each of several processes takes its rows of the batch."""
    trace, wrapped = Trace(), model
    if collectives.world_size() > 1:
        from moco.parallel.fabric import ddp_options

        wrapped = DistributedDataParallel(model, **ddp_options())
    for step, (view1, view2) in enumerate(batches):
        trace.key_encoders.append({n: p.clone() for n, p in model.key_encoder.named_parameters()})
        generator = torch.Generator().manual_seed(step)
        out = wrapped(collectives.local(view1), collectives.local(view2), generator=generator)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update(out.keys, momentum=momentum(step + 1))
        trace.losses.append(float(collectives.all_reduce_sum(out.loss.detach())) / collectives.world_size())
    trace.query_encoder = weights(model)
    if "queue.keys" in model.state_dict():
        trace.queue, trace.pointer = model.state_dict()["queue.keys"], int(model.state_dict()["queue.pointer"])
    return trace


def assert_same_training(ours: Trace, theirs: Trace, *, within: float = 1e-10) -> None:
    """Losses, key encoders of every step, query encoder and queue to `within`; the pointer exactly."""
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=0, atol=within)
    for step, (own, other) in enumerate(zip(ours.key_encoders, theirs.key_encoders, strict=True)):
        for name, value in own.items():
            expected = other.get(f"query_encoder.{name}", other.get(name))
            torch.testing.assert_close(value, expected, rtol=0, atol=within, msg=lambda m, s=step: f"step {s}: {m}")
    for name, value in ours.query_encoder.items():
        torch.testing.assert_close(value, theirs.query_encoder[name].detach(), rtol=0, atol=within)
    torch.testing.assert_close(ours.queue, theirs.queue, rtol=0, atol=within, check_dtype=len(ours.queue) > 0)
    assert ours.pointer == theirs.pointer
