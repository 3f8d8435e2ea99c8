"""Checkpoints in everybody's layouts, written here from real networks: features come out as from the network itself."""

import copy
import functools
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import moco
from moco.config import PretrainConfig, merge, parse_config
from moco.method.backbones import build_backbone
from moco.method.encoder import ImageEncoder
from moco.method.model import MoCo
from moco.method.variants import build_model
from moco.storage import checkpoint, encoder_files, foreign
from moco.storage.foreign.layouts import architecture
from moco.storage.run import Run

State = dict[str, Any]
# As each system states them: MoCo's CIFAR notebook and leftthomas, solo-learn, and the rest.
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR10_SOLO = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = {"cifar notebook", "leftthomas", "lightly's own ResNet", "lightly's own ResNet, in parts", "solo-learn, cifar"}


def network(*, stem: str = "imagenet", padding: int = 1) -> nn.Module:
    """torchvision's ResNet-18 after some imaginary training, its classifier still there."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    if stem == "small":
        model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=padding, bias=False)
        model.maxpool = nn.Identity()
    return seasoned(model)


def seasoned(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight, mean=1, std=0.2)
                nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    model.fc = nn.Identity()
    with torch.no_grad():
        return model(images)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def other(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the same shapes: an encoder to be confused with."""
    return {n: each + 1 if each.is_floating_point() else each for n, each in tensors.items()}


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each for name, each in tensors.items() if not name.startswith("fc.")}


def numbered(tensors: dict[str, Tensor], first: int, head: str = "") -> dict[str, Tensor]:
    """As children of an nn.Sequential, the stages from number `first` on."""
    numbers = {"conv1": "0", "bn1": "1", **{f"layer{stage}": str(first + stage - 1) for stage in range(1, 5)}}
    roots = {name: name.partition(".")[0] for name in tensors}
    return {(numbers | {"fc": head})[root] + name[len(root) :]: tensors[name] for name, root in roots.items()}


def mlp(features: int = 512, dim: int = 128) -> dict[str, Tensor]:
    head = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dim))
    return {name: tensor.detach() for name, tensor in head.state_dict().items()}


def official(tensors: dict[str, Tensor], *, variant: str = "v1") -> State:
    encoder = tensors if variant == "v1" else bare(tensors) | under("fc.", mlp())
    state = under("module.encoder_q.", encoder) | under("module.encoder_k.", other(encoder))
    state |= {"module.queue": torch.randn(128, 64), "module.queue_ptr": torch.tensor([32])}
    return {"epoch": 200, "arch": "resnet18", "state_dict": state}


def official_v3(tensors: dict[str, Tensor]) -> State:
    head = nn.Sequential(nn.Linear(512, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32, bias=False))
    head.append(nn.BatchNorm1d(32, affine=False))
    encoder = bare(tensors) | under("fc.", head.state_dict())
    state = under("module.momentum_encoder.", other(encoder)) | under("module.base_encoder.", encoder)
    return {"epoch": 100, "arch": "resnet50", "state_dict": state | {"module.predictor.0.weight": torch.ones(64, 32)}}


def notebook(tensors: dict[str, Tensor]) -> State:
    encoder = numbered(tensors, 3, head="9")
    state = under("encoder_q.net.", encoder) | under("encoder_k.net.", other(encoder))
    return {"epoch": 200, "state_dict": state | {"queue": torch.randn(128, 64), "queue_ptr": torch.zeros(1)}}


def leftthomas(tensors: dict[str, Tensor]) -> State:
    head = {"0.weight": torch.ones(512, 512), "1.weight": torch.ones(512), "3.weight": torch.ones(128, 512)}
    return under("f.", numbered(bare(tensors), 3)) | under("g.", head)


def lightly(tensors: dict[str, Tensor], *, children: bool = True) -> State:
    encoder = numbered(bare(tensors), 4) if children else bare(tensors)
    state = under("backbone.", encoder) | under("projection_head.layers.", mlp())
    state |= under("backbone_momentum.", other(encoder)) | {"criterion.memory_bank.bank": torch.ones(128, 64)}
    return {"epoch": 9, "global_step": 90, "pytorch-lightning_version": "2.6", "state_dict": state}


