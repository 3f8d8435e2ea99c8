"""Small residual networks for small images on CPUs; all other backbones come from timm or torchvision by name."""

import difflib
from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from jaxtyping import Float
from timm.models import is_model_in_modules
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1

from moco.method.vit import VITS

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


def build_backbone(
    name: str, *, stem: str = "imagenet", channels: int = 3, pretrained: bool = False, zero_init_last: bool = False
) -> nn.Module:
    """Build a network without classifier; it has the attribute `num_features`.

    Args:
        name: a name in `BACKBONES` or `vit.VITS`, or a model of timm or torchvision.
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


class SmallResNet(nn.Module):
    """A convolution, then one residual block of two 3x3 convolutions per stage, each at half the previous resolution.

    Args:
        channels: channels of the stages; the last is the length of the features.
        patch: whether the first convolution is 4x4 with stride 2, instead of 3x3 with stride 1.
        in_channels: channels of the images.
    """

    def __init__(self, channels: tuple[int, ...], *, patch: bool, in_channels: int = 3):
        super().__init__()
        self.num_features = channels[-1]
        kernel, stride = (4, 2) if patch else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, channels[0], kernel, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        stages: list[nn.Module] = [BasicBlock(channels[0], channels[0])]
        for before, after in zip(channels, channels[1:], strict=False):
            shortcut = nn.Sequential(conv1x1(before, after, stride=2), nn.BatchNorm2d(after))
            stages.append(BasicBlock(before, after, stride=2, downsample=shortcut))
        self.stages = nn.Sequential(*stages)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f"]:
        return self.stages(self.relu(self.bn1(self.conv1(images)))).mean(dim=(2, 3))


def resnet_tiny(in_channels: int) -> SmallResNet:
    """For images of about 8 pixels."""
    return SmallResNet((32, 64, 128), patch=False, in_channels=in_channels)


def resnet_mini(in_channels: int) -> SmallResNet:
    """For images of about 32 pixels; 28 million multiply-adds per image at that size."""
    return SmallResNet((48, 96, 192), patch=True, in_channels=in_channels)


BACKBONES = {"resnet-tiny": resnet_tiny, "resnet-mini": resnet_mini}
