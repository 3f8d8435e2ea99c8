"""Backbones without classifier, the small-image stem, projectors and predictors.

Initialisation follows the references: torchvision's for the backbone (its last batch norm of a block starts at 1, but
at 0 in v3), PyTorch's default for a replaced first convolution and for all heads.
"""

import difflib
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torchvision
from jaxtyping import Float, UInt8
from PIL import Image
from timm.models import is_model_in_modules
from torch import Tensor, nn

from moco.backbones import BACKBONES
from moco.batchnorm import grouped_order
from moco.transforms import centred, normalise, pixels_of
from moco.vit import VITS

Images = Float[Tensor, "n c h w"]


class Encoder(nn.Module):
    """images -> un-normalised projections; `features` stops at the backbone.

    Args:
        backbone: images `[n, c, h, w]` -> features `[n, f]`.
        projector: features -> projections.
        num_splits: the batch norms are `SplitBatchNorm2d(grouped=True)` of so many groups; 0: they are not. The batch
            is then put into the order of its groups once, here, instead of in every layer.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, *, num_splits: int = 0):
        super().__init__()
        self.backbone, self.projector, self.num_splits = backbone, projector, num_splits

    def forward(self, images: Images) -> Float[Tensor, "n d"]:
        if not (self.training and self.num_splits):
            return self.projector(self.backbone(images))
        order = grouped_order(len(images), self.num_splits, images.device)
        projections = self.projector(self.backbone(images[order]))
        return torch.empty_like(projections).index_copy(0, order, projections)

    def features(self, images: Images) -> Float[Tensor, "n f"]:
        return self.backbone(images)


class ImageEncoder(nn.Module):
    """What users get: normalised images of any size -> features, and how to make such images.

    Args:
        backbone: images -> features.
        name: of the backbone, as `build_backbone` takes it.
        stem: likewise.
        channels: of the images.
        mean: per channel, of images in [0, 1].
        std: likewise.
        input_size: side in pixels that `preprocess` brings images to.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        name: str,
        stem: str,
        channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        input_size: int,
    ):
        super().__init__()
        self.backbone, self.name, self.stem, self.channels = backbone, name, stem, channels
        self.mean, self.std, self.input_size = mean, std, input_size
        self.num_features = num_features(backbone)

    def forward(self, images: Images) -> Float[Tensor, "n f"]:
        return self.backbone(images)

    def preprocess(self, images: UInt8[Tensor, "n c h w"] | Sequence[Image.Image]) -> Float[Tensor, "n c s s"]:
        """uint8 tensors or PIL images to what the encoder takes: short side resized, centre cut out, normalised."""
        if isinstance(images, Tensor):
            return normalise(centred(images, self.input_size), self.mean, self.std)
        return torch.cat([self.preprocess(torch.from_numpy(pixels_of(image, self.channels))[None]) for image in images])

    def describe(self) -> dict[str, Any]:
        """All that it takes to build the same network anew, as plain values."""
        return {
            "backbone": self.name,
            "stem": self.stem,
            "channels": self.channels,
            "mean": list(self.mean),
            "std": list(self.std),
            "input_size": self.input_size,
            "num_features": self.num_features,
        }


def build_backbone(
    name: str, *, stem: str = "imagenet", channels: int = 3, pretrained: bool = False, zero_init_last: bool = False
) -> nn.Module:
    """A network without classifier, with `num_features`.

    Args:
        name: in `moco.backbones.BACKBONES` or `moco.vit.VITS`, of timm, or of torchvision.
        stem: `small` puts a 3x3/1 convolution in place of a ResNet's 7x7/2 one, and drops the pooling behind it.
        channels: of the images.
        pretrained: timm's published weights (downloaded by timm).
        zero_init_last: each residual block starts as the identity.

    Raises:
        ValueError: unknown name, a small stem for a network that is not a ResNet, or what the library refuses.
    """
    if name in BACKBONES or name in VITS:
        if pretrained:
            raise ValueError(f"backbone {name!r} has no published weights; leave out --model.pretrained")
        if name in BACKBONES:  # their stem is their own
            return BACKBONES[name](channels)
        backbone: Any = VITS[name](channels)
    elif timm.is_model(name):
        backbone = _from_timm(name, channels, pretrained, zero_init_last)
    elif name in torchvision.models.list_models(module=torchvision.models):  # its classifiers
        if pretrained or (channels != 3 and stem != "small"):
            given = "pretrained weights" if pretrained else f"{channels} channels"
            raise ValueError(f"backbone {name!r} is torchvision's, which comes without {given} here; use one of timm's")
        backbone = _without_classifier(torchvision.models.get_model(name))
    else:
        known = [*BACKBONES, *VITS, *timm.list_models(), *torchvision.models.list_models(module=torchvision.models)]
        near = difflib.get_close_matches(name, known, n=3)
        raise ValueError(
            f"unknown backbone {name!r}: expected a model name of timm or torchvision"
            + (f"; the closest are {', '.join(near)}" if near else "")
        )
    if stem == "small":
        _small_stem(backbone, name, channels)
    return backbone


def _from_timm(name: str, channels: int, pretrained: bool, zero_init_last: bool) -> nn.Module:
    options: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    if name.startswith(("resnet", "wide_resnet", "resnext")):
        options["zero_init_last"] = zero_init_last
    if is_model_in_modules(name, ("vision_transformer", "deit")):  # images of any size
        options |= {"dynamic_img_size": True, "dynamic_img_pad": True}
    try:
        backbone = timm.create_model(name, pretrained=pretrained, **options)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        what = f"{channels} channels" + (" and pretrained weights" if pretrained else "")
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"timm cannot make backbone {name!r} with {what}: {reason}") from error
    # Some networks, MobileNets among them, have a layer between what timm calls features and the classifier.
    backbone.num_features = getattr(backbone, "head_hidden_size", backbone.num_features)
    return backbone


def _small_stem(backbone: nn.Module, name: str, channels: int) -> None:
    first = getattr(backbone, "conv1", None)
    if not isinstance(first, nn.Conv2d) or not hasattr(backbone, "maxpool"):
        raise ValueError(f"backbone {name!r} has no ResNet stem to make small; use --model.stem imagenet")
    backbone.conv1 = nn.Conv2d(channels, first.out_channels, 3, stride=1, padding=1, bias=False)
    backbone.maxpool = nn.Identity()


def _without_classifier(model: nn.Module) -> nn.Module:
    for attribute in ("fc", "classifier", "head", "heads"):
        head = getattr(model, attribute, None)
        if head is not None:
            linear = [m for m in head.modules() if isinstance(m, nn.Linear)]
            if not linear:
                break
            setattr(model, attribute, nn.Identity())
            model.num_features = linear[0].in_features
            return model
    raise ValueError(
        f"{type(model).__name__} has no classifier known here; expected a linear layer in fc, classifier, head or heads"
    )


def linear_head(features: int, dim: int) -> nn.Module:
    """v1."""
    return nn.Linear(features, dim)


def mlp_head(features: int, dim: int, hidden: int) -> nn.Module:
    """v2, section 3: two layers, no batch norm."""
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))


def mlp_bn_head(features: int, dim: int, hidden: int) -> nn.Module:
    """Two layers with batch norm between; the first has no bias."""
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


def num_features(backbone: nn.Module) -> int:
    """Length of a backbone's features, as the backbone says it."""
    size = getattr(backbone, "num_features", None)
    if not isinstance(size, int):
        raise ValueError(
            f"backbone {type(backbone).__name__} must have an integer `num_features`, the length of its output"
        )
    return size
