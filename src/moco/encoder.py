"""Backbones without classifier, their stems for small images, projectors and predictors.

Initialisation follows the reference code: torchvision's for the backbone (the last batch norm of a block starts at 1,
but at 0 in v3), PyTorch's default for a replaced first convolution and for all heads.
"""

import difflib
from collections.abc import Callable, Sequence
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

# How each differs from the small stem, which its tensors do not show.
_ODD_STEMS: dict[str, Callable[[Any], None]] = {
    "small-pad2": lambda backbone: setattr(backbone.conv1, "padding", (2, 2)),
    "small-linear": lambda backbone: setattr(backbone, "act1", nn.Identity()),
}
STEMS = ("imagenet", "small", *_ODD_STEMS)
"""`small` is a 3x3/1 convolution without pooling; solo-learn's pads by 2, lightly's may lack the ReLU after it."""
# Options with which timm's fixed-size networks accept images of other sizes, by timm's modules.
_ANY_SIZE: dict[tuple[str, ...], dict[str, bool]] = {
    ("vision_transformer", "deit", "eva"): {"dynamic_img_size": True, "dynamic_img_pad": True},
    ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr"): {"strict_img_size": False},
}


class Encoder(nn.Module):
    """A backbone with a projector: images -> un-normalised projections; `features` stops at the backbone.

    Args:
        backbone: images `[n, c, h, w]` -> features `[n, f]`.
        projector: features -> projections.
        num_splits: number of groups if the batch norms are `SplitBatchNorm2d(grouped=True)`, else 0. The batch is then
            ordered by group once, here, instead of in every layer.
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
    """An encoder for users: normalised images of any size -> features; `preprocess` prepares such images.

    Args:
        backbone: images -> features.
        name: name of the backbone, as `build_backbone` takes it.
        stem: stem of the backbone, as `build_backbone` takes it.
        channels: channels of the images.
        mean: mean of each channel, for images in [0, 1].
        std: standard deviation of each channel, for images in [0, 1].
        input_size: side in pixels of images from `preprocess`.

    Raises:
        ValueError: mean and std have neither one value per channel nor three, to be averaged.
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
        if len(mean) != len(std) or len(mean) not in (channels, 3):
            raise ValueError(
                f"mean has {len(mean)} values and std {len(std)}; expected {channels}, one per channel of the images"
            )
        self.backbone, self.name, self.stem, self.channels = backbone, name, stem, channels
        self.mean, self.std, self.input_size = mean, std, input_size
        self.num_features = num_features(backbone)

    def forward(self, images: Images) -> Float[Tensor, "n f"]:
        return self.backbone(images)

    def preprocess(self, images: UInt8[Tensor, "n c h w"] | Sequence[Image.Image]) -> Float[Tensor, "n c s s"]:
        """Prepare uint8 tensors or PIL images: resize the short side, crop the centre, normalise.

        Raises:
            ValueError: the images do not have the encoder's number of channels.
        """
        if isinstance(images, Tensor):
            if images.shape[1] != self.channels:
                raise ValueError(f"images have {images.shape[1]} channels; expected the encoder's {self.channels}")
            return normalise(centred(images, self.input_size), self.mean, self.std)
        refuse_channels(self.channels)
        return torch.cat([self.preprocess(torch.from_numpy(pixels_of(image, self.channels))[None]) for image in images])

    def describe(self) -> dict[str, Any]:
        """Everything needed to build the same network again, as plain values; for a transformer, also `num_heads`."""
        heads = num_heads(self.backbone)
        return {
            "backbone": self.name,
            "stem": self.stem,
            "channels": self.channels,
            "mean": list(self.mean),
            "std": list(self.std),
            "input_size": self.input_size,
            "num_features": self.num_features,
            **({} if heads is None else {"num_heads": heads}),
        }


