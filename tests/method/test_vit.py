import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import moco
from moco.method.backbones import build_backbone
from moco.method.batchnorm import SyncBatchNorm
from moco.method.vit import VITS, positions, vision_transformer

PLAIN, CONV = ("vit-small-v3", "vit-base-v3"), ("vit-conv-small-v3", "vit-conv-base-v3")


def small(**changes: Any) -> Any:
    """One of few blocks."""
    torch.manual_seed(0)
    return vision_transformer(48, depth=2, **changes)


def on_paper(name: str) -> Any:
    with torch.device("meta"):
        return build_backbone(name)


def assert_uniform(weight: Tensor, bound: float) -> None:
    assert weight.abs().max() <= bound * (1 + 1e-6)
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def published_positions(width: int) -> Tensor:
    """Of a patch in row r and column c of 14 x 14: the sines and cosines of r, then of c, at width / 4 frequencies."""
    rows = []
    for r in range(14):
        for c in range(14):
            turns = [[x / 10_000 ** (i / (width // 4)) for i in range(width // 4)] for x in (r, c)]
            rows.append([f(x) for angles in turns for f in (math.sin, math.cos) for x in angles])
    return torch.tensor([[0.0] * width, *rows])


# Sizes and names


@pytest.mark.parametrize(
    ("name", "width", "depth", "parameters"),
    [
        ("vit-small-v3", 384, 12, 21_665_664),
        ("vit-base-v3", 768, 12, 85_798_656),
        ("vit-conv-small-v3", 384, 11, None),
        ("vit-conv-base-v3", 768, 11, None),
    ],
)
def test_the_transformers_have_the_published_sizes(name: str, width: int, depth: int, parameters: int | None) -> None:
    model = on_paper(name)
    stem = [width // 8, width // 4, width // 2, width]
    convolutions = sum(9 * a * b + 2 * b for a, b in zip([3, *stem], stem, strict=False)) + width * width + width
    block = 12 * width**2 + 13 * width
    counted = depth * block + (197 + 1 + 2) * width  # positions, class token, last norm
    counted += 3 * 16 * 16 * width + width if name in PLAIN else convolutions
    assert sum(p.numel() for p in model.parameters()) == counted
    assert parameters in (None, counted)
    assert (model.num_features, len(model.blocks)) == (width, depth)


@pytest.mark.parametrize("name", [*PLAIN, *CONV])
def test_there_are_twelve_heads_and_the_norms_are_those_of_the_paper(name: str) -> None:
    model = on_paper(name)
    assert all(block.attn.num_heads == 12 for block in model.blocks)
    assert all(m.eps == 1e-6 for m in model.modules() if isinstance(m, nn.LayerNorm))
    assert all(block.attn.qkv.bias is not None for block in model.blocks)
    assert model.blocks[0].mlp.fc1.out_features == 4 * model.num_features


def test_tensors_are_called_as_in_timm() -> None:
    with torch.device("meta"):
        theirs = timm.create_model("vit_small_patch16_224", num_classes=0)
    expected = {name: t.shape for name, t in theirs.state_dict().items()}
    assert {name: t.shape for name, t in on_paper("vit-small-v3").state_dict().items()} == expected


def test_the_convolutional_stem_stands_where_the_patch_projection_does() -> None:
    stem = on_paper("vit-conv-small-v3").patch_embed.proj
    shown = [
        (m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.bias is not None)
        for m in stem
        if isinstance(m, nn.Conv2d)
    ]
    assert shown == [
        (3, 48, 3, 2, False),
        (48, 96, 3, 2, False),
        (96, 192, 3, 2, False),
        (192, 384, 3, 2, False),
        (384, 384, 1, 1, True),
    ]
    assert [type(m) for m in stem][1:3] == [nn.BatchNorm2d, nn.ReLU] and len(stem) == 13


@pytest.mark.parametrize("official", ["vit_small", "vit_base", "vit_conv_small", "vit_conv_base"])
def test_the_official_names_are_known_and_not_timms(official: str) -> None:
    assert VITS[official] is VITS[official.replace("_", "-") + "-v3"]
    assert not timm.is_model(official)


# Start


def test_positions_are_sines_and_cosines_of_row_and_column() -> None:
    expected = published_positions(48)
    torch.testing.assert_close(small().pos_embed[0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(positions(14, 14, 48), expected[1:], rtol=0, atol=1e-6)


def test_positions_of_a_grid_are_row_by_row() -> None:
    of_patches = positions(2, 3, 8).view(2, 3, 8)
    assert (of_patches[0, :, :2] == 0).all() and (of_patches[:, 0, 4:6] == 0).all()  # sines of row 0 and of column 0
    torch.testing.assert_close(of_patches[1, 2, 0], torch.tensor(1.0).sin())
    torch.testing.assert_close(of_patches[1, 2, 4], torch.tensor(2.0).sin())


def test_weights_start_as_in_the_paper() -> None:
    model = small()
    for block in model.blocks:
        # Queries, keys and values have 48 outputs each.
        for layer, fans in ((block.attn.qkv, 96), (block.attn.proj, 96), (block.mlp.fc1, 240), (block.mlp.fc2, 240)):
            assert_uniform(layer.weight, math.sqrt(6 / fans))
            assert not layer.bias.any()
    assert_uniform(model.patch_embed.proj.weight, math.sqrt(6 / (3 * 16 * 16 + 48)))
    assert not model.patch_embed.proj.bias.any()
    assert 0 < model.cls_token.abs().max() < 1e-5
    assert_uniform(small(channels=1).patch_embed.proj.weight, math.sqrt(6 / (16 * 16 + 48)))


# What learns


def frozen(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def test_positions_and_patch_projection_do_not_learn_and_a_convolutional_stem_does() -> None:
    assert frozen(small()) == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert frozen(small(conv_stem=True)) == frozen(small(freeze_patches=False)) == {"pos_embed"}


@pytest.mark.parametrize("conv_stem", [False, True])
def test_training_moves_all_but_what_is_frozen(conv_stem: bool) -> None:
    model: Any = moco.create_model("v3", backbone=small(conv_stem=conv_stem), dim=8, hidden_dim=16, temperature=0.2)
    before = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01, weight_decay=0.1)
    random = torch.Generator().manual_seed(1)
    out = model(*torch.rand(2, 6, 3, 32, 32, generator=random))
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.update(out.keys, momentum=0.9)
    still = frozen(model.query_encoder.backbone)
    for encoder in ("query_encoder", "key_encoder"):
        old = dict(before.get_submodule(encoder).backbone.named_parameters())
        for name, p in model.get_submodule(encoder).backbone.named_parameters():
            assert torch.equal(p, old[name]) == (name in still), name


def test_the_stem_normalises_over_all_devices_as_the_heads_do() -> None:
    with torch.device("meta"):
        model: Any = moco.create_model("v3", backbone="vit-conv-small-v3")
    norms = [m for m in model.query_encoder.backbone.modules() if isinstance(m, nn.BatchNorm2d | SyncBatchNorm)]
    assert [type(m) for m in norms] == [SyncBatchNorm] * 4


# Images of other sizes


@pytest.mark.parametrize("conv_stem", [False, True])
@pytest.mark.parametrize(("height", "width"), [(224, 224), (32, 48), (37, 20), (8, 8)])
def test_features_are_the_normalised_class_token_at_any_size(conv_stem: bool, height: int, width: int) -> None:
    model = small(conv_stem=conv_stem).eval()
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = model(images)
    assert features.shape == (2, 48)
    torch.testing.assert_close(features.mean(dim=1), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(features.var(dim=1, correction=0), torch.ones(2), rtol=0, atol=1e-2)


def test_odd_sides_are_filled_up_with_the_mean_colour_on_the_right_and_below() -> None:
    model, images = small().eval(), torch.rand(1, 3, 37, 20)
    filled = nn.functional.pad(images, (0, 12, 0, 11))
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(filled))


def test_a_shifted_image_looks_different_for_its_positions() -> None:
    model = small().eval()
    images = torch.zeros(1, 3, 224, 224)
    images[:, :, :16, :16] = 1
    with torch.no_grad():
        model.cls_token.fill_(0.1)  # it hardly attends to anything at its start of 1e-6
        first, second = model(images), model(images.roll(16, dims=3))
    assert (first - second).abs().max() > 1e-5


def test_the_network_is_timms_on_the_same_weights() -> None:
    theirs: Any = timm.create_model(
        "vit_small_patch16_224", num_classes=0, embed_dim=48, depth=2, num_heads=12, dynamic_img_size=True
    ).eval()
    ours = small().eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))
        theirs.blocks[0].attn.num_heads, theirs.blocks[0].attn.head_dim = 6, 8  # what nothing in a checkpoint shows
        assert (ours(images) - theirs(images)).abs().max() > 1e-5