def shortcuts(tensors: dict[str, Tensor]) -> State:
    return {name.replace(".downsample.", ".shortcut.").replace("fc.", "linear."): t for name, t in tensors.items()}


class Configuration(dict):
    """Stands for omegaconf's, which a reader need not have."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Configuration, (), {"_content": {"dataset": "cifar10"}}


def solo(tensors: dict[str, Tensor]) -> State:
    state = under("momentum_backbone.", other(bare(tensors))) | under("backbone.", bare(tensors))
    state |= {"classifier.weight": torch.ones(10, 512)} | under("projector.", mlp()) | {"queue": torch.ones(2, 128, 64)}
    hyper = {"cfg": Configuration(method="mocov2plus")}
    return {"pytorch-lightning_version": "2.1.2", "state_dict": state, "hyper_parameters": hyper}


def lightly_train(tensors: dict[str, Tensor]) -> State:
    held = under("teacher_embedding_model.wrapped_model._features.", other(bare(tensors)))
    held |= under("student_embedding_model.wrapped_model._features.", bare(tensors))
    about = {"version": "0.18.0", "normalize_args": {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}}
    return {"state_dict": held, "lightly_train": about | {"models": {"model": Configuration()}}}


LAYOUTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "official v1": (official, "official MoCo v1 checkpoint"),
    "official v2": (lambda t: official(t, variant="v2"), "official MoCo v2 checkpoint"),
    "official v2, not distributed": (
        lambda t: {"state_dict": {n[7:]: each for n, each in official(t, variant="v2")["state_dict"].items()}},
        "official MoCo v2 checkpoint",
    ),
    "official v3": (official_v3, "official MoCo v3 checkpoint"),
    "official linear evaluation": (
        lambda t: {"state_dict": under("module.", t), "best_acc1": torch.tensor(67.5)},
        "state dict",
    ),
    "cifar notebook": (notebook, "checkpoint of the official CIFAR notebook"),
    "leftthomas": (leftthomas, "checkpoint of leftthomas/MoCo"),
    "lightly, in parts": (lightly, "checkpoint of lightly"),
    "lightly": (lambda t: lightly(t, children=False), "checkpoint of lightly"),
    "lightly's own ResNet": (lambda t: under("resnet.", shortcuts(t)), "state dict"),
    "lightly's own ResNet, in parts": (
        lambda t: {"state_dict": under("backbone.", numbered(shortcuts(bare(t)), 2))},
        "checkpoint of lightly",
    ),
    "solo-learn": (solo, "checkpoint of solo-learn"),
    "solo-learn, cifar": (solo, "checkpoint of solo-learn"),
    "LightlyTrain": (lightly_train, "checkpoint of LightlyTrain"),
    "DeiT's": (lambda t: {"model": t}, "state dict"),
    "torchvision": (lambda t: t, "state dict"),
    "DataParallel": (lambda t: under("module.", t), "state dict"),
}


def source_of(layout: str) -> nn.Module:
    model = network(stem="small" if layout in SMALL else "imagenet", padding=2 if layout == "solo-learn, cifar" else 1)
    if layout == "lightly's own ResNet, in parts":
        model.relu = nn.Identity()  # it is a function there, and lost when the children are put in a row
    return model


@pytest.fixture(scope="module")
def starting() -> Callable[[str], tuple[MoCo, PretrainConfig]]:
    """A model to be started from files, by its stem."""

    def made(stem: str) -> tuple[MoCo, PretrainConfig]:
        settings = {"backbone": "resnet18", "stem": stem, "dim": 8, "queue_size": 64}
        config = parse_config({"batch_size": 32, "model": settings})
        return build_model(config.model), config

    return functools.cache(made)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_are_those_of_the_network_in_the_file_and_a_run_starts_from_it(
    layout: str,
    starting: Callable[[str], tuple[MoCo, PretrainConfig]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write, system = LAYOUTS[layout]
    model = source_of(layout)
    torch.save(write(model.state_dict()), tmp_path / "theirs.pth")
    with caplog.at_level(logging.INFO, logger="moco"):
        encoder = moco.load_encoder(tmp_path / "theirs.pth")
    images = torch.randn(2, 3, 64 if encoder.stem == "imagenet" else 16, 64 if encoder.stem == "imagenet" else 16)
    torch.testing.assert_close(encoder(images), features_of(model, images), rtol=0, atol=1e-6)
    line = caplog.records[-1].getMessage()
    assert f"{system}: 120 of 120 tensors of resnet18 matched" in line
    small = layout in SMALL
    own = {
        "LightlyTrain": ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        "solo-learn, cifar": CIFAR10_SOLO,
        "lightly's own ResNet, in parts": IMAGENET,  # also in its benchmark of CIFAR-10
    }
    statistics = own.get(layout, CIFAR10 if small else IMAGENET)
    assert (encoder.mean, encoder.std, encoder.input_size) == (*statistics, 32 if small else 224)
    mean, std = (" ".join(f"{value:.4g}" for value in each) for each in statistics)
    assert line.endswith(f"mean {mean}, std {std}" + (" (assumed)" if layout != "LightlyTrain" else ""))
    assert encoder.name == "resnet18" and not encoder.training
    odd = {"solo-learn, cifar": "small-pad2", "lightly's own ResNet, in parts": "small-linear"}
    started, config = starting(odd.get(layout, "small" if small else "imagenet"))
    told = encoder_files.initialise(started, merge(config, {"init_from": str(tmp_path / "theirs.pth")}))
    assert told.startswith(f"starts from {tmp_path}/theirs.pth: {system}: 120 of 120 tensors of resnet18 matched")
    expected = bare(model.state_dict())
    for side in (started.query_encoder, started.key_encoder):
        assert all(torch.equal(each, expected[n]) for n, each in side.get_submodule("backbone").state_dict().items())


@pytest.mark.parametrize(("layout", "stem"), [("solo-learn, cifar", "small-pad2"), ("leftthomas", "small")])
def test_a_run_with_another_stem_is_told_which_the_file_has(
    layout: str, stem: str, starting: Callable[[str], tuple[MoCo, PretrainConfig]], tmp_path: Path
) -> None:
    model, config = starting("imagenet")
    torch.save(LAYOUTS[layout][0](source_of(layout).state_dict()), tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=f": give --model.stem {stem}, or start from another file$"):
        encoder_files.initialise(model, merge(config, {"init_from": str(tmp_path / "theirs.pth")}))


def test_our_own_checkpoint_keeps_the_odd_stem_it_was_trained_with(
    starting: Callable[[str], tuple[MoCo, PretrainConfig]], tmp_path: Path
) -> None:
    model, config = starting("small-pad2")
    held = {name: each for name, each in model.state_dict().items() if "key_encoder" not in name}
    checkpoint.save(tmp_path / "last.ckpt", {"model": held, "config": config.model_dump(mode="json")})
    encoder = moco.load_encoder(tmp_path / "last.ckpt")
    assert encoder.stem == "small-pad2" and encoder.backbone.get_submodule("conv1").padding == (2, 2)


@pytest.mark.parametrize("layout", ["solo-learn, cifar", "lightly's own ResNet, in parts", "cifar notebook"])
def test_an_encoder_with_an_odd_stem_is_saved_with_it(layout: str, tmp_path: Path) -> None:
    model = source_of(layout)
    torch.save(LAYOUTS[layout][0](model.state_dict()), tmp_path / "theirs.pth")
    encoder_files.save_encoder(tmp_path / "ours", moco.load_encoder(tmp_path / "theirs.pth"))
    images = torch.randn(2, 3, 16, 16)
    again = moco.load_encoder(tmp_path / "ours")
    torch.testing.assert_close(again(images), features_of(model, images), rtol=0, atol=1e-6)


def test_what_is_not_used_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(official(network().state_dict(), variant="v2"), tmp_path / "theirs.pth.tar")
    with caplog.at_level(logging.INFO, logger="moco"):
        moco.load_encoder(tmp_path / "theirs.pth.tar")
    assert caplog.records[-1].getMessage() == (
        f"{tmp_path}/theirs.pth.tar: official MoCo v2 checkpoint: 120 of 120 tensors of resnet18 matched under "
        "'state_dict.module.encoder_q.'; ignored: head (4), key encoder (124), queue (2); images of 224 pixels, mean "
        "0.485 0.456 0.406, std 0.229 0.224 0.225 (assumed)"
    )


def test_an_encoder_that_follows_another_is_taken_only_if_it_is_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    torch.save({"teacher": model.state_dict()}, tmp_path / "theirs.pth")
    with caplog.at_level(logging.INFO, logger="moco"):
        encoder = moco.load_encoder(tmp_path / "theirs.pth")
    assert "under 'teacher.'; it holds only a momentum encoder" in caplog.text
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder(images), features_of(model, images), rtol=0, atol=1e-6)


def test_files_from_before_batch_norm_counted_are_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    old = {name: each for name, each in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "theirs.pth", _use_new_zipfile_serialization=False)
    with caplog.at_level(logging.INFO, logger="moco"):
        encoder = moco.load_encoder(tmp_path / "theirs.pth")
    assert "100 of 120 tensors of resnet18 matched; 20 batch-norm counters missing, as in old files" in caplog.text
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder(images), features_of(model, images), rtol=0, atol=1e-6)


def test_statistics_of_split_batch_norms_are_averaged(tmp_path: Path) -> None:
    """As lightly keeps them: one after the other for each group, of which the mean is used in evaluation."""
    model = network(stem="small")
    state = dict(shortcuts(model.state_dict()))
    for name, each in state.items():
        if name.endswith(("running_mean", "running_var")):
            state[name] = torch.cat([each * factor for factor in (0.5, 1.5, 0.8, 1.2)])
    torch.save(under("backbone.", state), tmp_path / "theirs.pth")
    images = torch.randn(2, 3, 16, 16)
    encoder = moco.load_encoder(tmp_path / "theirs.pth")
    torch.testing.assert_close(encoder(images), features_of(model, images), rtol=0, atol=1e-5)


# Which network it is


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"]
    + ["resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"],
)
def test_a_resnet_is_known_by_its_shapes(name: str) -> None:
    with torch.device("meta"):
        assert architecture(torchvision.models.get_model(name).state_dict()) == name


@pytest.mark.parametrize("name", ["resnet-tiny", "resnet-mini", "vit-small-v3", "vit-conv-small-v3"])
def test_our_own_networks_are_known_by_their_shapes(name: str) -> None:
    assert architecture(build_backbone(name).state_dict()) == name


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_384"])
def test_a_vit_with_learned_positions_is_timms(name: str) -> None:
    assert architecture(timm.create_model(name).state_dict()) == name


def test_any_network_of_timm_is_read_by_its_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = seasoned(timm.create_model("mobilenetv3_small_050", num_classes=0))
    torch.save({"state_dict": under("net.", model.state_dict())}, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match="holds no known network; its first tensors are state_dict.net.c"):
        moco.load_encoder(tmp_path / "theirs.pth")
    encoder = moco.load_encoder(tmp_path / "theirs.pth", backbone="mobilenetv3_small_050")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder(images), model(images).detach(), rtol=0, atol=1e-6)


def test_the_channels_of_the_images_are_seen(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", in_chans=1, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    encoder = moco.load_encoder(tmp_path / "theirs.pth")
    assert encoder.channels == 1 and len(encoder.mean) == len(encoder.std) == 1
    assert encoder(torch.randn(2, 1, 64, 64)).shape == (2, 512)


def test_images_of_four_channels_are_the_users_own_to_prepare(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18", in_chans=4, num_classes=0).state_dict(), tmp_path / "theirs.pth")
    encoder = moco.load_encoder(tmp_path / "theirs.pth")
    assert encoder(torch.randn(2, 4, 64, 64)).shape == (2, 512) and len(encoder.mean) == len(encoder.std) == 4
    with pytest.raises(ValueError, match="^the encoder takes 4-channel images; pictures are read with 1 or 3: "):
        encoder.preprocess([Image.new("RGB", (8, 8))])
    model = {"backbone": "resnet18", "queue_size": 64, "dim": 8}
    config = parse_config({"batch_size": 32, "model": model, "init_from": str(tmp_path / "theirs.pth")})
    with pytest.raises(ValueError, match="for 4 channels; .*: give --data.channels 4, or start from another file$"):
        encoder_files.initialise(build_model(config.model), config)


# Vision transformers


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VisionTransformer]:
    """The official layout of v3's ViT-S, and the network: timm's modules with 12 heads."""
    torch.manual_seed(0)
    model = VisionTransformer(embed_dim=384, depth=12, num_heads=12, num_classes=0).eval()
    axis = torch.arange(14, dtype=torch.float64)[:, None] / 10000 ** (torch.arange(96, dtype=torch.float64) / 96)
    rows, columns = axis.repeat_interleave(14, 0), axis.repeat(14, 1)
    places = torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], 1).float()
    assert model.pos_embed is not None
    model.pos_embed.data = torch.cat([torch.zeros(1, 384), places])[None]
    encoder = model.state_dict() | {"head.0.weight": torch.ones(8, 384), "head.7.running_mean": torch.ones(8)}
    path = tmp_path_factory.mktemp("vit") / "vit-s-300ep.pth.tar"
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": under("module.base_encoder.", encoder)}, path)
    return path, model


def test_a_vit_of_v3_has_twelve_heads(vit: tuple[Path, VisionTransformer]) -> None:
    path, model = vit
    encoder, images = moco.load_encoder(path), torch.randn(1, 3, 224, 224)
    assert encoder.name == "vit-small-v3" and encoder.input_size == 224
    torch.testing.assert_close(encoder(images), model(images).detach(), rtol=0, atol=1e-5)


def test_a_vit_of_v3_is_refused_as_one_with_other_heads(vit: tuple[Path, VisionTransformer], tmp_path: Path) -> None:
    words = "is a ViT-S of MoCo v3: .*12 attention heads.*: give vit-small-v3 as the backbone$"
    with pytest.raises(ValueError, match=words):
        moco.load_encoder(vit[0], backbone="vit_small_patch16_224")


@pytest.fixture(scope="module")
def learned(vit: tuple[Path, VisionTransformer]) -> tuple[Path, VisionTransformer]:
    """The same network of 12 heads after positions have learned: as a ViT-S of 6 heads looks."""
    model = copy.deepcopy(vit[1])
    assert model.pos_embed is not None
    model.pos_embed.data += 0.1 * torch.randn(1, 197, 384)
    path = vit[0].with_name("tuned.pth")
    torch.save({"model": model.state_dict()}, path)
    return path, model


def test_a_vit_that_may_have_six_heads_or_twelve_is_not_guessed_at(learned: tuple[Path, VisionTransformer]) -> None:
    line = refusal(learned[0])
    assert "its tensors do not show its number of attention heads" in line
    assert "--backbone vit_small_patch16_224 for timm's or DeiT's with 6, --backbone vit-small-v3 for one of" in line
    assert line.endswith("with 12")


@pytest.mark.parametrize(("name", "heads"), [("vit_small", 12), ("vit_small_patch16_224", 6)])
def test_a_name_says_how_many_heads_and_that_is_remarked(
    name: str, heads: int, learned: tuple[Path, VisionTransformer], caplog: pytest.LogCaptureFixture
) -> None:
    path, model = learned
    with caplog.at_level(logging.INFO, logger="moco"):
        encoder = moco.load_encoder(path, backbone=name)
    assert f"; {heads} attention heads assumed, as in {name}; the tensors do not show them;" in caplog.text
    assert encoder.describe()["num_heads"] == heads
    images = torch.randn(1, 3, 224, 224)
    distance = (encoder(images) - model(images).detach()).abs().max()
    assert distance < 1e-5 if heads == 12 else distance > 1e-2


def test_the_network_of_a_recipe_is_no_evidence_of_how_many_heads_a_file_has(
    learned: tuple[Path, VisionTransformer],
) -> None:
    settings = parse_config(
        {"init_from": str(learned[0]), "model": {"variant": "v3", "backbone": "vit-small-v3", "queue_size": 0}}
    )
    core = moco.create_model("v3", backbone="vit-small-v3", dim=8, hidden_dim=16)
    with pytest.raises(ValueError, match="its tensors do not show .* attention heads .*save it with"):
        encoder_files.initialise(core, settings)


def test_a_card_or_the_file_says_how_many_heads(learned: tuple[Path, VisionTransformer], tmp_path: Path) -> None:
    path, model = learned
    for heads, name in ((12, "vit-small-v3"), (6, "vit_small_patch16_224")):
        found = foreign.recognise({"state_dict": model.state_dict(), "num_heads": heads}, path)
        assert found.backbone == name and not found.remarks
    save_file({name: each.contiguous() for name, each in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_args": {"num_heads": 12}}')
    assert moco.load_encoder(tmp_path).name == "vit-small-v3"
    line = refusal(tmp_path, backbone="vit_small_patch16_224")
    assert line.endswith("says it has 12 attention heads, but vit_small_patch16_224 has 6: give another --backbone")
    (tmp_path / "config.json").write_text('{"architecture": "vit_small_patch16_224"}')
    assert moco.load_encoder(tmp_path).name == "vit_small_patch16_224"


# Refusals


def refusal(path: Path, **given: Any) -> str:
    with pytest.raises(ValueError) as caught:
        moco.load_encoder(path, **given)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_a_file_with_part_of_a_network_is_refused(tmp_path: Path) -> None:
    path, state = tmp_path / "theirs.pth", network().state_dict()
    for name in ("layer2.0.conv1.weight", "layer4.1.bn2.running_var"):
        torch.save(under("module.", {n: each for n, each in state.items() if n != name}), path)
        assert re.search(f"is not a resnet18: it lacks 1 of 120 tensors, first '{name}'", refusal(path))
    torch.save(state | {"layer2.0.se.fc1.weight": torch.ones(1)}, path)
    assert (
        "is not a resnet18: it has 1 unexpected tensors, first 'layer2.0.se.fc1.weight'; name its network"
        in refusal(path)
    )
    torch.save(state | {"bn1.weight": torch.ones(3)}, path)
    assert "it has other shapes for 1 of 120 tensors, first 'bn1.weight'" in refusal(path)


def test_a_deeper_network_is_not_taken_for_a_shallower(tmp_path: Path) -> None:
    """ResNet-34 has every tensor of ResNet-18, in the same shapes."""
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "theirs.pth")
    line = refusal(tmp_path / "theirs.pth", backbone="resnet18")
    assert "is not a resnet18: it has " in line and line.endswith("'layer1.2.conv1.weight'; it looks like resnet34")


def test_a_file_without_a_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "theirs.pth"
    torch.save({"a.weight": torch.ones(3), "b": [torch.ones(2)]}, path)
    assert "holds no known network; its first tensors are a.weight: name" in refusal(path)
    assert "holds no resnet18; its first tensors are a.weight" in refusal(path, backbone="resnet18")
    torch.save([torch.ones(3)], path)
    assert "its first tensors are none" in refusal(path)


@pytest.mark.parametrize("name", ["antigravity:fly", "os:system", "hf-hub:someone/model", "local-dir:/tmp", "no-such"])
def test_a_network_is_built_by_known_names_only(name: str, tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=f"unknown backbone {name!r}"):
        moco.load_encoder(tmp_path / "theirs.pth", backbone=name)


def test_a_stem_that_may_be_either_is_refused(tmp_path: Path) -> None:
    state = under("backbone.", bare(network(stem="small").state_dict())) | {"classifier.weight": torch.ones(10, 512)}
    torch.save({"pytorch-lightning_version": "2", "state_dict": state}, tmp_path / "theirs.ckpt")
    assert "may come from solo-learn, whose 3x3 stem pads by 2" in refusal(tmp_path / "theirs.ckpt")


def test_dictionaries_that_share_each_other_do_not_take_for_ever(tmp_path: Path) -> None:
    """256 names for one dictionary of 256 names for one ...: 2^40 names, in a file of some kilobytes."""
    inner: Any = {"weight": torch.ones(1)}
    for _ in range(5):
        inner = {f"n{number}": inner for number in range(256)}
    torch.save(inner | {"x": torch.ones(1)}, tmp_path / "theirs.pth")
    start = time.perf_counter()
    assert "is not a checkpoint of a network: it has more than 100,000 names" in refusal(tmp_path / "theirs.pth")
    assert time.perf_counter() - start < 1
    torch.save({None: 1, "a" * 1001: torch.ones(1)}, tmp_path / "theirs.pth")
    assert "more than 1,000 characters in a name" in refusal(tmp_path / "theirs.pth")
    deep: Any = network().state_dict()
    for _ in range(200):
        deep = {"x": deep, "y": deep}
    torch.save(deep, tmp_path / "theirs.pth")
    assert "holds no known network" in refusal(tmp_path / "theirs.pth")


def test_reading_draws_no_random_numbers(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "theirs.pth")
    before = torch.get_rng_state()
    moco.load_encoder(tmp_path / "theirs.pth")
    assert torch.equal(torch.get_rng_state(), before)


# With a description beside the weights, and ours


def test_the_card_of_timm_tells_of_the_images(tmp_path: Path) -> None:
    model = network()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    images = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1], "input_size": [3, 96, 96]}
    (tmp_path / "config.json").write_text(f'{{"pretrained_cfg": {images}}}'.replace("'", '"'))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        encoder = moco.load_encoder(path)
        assert (encoder.mean, encoder.std, encoder.input_size) == ((0.5, 0.4, 0.3), (0.3, 0.2, 0.1), 96)
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"mean": "os:system", "std": [1], "input_size": 3}}')
    assert moco.load_encoder(tmp_path).mean == IMAGENET[0]


def test_a_card_with_another_number_of_heads_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_heads=12)
    save_file({name: each.contiguous() for name, each in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_args": {"num_heads": 12}}')
    assert "says it has 12 attention heads, but vit_tiny_patch16_224 has 3: give another" in refusal(tmp_path)


def test_our_own_files_are_read_one_by_one(tmp_path: Path) -> None:
    settings = {"backbone": "resnet-tiny", "stem": "small", "dim": 8, "queue_size": 64}
    config = parse_config({"batch_size": 32, "data": {"channels": 1}, "views": {"size": 8}, "model": settings})
    run = Run.create(tmp_path / "run", config)
    model = build_model(config.model, channels=1)
    seasoned(model.query_encoder)
    backbone = model.query_encoder.get_submodule("backbone")
    checkpoint.save(run.last, {"step": 1, "model": model.state_dict(), "config": config.model_dump(mode="json")})
    about: dict[str, Any] = {"name": "resnet-tiny", "stem": "small", "channels": 1, "input_size": 8}
    encoder_files.save_encoder(run.path, ImageEncoder(backbone, mean=(0.5,) * 3, std=(0.5,) * 3, **about))
    images = torch.randn(2, 1, 8, 8)
    expected = backbone.eval()(images).detach()
    for path in (run.path, run.last, run.path / "encoder.safetensors"):
        encoder = moco.load_encoder(path)
        torch.testing.assert_close(encoder(images), expected, rtol=0, atol=1e-6)
        assert encoder.describe() == moco.load_encoder(run.path).describe()


def test_our_checkpoint_does_not_name_code(tmp_path: Path) -> None:
    views = {"size": 8, "recipe": "antigravity:fly"}
    config = parse_config({"data": {"channels": 1}, "views": views, "model": {"backbone": "resnet-tiny"}})
    model = under("query_encoder.backbone.", build_backbone("resnet-tiny", channels=1).state_dict())
    checkpoint.save(tmp_path / "last.ckpt", {"model": model, "config": config.model_dump(mode="json")})
    assert "names code to import, views.recipe 'antigravity:fly'" in refusal(tmp_path / "last.ckpt")
