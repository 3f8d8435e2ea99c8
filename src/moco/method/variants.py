"""Building MoCo v1, v2 or v3 from a model's settings: the head, batch norm and loss of each."""

import math
from collections.abc import Callable
from typing import Any, Literal

from pydantic import ValidationError
from torch import nn

from moco.config import ModelConfig
from moco.messages import explain
from moco.method import batchnorm
from moco.method.backbones import build_backbone, num_features
from moco.method.encoder import Encoder
from moco.method.model import BatchMoCo, KeyQueue, MoCo, QueueMoCo
from moco.parallel import collectives


def linear_head(features: int, dim: int) -> nn.Module:
    """v1's projector: one linear layer."""
    return nn.Linear(features, dim)


def mlp_head(features: int, dim: int, hidden: int) -> nn.Module:
    """v2's projector (section 3): two layers, no batch norm."""
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))


def mlp_bn_head(features: int, dim: int, hidden: int) -> nn.Module:
    """Projector of two layers with batch norm between them; the first has no bias."""
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim)
    )


def v3_mlp(features: int, dim: int, hidden: int, *, num_layers: int, last_norm: bool = True) -> nn.Module:
    """v3's projector and predictor: linear layers without bias, each followed by batch norm.

    The last batch norm has no scale and shift, or is left out.
    """
    layers: list[nn.Module] = []
    for layer in range(num_layers):
        last = layer == num_layers - 1
        layers.append(nn.Linear(features if layer == 0 else hidden, dim if last else hidden, bias=False))
        if not last:
            layers += [nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(nn.BatchNorm1d(dim, affine=False))
    return nn.Sequential(*layers)


# The papers' values for ImageNet that differ from `ModelConfig`'s defaults, which are v2's.
PUBLISHED: dict[str, dict[str, Any]] = {
    "v1": {"temperature": 0.07},
    "v3": {"dim": 256, "queue_size": 0, "temperature": 1.0},
}


def create_model(
    variant: str = "v2",
    *,
    backbone: str | nn.Module = "resnet50",
    dim: int | None = None,
    queue_size: int | None = None,
    temperature: float | None = None,
    symmetric: bool | None = None,
    stem: str | None = None,
    head: str | None = None,
    hidden_dim: int | None = None,
    batchnorm: str | None = None,
    bn_splits: int | None = None,
    pretrained: bool | None = None,
    channels: int = 3,
) -> MoCo:
    """Create a model to train: `out = model(view1, view2)`, then `model.update(out.keys, momentum=...)`.

    Settings that are not given take the paper's values for ImageNet.

    Args:
        variant: `v1`, `v2`, `v3`, or another name in `VARIANTS`.
        backbone: name of a timm or torchvision model, or a module images -> features with `num_features`.
        dim: dimension of the projections.
        queue_size: number of keys kept as negatives; v3 has no queue.
        temperature: divides the similarities.
        symmetric: add the loss with the two views swapped.
        stem: `imagenet`, `small` for images under 64 pixels, or another name in `moco.method.backbones.STEMS`.
        head: projector: `variant`, `linear`, `mlp` or `mlp_bn`.
        hidden_dim: width of the head's hidden layers.
        batchnorm: `auto`, `split`, `shuffle`, `sync` or `plain`.
        bn_splits: groups per device for `split`.
        pretrained: start from timm's pretrained weights.
        channels: channels of the images.

    Raises:
        ValueError: a setting is unknown, or the settings do not fit together.

    Example:
        >>> import moco, torch
        >>> model = moco.create_model("v2", backbone="resnet18", queue_size=1024)
        >>> out = model(torch.rand(16, 3, 64, 64), torch.rand(16, 3, 64, 64))
        >>> out.keys.shape
        torch.Size([16, 128])
    """
    names = ("dim", "queue_size", "temperature", "symmetric", "stem", "head", "hidden_dim", "batchnorm", "bn_splits")
    values = (dim, queue_size, temperature, symmetric, stem, head, hidden_dim, batchnorm, bn_splits)
    given = {"pretrained": pretrained} | dict(zip(names, values, strict=True))
    chosen = PUBLISHED.get(variant, {}) | {name: value for name, value in given.items() if value is not None}
    if isinstance(backbone, str):
        chosen["backbone"] = backbone
    try:
        config = ModelConfig.model_validate({"variant": variant} | chosen)
    except ValidationError as error:
        raise ValueError(explain(error, list(ModelConfig.model_fields))) from None
    return build_model(config, backbone=backbone if isinstance(backbone, nn.Module) else None, channels=channels)


def build_model(config: ModelConfig, *, backbone: nn.Module | None = None, channels: int = 3) -> MoCo:
    """Build the model that the settings describe; `backbone`, if given, replaces `config.backbone`."""
    if config.variant not in VARIANTS:
        raise ValueError(f"unknown variant {config.variant!r}: expected one of {', '.join(VARIANTS)}")
    if backbone is None:
        backbone = build_backbone(
            config.backbone,
            stem=config.stem,
            channels=channels,
            pretrained=config.pretrained,
            zero_init_last=config.variant == "v3",
        )
    return VARIANTS[config.variant](config, backbone)


def choose_batchnorm(config: ModelConfig) -> str:
    """Resolve `auto`: `sync` for v3, otherwise `shuffle` on several devices and `split` on one."""
    if config.batchnorm != "auto":
        return config.batchnorm
    if config.variant == "v3":
        return "sync"
    return "shuffle" if collectives.world_size() > 1 else "split"


def loss_range(config: ModelConfig, batch_size: int) -> tuple[float, float]:
    """Return the loss at chance level, and its floor, reached if positives are equal and negatives orthogonal."""
    temperature = config.temperature
    negatives = config.queue_size or batch_size - 1
    chance, floor = math.log(1 + negatives), math.log1p(negatives * math.exp(-1 / temperature))
    factor = 4 * temperature if config.variant == "v3" else 2 if config.symmetric else 1
    return factor * chance, factor * floor


_SHUFFLES: dict[str, Literal["device", "ranks"]] = {"split": "device", "shuffle": "ranks"}


def _queue_variant(config: ModelConfig, backbone: nn.Module, head: str) -> QueueMoCo:
    if not config.queue_size:
        raise ValueError(f"queue_size is 0; {config.variant} takes its negatives from a queue: expected at least 1")
    features, kind = num_features(backbone), choose_batchnorm(config)
    head = head if config.head == "variant" else config.head
    if head == "linear":
        projector = linear_head(features, config.dim)
    elif head == "mlp":
        projector = mlp_head(features, config.dim, config.hidden_dim or features)
    else:
        projector = mlp_bn_head(features, config.dim, config.hidden_dim or 512)
    splits = config.bn_splits if kind == "split" else 0
    encoder = Encoder(backbone, projector, num_splits=splits)
    batchnorm.convert(encoder, kind, num_splits=splits, grouped=True)
    return QueueMoCo(
        encoder,
        KeyQueue(config.queue_size, config.dim),
        config.temperature,
        symmetric=config.symmetric,
        shuffle=_SHUFFLES.get(kind),
    )


def _v3(config: ModelConfig, backbone: nn.Module) -> BatchMoCo:
    is_vit, hidden, kind = hasattr(backbone, "patch_embed"), config.hidden_dim or 4096, choose_batchnorm(config)
    projector = v3_mlp(num_features(backbone), config.dim, hidden, num_layers=3 if is_vit else 2)
    predictor = v3_mlp(config.dim, config.dim, hidden, num_layers=2, last_norm=is_vit)
    splits = config.bn_splits if kind == "split" else 0
    encoder = Encoder(backbone, projector, num_splits=splits)
    batchnorm.convert(encoder, kind, num_splits=splits, grouped=True)
    batchnorm.convert(predictor, kind, num_splits=splits)
    return BatchMoCo(encoder, predictor, config.temperature)


VARIANTS: dict[str, Callable[[ModelConfig, nn.Module], MoCo]] = {
    "v1": lambda config, backbone: _queue_variant(config, backbone, "linear"),
    "v2": lambda config, backbone: _queue_variant(config, backbone, "mlp"),
    "v3": _v3,
}
