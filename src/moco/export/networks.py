"""An encoder's network in terms of timm and torchvision: what to call there, and what to change afterwards."""

from typing import Any, NamedTuple

import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models.resnet import BasicBlock

from moco.method.backbones import BACKBONES, SmallResNet, num_heads, size_options
from moco.method.encoder import ImageEncoder
from moco.method.vit import VITS

INSTEAD = "use --format safetensors, which holds every encoder"


class TimmNetwork(NamedTuple):
    """`timm.create_model(architecture, **arguments)`, then `changes`: statements about `model`."""

    architecture: str
    arguments: dict[str, Any]
    changes: tuple[str, ...]

    @property
    def code(self) -> str:
        arguments = "".join(f", {name}={value!r}" for name, value in self.arguments.items())
        created = f"model = timm.create_model({self.architecture!r}, num_classes=0{arguments})"
        return "\n".join(["import timm", "import torch", "", created, *self.changes])


class TorchvisionNetwork(NamedTuple):
    """`torchvision.models.NAME()`, then `changes`; `head` is its attribute for the classifier."""

    name: str
    head: str
    changes: tuple[str, ...]

    @property
    def code(self) -> str:
        created = f"model = torchvision.models.{self.name}()"
        return "\n".join(["import torch", "import torchvision", "", created, *self.changes])

    def load(self, weights: str) -> str:
        """Statements that load `weights`, an expression, without the classifier, and compute `features`."""
        return "\n".join(
            [
                f"left = model.load_state_dict({weights}, strict=False)",
                "assert not left.unexpected_keys, left.unexpected_keys",
                f'assert all(name.startswith("{self.head}.") for name in left.missing_keys), left.missing_keys',
                f"model.{self.head} = torch.nn.Identity()",
                "features = model.eval()(images)",
            ]
        )


def in_timm(encoder: ImageEncoder) -> TimmNetwork | None:
    """Return the network as timm creates it; None if timm does not have it."""
    name = encoder.name
    arguments: dict[str, Any] = {} if encoder.channels == 3 else {"in_chans": encoder.channels}
    backbone = encoder.backbone
    if name in VITS:
        assert isinstance(backbone, VisionTransformer)
        width, depth = backbone.num_features, len(backbone.blocks)
        architecture = {384: "vit_small_patch16_224", 768: "vit_base_patch16_224"}[width]
        arguments |= {} if depth == 12 else {"depth": depth}
        changes = _conv_patches(encoder) if "conv" in name else ()
    elif name not in BACKBONES and timm.is_model(name):
        architecture, changes = name.partition(".")[0], _stem(encoder, "act1") if _small(encoder) else ()
    else:
        return None
    if isinstance(backbone, VisionTransformer):
        # Weights load with any number of heads but features differ: at width 384, timm's ViT has 6 and v3's 12.
        arguments |= {"num_heads": num_heads(backbone)}
    return TimmNetwork(architecture, arguments | size_options(architecture), changes)


def in_torchvision(encoder: ImageEncoder, *, form: str) -> TorchvisionNetwork:
    """Return the network as torchvision creates it.

    Args:
        encoder: any encoder.
        form: format of the export, for the message.

    Raises:
        ValueError: torchvision has no such network, or names its parameters differently.
    """
    name = encoder.name.partition(".")[0]
    if encoder.name in VITS or name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"torchvision has no network {encoder.name!r}, which --format {form} needs; {INSTEAD}")
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name).state_dict()
    ours = encoder.backbone.state_dict()
    left = {parameter.partition(".")[0] for parameter in theirs.keys() - ours.keys()}
    other = [each for each, tensor in ours.items() if each not in theirs or theirs[each].shape != tensor.shape]
    is_resnet = isinstance(getattr(encoder.backbone, "conv1", None), nn.Conv2d) and left == {"fc"}
    changes = _stem(encoder, "relu") if is_resnet and (_small(encoder) or other == ["conv1.weight"]) else ()
    if len(left) != 1 or not left <= {"fc", "classifier", "head", "heads"} or other not in ([], ["conv1.weight"]):
        raise ValueError(
            f"torchvision's {name} has different parameters from this encoder, which is timm's; {INSTEAD}, or "
            "--format timm"
        )
    if other and not changes:
        raise ValueError(f"torchvision's {name} does not take {encoder.channels} channels; {INSTEAD}")
    return TorchvisionNetwork(name, left.pop(), changes)


