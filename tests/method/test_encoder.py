import math
from typing import Any, get_args

import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from moco.config import ModelConfig
from moco.evaluate.finetune import trainable
from moco.method.backbones import BACKBONES, STEMS, build_backbone, num_features, num_heads, refuse_size
from moco.method.encoder import Encoder, ImageEncoder
from moco.method.variants import linear_head, mlp_bn_head, mlp_head, v3_mlp


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_paper(name: str, *, stem: str = "imagenet", channels: int = 3) -> nn.Module:
    """The network without the time it takes to draw its weights."""
    with torch.device("meta"):
        return build_backbone(name, stem=stem, channels=channels)


def seeded_resnet18(*, stem: str = "imagenet", zero_init_last: bool = False) -> Any:
    torch.manual_seed(0)
    return build_backbone("resnet18", stem=stem, zero_init_last=zero_init_last)


def assert_uniform(weight: Tensor, bound: float) -> None:
    assert weight.abs().max() <= bound * (1 + 1e-6)
    assert weight.abs().max() > 0.9 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


# Backbones


@pytest.mark.parametrize(
    ("name", "stem", "parameters", "features"),
    [
        ("resnet50", "imagenet", 23_508_032, 2048),
        ("resnet50", "small", 23_500_352, 2048),
        ("resnet18", "imagenet", 11_176_512, 512),
        ("resnet18", "small", 11_168_832, 512),
        ("vit_small_patch16_224", "imagenet", 21_665_664, 384),
        ("vit_base_patch16_224", "imagenet", 85_798_656, 768),
    ],
)
def test_backbones_have_the_published_number_of_parameters(
    name: str, stem: str, parameters: int, features: int
) -> None:
    backbone = on_paper(name, stem=stem)
    assert num_parameters(backbone) == parameters
    assert num_features(backbone) == features


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_tensors_are_called_as_in_torchvision(name: str) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name)
    expected = {n: t.shape for n, t in theirs.state_dict().items() if not n.startswith("fc.")}
    assert {n: t.shape for n, t in on_paper(name).state_dict().items()} == expected