def build_backbone(
    name: str, *, stem: str = "imagenet", channels: int = 3, pretrained: bool = False, zero_init_last: bool = False
) -> nn.Module:
    """Build a network without classifier; it has the attribute `num_features`.

    Args:
        name: a name in `moco.backbones.BACKBONES` or `moco.vit.VITS`, or a model of timm or torchvision.
        stem: a name in `STEMS`; `small` replaces a ResNet's 7x7/2 convolution by a 3x3/1 one, and drops the pooling
            after it. Networks in `BACKBONES` have their own stem.
        channels: channels of the images.
        pretrained: load timm's pretrained weights (downloaded by timm).
        zero_init_last: initialise each residual block as the identity.

    Raises:
        ValueError: the name or stem is unknown, a small stem was asked for but the network is not a ResNet, or the
            library refuses the settings.
    """
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r}: expected one of {', '.join(STEMS)}")
    if name in BACKBONES or name in VITS:
        if pretrained:
            raise ValueError(f"backbone {name!r} has no pretrained weights; leave out --model.pretrained")
        if name in BACKBONES:  # their stem is their own
            return BACKBONES[name](channels)
        backbone: Any = VITS[name](channels)
    elif timm.is_model(name):
        backbone = _from_timm(name, channels, pretrained, zero_init_last)
    elif name in torchvision.models.list_models(module=torchvision.models):  # its classifiers
        if pretrained or (channels != 3 and stem == "imagenet"):
            given = "pretrained weights" if pretrained else f"{channels} channels"
            raise ValueError(f"backbone {name!r} is torchvision's, which comes without {given} here; use one of timm's")
        backbone = _without_classifier(torchvision.models.get_model(name))
    else:
        known = [*BACKBONES, *VITS, *timm.list_models(), *torchvision.models.list_models(module=torchvision.models)]
        near = difflib.get_close_matches(name, known, n=3)
        raise ValueError(
            f"unknown backbone {name!r}: expected the name of a model in timm or torchvision"
            + (f"; the closest are {', '.join(near)}" if near else "")
        )
    if stem != "imagenet":
        _small_stem(backbone, name, channels)
        _ODD_STEMS.get(stem, lambda _: None)(backbone)
    return backbone


def _from_timm(name: str, channels: int, pretrained: bool, zero_init_last: bool) -> nn.Module:
    options: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    if name.startswith(("resnet", "wide_resnet", "resnext")):
        options["zero_init_last"] = zero_init_last
    options |= size_options(name)
    try:
        backbone = timm.create_model(name, pretrained=pretrained, **options)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        what = f"{channels} channels" + (" and pretrained weights" if pretrained else "")
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"timm cannot build backbone {name!r} with {what}: {reason}; use another backbone") from error
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


def size_options(name: str) -> dict[str, bool]:
    """Options with which a network of timm accepts images of any size; empty if it needs none."""
    return next((options for modules, options in _ANY_SIZE.items() if is_model_in_modules(name, modules)), {})


def refuse_size(backbone: nn.Module, size: int, *, channels: int) -> None:
    """Check that a backbone accepts images of a size, by trying one, because timm's own information is not reliable.

    Args:
        backbone: images -> features; its statistics and modes stay unchanged.
        size: side of the images in pixels.
        channels: channels of the images.

    Raises:
        ValueError: it does not accept images of that size; the message names the size it is made for, if known.
    """
    first, modes = next(backbone.parameters()), [(module, module.training) for module in backbone.modules()]
    image = torch.zeros(1, channels, size, size, device=first.device, dtype=first.dtype)
    try:
        with torch.no_grad():
            backbone.eval()(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        usual = own_size(backbone)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"backbone {type(backbone).__name__} does not take images of {size} pixels ({reason})"
            + (f": give it its own {usual}" if usual and usual != size else ": give it larger ones")
            + ", with --views.size and --data.size, or take another backbone"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode


def own_size(backbone: nn.Module) -> int | None:
    """Side in pixels of the images that a network is made for, according to timm or torchvision; None if unknown."""
    about = getattr(backbone, "pretrained_cfg", None)
    size = about.get("input_size", (0, None))[1] if isinstance(about, dict) else getattr(backbone, "image_size", None)
    return size if isinstance(size, int) else None


def refuse_channels(channels: int) -> None:
    """Raise ValueError if an encoder takes a number of channels that no picture has."""
    if channels not in (1, 3):
        raise ValueError(
            f"the encoder takes {channels}-channel images; pictures are read with 1 or 3: give a uint8 tensor "
            f"[n, {channels}, h, w]"
        )


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


def num_features(backbone: nn.Module) -> int:
    """Length of a backbone's features, from its attribute `num_features`."""
    size = getattr(backbone, "num_features", None)
    if not isinstance(size, int):
        raise ValueError(
            f"backbone {type(backbone).__name__} must have an integer `num_features`, the length of its output"
        )
    return size


def num_heads(backbone: nn.Module) -> int | None:
    """Attention heads per layer, which tensors do not show; None if there are none, or layers differ."""
    counts = {each for module in backbone.modules() if isinstance(each := getattr(module, "num_heads", None), int)}
    return counts.pop() if len(counts) == 1 else None