def standalone(encoder: ImageEncoder) -> tuple[str, str]:
    """Python code that builds the network as `model`, without weights or this package; and the library it needs."""
    network = in_timm(encoder)
    if network:
        return network.code, "timm"
    if isinstance(encoder.backbone, SmallResNet):
        return _small_resnet(encoder.backbone), "torchvision"
    if encoder.name in torchvision.models.list_models(module=torchvision.models):
        head = next(each for each in ("fc", "classifier", "head", "heads") if hasattr(encoder.backbone, each))
        return TorchvisionNetwork(encoder.name, head, (f"model.{head} = torch.nn.Identity()",)).code, "torchvision"
    raise ValueError(
        f"backbone {encoder.name!r} is in neither timm nor torchvision, so no other program could load an export; use "
        "moco.load_encoder"
    )


def _small(encoder: ImageEncoder) -> bool:
    return encoder.stem != "imagenet"


def _stem(encoder: ImageEncoder, activation: str) -> tuple[str, ...]:
    """Return changes to a ResNet's stem; `activation`: the library's name for the one after its first batch norm."""
    backbone = encoder.backbone
    lines = [f"model.conv1 = {_conv(backbone.get_submodule('conv1'))}"]
    for ours, theirs in (("act1", activation), ("maxpool", "maxpool")):
        if isinstance(getattr(backbone, ours, None), nn.Identity):
            lines.append(f"model.{theirs} = torch.nn.Identity()")
    return tuple(lines)


def _conv_patches(encoder: ImageEncoder) -> tuple[str, ...]:
    layers = list(encoder.backbone.get_submodule("patch_embed.proj").children())
    sizes = [encoder.channels, *(layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d))][:-1]
    return (
        "layers = []",
        f"for a, b in {list(zip(sizes, sizes[1:], strict=False))}:",
        "    conv = torch.nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False)",
        "    layers += [conv, torch.nn.BatchNorm2d(b), torch.nn.ReLU()]",
        f"model.patch_embed.proj = torch.nn.Sequential(*layers, {_conv(layers[-1])})",
    )


def _conv(conv: nn.Module) -> str:
    assert isinstance(conv, nn.Conv2d)
    text = f"torch.nn.Conv2d({conv.in_channels}, {conv.out_channels}, {conv.kernel_size[0]}"
    text += "" if conv.stride[0] == 1 else f", stride={conv.stride[0]}"
    text += "" if conv.padding[0] == 0 else f", padding={conv.padding[0]}"
    return text + (")" if conv.bias is not None else ", bias=False)")


def _small_resnet(network: SmallResNet) -> str:
    first = network.conv1
    widths = [stage.conv2.out_channels for stage in network.stages if isinstance(stage, BasicBlock)]
    return "\n".join(
        [
            "import torch",
            "from torchvision.models.resnet import BasicBlock, conv1x1",
            "",
            "model = torch.nn.Sequential()",
            f"model.conv1 = {_conv(first)}",
            f"model.bn1, model.relu = torch.nn.BatchNorm2d({widths[0]}), torch.nn.ReLU()",
            f"model.stages = torch.nn.Sequential(BasicBlock({widths[0]}, {widths[0]}))",
            f"for a, b in {list(zip(widths, widths[1:], strict=False))}:",
            "    shortcut = torch.nn.Sequential(conv1x1(a, b, stride=2), torch.nn.BatchNorm2d(b))",
            "    model.stages.append(BasicBlock(a, b, stride=2, downsample=shortcut))",
            "model.pool, model.flat = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()",
        ]
    )