def test_the_small_stem_keeps_the_resolution_of_small_images() -> None:
    backbone = seeded_resnet18(stem="small")
    assert (backbone.conv1.kernel_size, backbone.conv1.stride, backbone.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert backbone.conv1.bias is None
    seen: list[torch.Size] = []
    backbone.layer1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert backbone(torch.rand(2, 3, 32, 32)).shape == (2, 512)
    assert seen == [(2, 64, 32, 32)]


def structure(backbone: Any) -> tuple[Any, ...]:
    conv, shapes = backbone.conv1, {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    return conv.kernel_size, conv.stride, conv.padding, type(backbone.act1), type(backbone.maxpool), shapes


@pytest.mark.parametrize(
    ("stem", "kernel", "padding", "activation", "pooling"),
    [
        ("imagenet", 7, 3, nn.ReLU, nn.MaxPool2d),
        ("small", 3, 1, nn.ReLU, nn.Identity),
        ("small-pad2", 3, 2, nn.ReLU, nn.Identity),
        ("small-linear", 3, 1, nn.Identity, nn.Identity),
    ],
)
def test_an_encoder_is_trained_from_scratch_with_the_stem_that_it_has(
    stem: str, kernel: int, padding: int, activation: type, pooling: type
) -> None:
    encoder = ImageEncoder(
        on_paper("resnet18", stem=stem),
        name="resnet18",
        stem=stem,
        channels=3,
        mean=(0,) * 3,
        std=(1,) * 3,
        input_size=8,
    )
    with torch.device("meta"):
        fresh = structure(trainable(encoder, from_scratch=True))
    assert fresh == structure(encoder.backbone)
    stride = 2 if stem == "imagenet" else 1
    assert fresh[:5] == ((kernel,) * 2, (stride,) * 2, (padding,) * 2, activation, pooling)


def test_all_stems_can_be_asked_for() -> None:
    assert STEMS == get_args(ModelConfig.model_fields["stem"].annotation)


@pytest.mark.parametrize("name", [*BACKBONES, "resnet18"])
@pytest.mark.parametrize("channels", [1, 4])
def test_backbones_take_images_of_any_number_of_channels(name: str, channels: int) -> None:
    backbone = build_backbone(name, stem="small", channels=channels).eval()
    features = backbone(torch.rand(2, channels, 16, 16))
    assert features.shape == (2, num_features(backbone))


def test_backbones_that_timm_lacks_come_from_torchvision() -> None:
    backbone = build_backbone("shufflenet_v2_x0_5").eval()
    assert num_features(backbone) == 1024
    assert backbone(torch.rand(1, 3, 32, 32)).shape == (1, 1024)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vgg11", "hgnetv2_b0"])
def test_features_are_as_long_as_is_said_where_timm_has_a_layer_before_the_classifier(name: str) -> None:
    backbone = on_paper(name).eval()
    assert backbone(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, num_features(backbone))


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit-small-v3", "eva02_tiny_patch14_224"]
)
def test_transformers_take_images_of_any_size(name: str) -> None:
    backbone = on_paper(name, channels=1).eval()
    for height, width in ((32, 48), (37, 20)):
        assert backbone(torch.empty(2, 1, height, width, device="meta")).shape == (2, num_features(backbone))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_transformers_of_windows_take_images_of_other_sizes(name: str) -> None:
    backbone = on_paper(name).eval()
    assert backbone(torch.empty(2, 3, 32, 48, device="meta")).shape == (2, num_features(backbone))
    refuse_size(backbone, 96, channels=3)


@pytest.mark.parametrize(("name", "own"), [("mixer_s16_224", 224), ("halonet26t", 256), ("vit_b_32", 224)])
def test_a_network_of_one_size_is_refused_others_before_it_is_used(name: str, own: int) -> None:
    backbone = on_paper(name)
    refuse_size(backbone, own, channels=3)
    with pytest.raises(
        ValueError, match=rf"does not take images of 64 pixels .*: give it its own {own}, with"
    ) as caught:
        refuse_size(backbone, 64, channels=3)
    assert "\n" not in str(caught.value) and backbone.training


def test_trying_a_size_leaves_a_network_as_it_was() -> None:
    backbone = build_backbone("resnet-tiny")
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    frozen = next(module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    refuse_size(backbone, 8, channels=3)
    assert backbone.training and not frozen.training
    torch.testing.assert_close(backbone.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "heads"),
    [("vit-small-v3", 12), ("vit_small_patch16_224", 6), ("swin_tiny_patch4_window7_224", None), ("resnet18", None)],
)
def test_the_number_of_heads_is_known_where_all_layers_have_as_many(name: str, heads: int | None) -> None:
    assert num_heads(on_paper(name)) == heads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet5O"}, r"unknown backbone 'resnet5O': .* the closest are .*resnet50"),
        ({"name": "zzzzz"}, r"unknown backbone 'zzzzz': expected the name of a model in timm or torchvision$"),
        ({"name": "fcn_resnet50"}, r"unknown backbone 'fcn_resnet50'"),  # not one for classification
        ({"name": "vit_tiny_patch16_224", "stem": "small"}, r"no ResNet stem .* --model.stem imagenet$"),
        ({"name": "vit_tiny_patch16_224", "stem": "small-pad2"}, r"no ResNet stem .* --model.stem imagenet$"),
        (
            {"name": "resnet-tiny", "stem": "smal"},
            r"unknown stem 'smal': .* imagenet, small, small-pad2, small-linear$",
        ),
        ({"name": "squeezenet1_0"}, r"SqueezeNet has no classifier known here"),
        ({"name": "shufflenet_v2_x0_5", "channels": 1}, r"without 1 channels here; use one of timm's$"),
        ({"name": "shufflenet_v2_x0_5", "pretrained": True}, r"without pretrained weights here; use one of timm's$"),
        ({"name": "resnet-tiny", "pretrained": True}, r"'resnet-tiny' has no pretrained weights"),
        ({"name": "vit-small-v3", "pretrained": True}, r"'vit-small-v3' has no pretrained weights"),
        ({"name": "vit-small-v3", "stem": "small"}, r"no ResNet stem .* --model.stem imagenet$"),
        ({"name": "vit-smal-v3"}, r"unknown backbone 'vit-smal-v3': .*vit-small-v3"),
        ({"name": "resnet18.nonsense"}, r"^timm cannot build .*'resnet18.nonsense' with 3 channels: Invalid .* tag"),
    ],
)
def test_backbones_that_cannot_be_had_are_refused_in_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_backbone(**arguments)
    assert "\n" not in str(caught.value)


def test_a_backbone_says_how_long_its_features_are() -> None:
    with pytest.raises(ValueError, match="backbone Flatten must have an integer `num_features`"):
        num_features(nn.Flatten())


# Initialisation


def test_convolutions_start_as_torchvisions_do() -> None:
    for name, conv in seeded_resnet18().named_modules():
        if isinstance(conv, nn.Conv2d):
            fan_out = conv.out_channels * conv.kernel_size[0] ** 2
            weight, expected = conv.weight, math.sqrt(2 / fan_out)
            assert weight.std().item() == pytest.approx(expected, rel=0.05), name
            assert weight.abs().max() > 3 * expected, name  # a normal distribution, not a uniform one


def test_the_replaced_first_convolution_starts_as_pytorchs_do() -> None:
    assert_uniform(seeded_resnet18(stem="small").conv1.weight, 1 / math.sqrt(27))


@pytest.mark.parametrize("zero_init_last", [False, True])
def test_blocks_start_as_the_identity_only_where_asked(zero_init_last: bool) -> None:
    for name, norm in seeded_resnet18(zero_init_last=zero_init_last).named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            last = name.endswith("bn2")  # of a basic block
            assert (norm.weight == (0 if zero_init_last and last else 1)).all(), name
            assert not norm.bias.any(), name


def test_heads_start_as_pytorchs_linear_layers_do() -> None:
    torch.manual_seed(0)
    heads = [linear_head(96, 128), mlp_head(96, 128, 64), mlp_bn_head(96, 128, 64), v3_mlp(96, 128, 64, num_layers=3)]
    layers = [m for head in heads for m in head.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 1 + 2 + 2 + 3
    for layer in layers:
        assert_uniform(layer.weight, 1 / math.sqrt(layer.in_features))
        if layer.bias is not None:
            assert_uniform(layer.bias, 1 / math.sqrt(layer.in_features))


# Heads


def shown(head: nn.Module) -> list[str]:
    """Each layer by its kind, sizes and what it lacks."""
    layers = head if isinstance(head, nn.Sequential) else [head]
    text = []
    for layer in layers:
        match layer:
            case nn.Linear():
                bias = "" if layer.bias is not None else " no bias"
                text.append(f"{layer.in_features}>{layer.out_features}{bias}")
            case nn.BatchNorm1d():
                text.append(f"norm {layer.num_features}" + ("" if layer.affine else " bare"))
            case _:
                text.append(type(layer).__name__)
    return text


def test_heads_are_those_of_the_papers() -> None:
    assert shown(linear_head(6, 2)) == ["6>2"]
    assert shown(mlp_head(6, 2, 4)) == ["6>4", "ReLU", "4>2"]
    assert shown(mlp_bn_head(6, 2, 4)) == ["6>4 no bias", "norm 4", "ReLU", "4>2"]
    two = ["6>4 no bias", "norm 4", "ReLU", "4>2 no bias"]
    assert shown(v3_mlp(6, 2, 4, num_layers=2)) == [*two, "norm 2 bare"]
    assert shown(v3_mlp(6, 2, 4, num_layers=2, last_norm=False)) == two
    assert shown(v3_mlp(6, 2, 4, num_layers=3)) == [*two[:3], "4>4 no bias", *two[1:], "norm 2 bare"]


# Encoders


def test_an_encoder_gives_projections_and_features() -> None:
    backbone, projector = nn.Flatten(), nn.Linear(12, 5)
    encoder, x = Encoder(backbone, projector), torch.rand(3, 3, 2, 2)
    torch.testing.assert_close(encoder.features(x), x.flatten(1))
    torch.testing.assert_close(encoder(x), projector(x.flatten(1)))  # as they are, not of unit length
    assert list(encoder.state_dict()) == ["projector.weight", "projector.bias"]


def image_encoder(*, channels: int = 3) -> ImageEncoder:
    mean, std = (0.5, 0.4, 0.3, 0.2)[:channels], (0.2, 0.1, 0.4, 0.3)[:channels]
    return ImageEncoder(
        build_backbone("resnet-tiny", stem="small", channels=channels),
        name="resnet-tiny",
        stem="small",
        channels=channels,
        mean=mean,
        std=std,
        input_size=8,
    ).eval()


def test_preprocess_brings_tensors_and_pictures_to_the_same_normalised_images() -> None:
    encoder = image_encoder()
    pixels = torch.randint(256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = (pixels / 255 - torch.tensor(encoder.mean).view(3, 1, 1)) / torch.tensor(encoder.std).view(3, 1, 1)
    torch.testing.assert_close(encoder.preprocess(pixels), expected, rtol=0, atol=1e-5)
    pictures = [Image.fromarray(each.movedim(0, 2).numpy()) for each in pixels]
    torch.testing.assert_close(encoder.preprocess(pictures), expected, rtol=0, atol=1e-5)
    wide = [Image.new("L", (31, 20)), Image.new("RGB", (9, 40))]
    assert encoder.preprocess(wide).shape == (2, 3, 8, 8)
    assert encoder(encoder.preprocess(wide)).shape == (2, encoder.num_features)


def test_preprocess_makes_pictures_grey_for_an_encoder_of_one_channel() -> None:
    encoder = image_encoder(channels=1)
    images = encoder.preprocess([Image.new("RGB", (8, 8), (255, 255, 255))])
    torch.testing.assert_close(images, torch.full((1, 1, 8, 8), (1 - 0.5) / 0.2))


def test_images_of_other_channels_than_the_encoders_are_refused_in_one_line() -> None:
    grey, many = image_encoder(channels=1), image_encoder(channels=4)
    with pytest.raises(ValueError, match="^images have 3 channels; expected the encoder's 1$"):
        grey.preprocess(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="^the encoder takes 4-channel images; pictures are read with 1 or 3: "):
        many.preprocess([Image.new("RGBA", (8, 8))])
    pixels = torch.zeros(1, 4, 8, 8, dtype=torch.uint8)
    assert many(many.preprocess(pixels)).shape == (1, many.num_features)


@pytest.mark.parametrize(("mean", "std"), [((0.5,) * 2, (0.5,) * 2), ((0.5,) * 3, (0.5,)), ((), ())])
def test_a_mean_for_other_channels_is_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(
        ValueError, match=f"mean has {len(mean)} values and std {len(std)}; expected 4, one per channel"
    ):
        ImageEncoder(nn.Flatten(), name="x", stem="small", channels=4, mean=mean, std=std, input_size=8)


def test_an_image_encoder_takes_images_of_any_size_and_describes_itself() -> None:
    encoder = image_encoder()
    for side in (8, 13):
        assert encoder(torch.rand(2, 3, side, side)).shape == (2, encoder.num_features)
    described = encoder.describe()
    assert described["backbone"] == "resnet-tiny"
    assert (described["input_size"], described["num_features"]) == (8, encoder.num_features)
    assert build_backbone(described["backbone"], stem=described["stem"], channels=described["channels"])
