import copy
import functools
import json
import pickle
import pickletools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
import yaml
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import moco
from moco.config import parse_config
from moco.export import EXPORTERS, Subject, Written, export
from moco.export.to_detectron2 import detectron2_name
from moco.method.backbones import build_backbone
from moco.method.encoder import ImageEncoder
from moco.method.variants import build_model
from moco.method.vit import VITS, vision_transformer
from moco.storage import checkpoint, encoder_files
from moco.storage.run import Run

RUNS_BACKBONE = "shufflenet_v2_x0_5"  # as small as one that ends in `fc` can be
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def build_encoder(name: str, *, stem: str = "imagenet", channels: int = 3, size: int = 64) -> ImageEncoder:
    """Untrained, but with batch norms that have seen images, so that none is the identity."""
    torch.manual_seed(0)
    backbone = build_backbone(name, stem=stem, channels=channels)
    with torch.no_grad():
        backbone(torch.rand(4, channels, size, size))
    encoder = ImageEncoder(backbone, name=name, stem=stem, channels=channels, mean=MEAN, std=STD, input_size=size)
    return encoder.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    return build_encoder("resnet18")


@pytest.fixture(scope="module")
def exported(encoder: ImageEncoder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same encoder in a format; made once."""
    folder = tmp_path_factory.mktemp("exports")
    return functools.cache(lambda form: export(encoder, folder / "deep" / form, format=form))


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """v3's transformers with one block."""
    for name, conv_stem in (("vit-small-v3", False), ("vit-conv-small-v3", True)):
        builder = functools.partial(vision_transformer, 384, depth=1, conv_stem=conv_stem)
        monkeypatch.setitem(VITS, name, lambda channels, builder=builder: builder(channels=channels))


@pytest.fixture
def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((120, 90), Image.Resampling.BICUBIC)


def batch(encoder: ImageEncoder, count: int = 2) -> Tensor:
    return torch.randn(
        count, encoder.channels, encoder.input_size, encoder.input_size, generator=torch.Generator().manual_seed(5)
    )


@torch.no_grad()
def assert_same_features(found: Any, encoder: ImageEncoder, images: Tensor) -> None:
    expected = encoder(images)
    assert torch.as_tensor(found).shape == expected.shape
    assert (torch.as_tensor(found) - expected).abs().max() <= 1e-4 * expected.abs().max()


def code_of_card(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def make_run(path: Path, variant: str = "v2", **model: Any) -> Run:
    """A run as pretrain leaves it, but for the training."""
    settings = {"variant": variant, "backbone": RUNS_BACKBONE, "dim": 8, "queue_size": 64} | model
    config = parse_config({"recipe": "custom", "batch_size": 32, "model": settings, "views": {"size": 64}})
    run = Run.create(path, config)
    torch.manual_seed(1)
    moco_model = build_model(config.model)
    for parameter in moco_model.key_encoder.parameters():
        parameter.data += 0.01
    if moco_model.queue is not None:
        moco_model.queue.pointer += 5
    checkpoint.save(run.last, {"step": 30, "model": moco_model.state_dict()})
    backbone: Any = moco_model.query_encoder.backbone
    encoder_files.save_encoder(
        run.path,
        ImageEncoder(backbone, name=RUNS_BACKBONE, stem="imagenet", channels=3, mean=MEAN, std=STD, input_size=64),
    )
    run.write_text("metrics.csv", "step,epoch\n10,0.9\n30,2.7\n40,3.6\n")
    return run


# What holds for every format


@pytest.mark.parametrize("form", EXPORTERS)
def test_the_code_of_the_card_gives_the_encoders_features_of_a_photo(
    form: str,
    encoder: ImageEncoder,
    exported: Callable[[str], Path],
    photo: Image.Image,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(exported(form))
    photo.save("photo.jpg", quality=95)
    preparation, loading = code_of_card(Path())
    names: dict[str, Any] = {}
    exec(preparation, names)
    with torch.no_grad():
        exec(loading, names)
    assert "import moco" not in loading
    with Image.open("photo.jpg") as opened:
        images = encoder.preprocess([opened])
    Path("photo.jpg").unlink()
    torch.testing.assert_close(names["images"], images, rtol=0, atol=1.01 / 255 / min(STD))
    assert_same_features(names["features"], encoder, names["images"])


@pytest.mark.parametrize(
    ("form", "file"),
    [("timm", ""), ("torchvision", "model.pth"), ("safetensors", ""), ("official", "checkpoint.pth.tar")],
)
def test_load_encoder_reads_back_what_was_exported(
    form: str, file: str, encoder: ImageEncoder, exported: Callable[[str], Path]
) -> None:
    loaded = moco.load_encoder(exported(form) / file)
    assert_same_features(loaded(batch(encoder)), encoder, batch(encoder))


@pytest.mark.parametrize("form", EXPORTERS)
def test_an_export_says_what_it_is_and_how_exactly_it_was_read_back(
    form: str, encoder: ImageEncoder, exported: Callable[[str], Path]
) -> None:
    out = exported(form)
    assert not list(out.parent.glob(".*"))
    record = json.loads((out / "export.json").read_text())
    assert record["format"] == form and record["encoder"] == encoder.describe()
    assert 0 <= record["largest_difference"] <= 1e-4 * record["largest_feature"]
    assert {file.name for file in out.iterdir()} == {*record["sha256"], "README.md", "export.json"}
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "other" and form in yaml.safe_load(front)["tags"]
    assert "resnet18" in text and str(out.parent) not in text


def test_the_encoder_that_was_exported_stays_as_it_was(tmp_path: Path) -> None:
    encoder = build_encoder("resnet18").double().train().requires_grad_(True)
    before = copy.deepcopy(encoder.state_dict())
    export(encoder, tmp_path / "out")
    assert encoder.training and all(parameter.requires_grad for parameter in encoder.parameters())
    torch.testing.assert_close(encoder.state_dict(), before, rtol=0, atol=0)


def test_an_unknown_format_is_answered_with_the_closest(encoder: ImageEncoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown format 'onx': .*timm, torchvision.*did you mean onnx\?"):
        export(encoder, tmp_path / "out", format="onx")


def test_a_folder_that_holds_something_is_left_alone(encoder: ImageEncoder, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        export(encoder, tmp_path)
    with pytest.raises(FileExistsError):
        export(encoder, tmp_path / "notes.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled(encoder: ImageEncoder, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (export(encoder, tmp_path / "out") / "model.safetensors").is_file()


def _other_weights(subject: Subject, folder: Path) -> Written:
    first = next(iter(subject.encoder.backbone.parameters()))
    (folder / "half").write_bytes(b"")
    with torch.no_grad():
        code = EXPORTERS["torchvision"](subject, folder)
        first += 0.01
    return code


def _damaged(subject: Subject, folder: Path) -> Written:
    written = EXPORTERS["timm"](subject, folder)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    return written


def _full(subject: Subject, folder: Path) -> Written:
    (folder / "half").write_bytes(b"")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("exporter", "message"),
    [(_other_weights, "differ from the encoder's by"), (_damaged, "does not load"), (_full, "No space left")],
)
def test_nothing_is_left_of_an_export_that_went_wrong(
    exporter: Callable[[Subject, Path], Written],
    message: str,
    encoder: ImageEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(EXPORTERS, "wrong", exporter)
    with pytest.raises((RuntimeError, OSError), match=message) as caught:
        export(encoder, tmp_path / "some" / "where", format="wrong")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_features_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    encoder = build_encoder("resnet-tiny", channels=1, size=8)
    next(encoder.parameters()).fill_(float("nan"))
    with pytest.raises(RuntimeError, match="differ"):
        export(encoder, tmp_path / "out", format="safetensors")
    assert not list(tmp_path.iterdir())


# timm


def test_timm_prepares_images_as_the_encoder_was_trained_and_not_as_its_own_weights_were(
    encoder: ImageEncoder, exported: Callable[[str], Path], photo: Image.Image
) -> None:
    model = timm.create_model(f"local-dir:{exported('timm')}", pretrained=True).eval()
    config = resolve_model_data_config(model, use_test_size=True)
    assert (tuple(config["mean"]), tuple(config["std"]), tuple(config["input_size"])) == (MEAN, STD, (3, 64, 64))
    transform: Any = create_transform(**config)
    torch.testing.assert_close(transform(photo), encoder.preprocess([photo])[0], rtol=0, atol=1.01 / 255 / min(STD))
    assert_same_features(model(batch(encoder)), encoder, batch(encoder))


def test_timm_puts_a_new_classifier_on_an_export(encoder: ImageEncoder, exported: Callable[[str], Path]) -> None:
    model: Any = timm.create_model(f"local-dir:{exported('timm')}", pretrained=True, num_classes=10).eval()
    assert model(batch(encoder)).shape == (2, 10)
    assert_same_features(model.forward_head(model.forward_features(batch(encoder)), True), encoder, batch(encoder))


def test_timm_takes_a_grey_encoder_with_one_mean(tmp_path: Path) -> None:
    encoder = build_encoder("resnet18", channels=1)
    model = timm.create_model(f"local-dir:{export(encoder, tmp_path / 'out')}", pretrained=True).eval()
    config = resolve_model_data_config(model)
    assert config["input_size"] == (1, 64, 64)
    assert list(config["mean"]) == pytest.approx([0.5]) and list(config["std"]) == pytest.approx([0.25])
    assert_same_features(model(batch(encoder)), encoder, batch(encoder))


def test_timm_is_told_the_twelve_heads_of_a_v3_transformer(tmp_path: Path) -> None:
    encoder = build_encoder("vit-small-v3", size=50)  # neither what its positions are for nor whole patches
    out = export(encoder, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "vit_small_patch16_224" and config["model_args"]["num_heads"] == 12
    model: Any = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert_same_features(model(batch(encoder)), encoder, batch(encoder))
    attention = model.blocks[0].attn
    attention.num_heads, attention.head_dim, attention.scale = 6, 64, 64**-0.5  # timm's own: fits, is another network
    with pytest.raises(AssertionError):
        assert_same_features(model(batch(encoder)), encoder, batch(encoder))


def test_every_folder_says_how_many_heads_a_transformer_has(shallow: None, tmp_path: Path) -> None:
    encoder, seen = build_encoder("vit-small-v3", size=32), {}
    for form in ("timm", "safetensors", "official"):
        out = export(encoder, tmp_path / form, format=form)
        assert json.loads((out / "export.json").read_text())["encoder"]["num_heads"] == 12
        assert "It has 12 attention heads" in (out / "README.md").read_text()
        seen[form] = out
    assert json.loads((seen["timm"] / "config.json").read_text())["model_args"]["num_heads"] == 12
    assert json.loads((seen["safetensors"] / "config.json").read_text())["num_heads"] == 12
    assert torch.load(seen["official"] / "checkpoint.pth.tar", weights_only=True)["num_heads"] == 12


def test_timm_is_told_the_heads_of_its_own_transformers_too(tmp_path: Path) -> None:
    out = export(build_encoder("vit_tiny_patch16_224", size=32), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["model_args"]["num_heads"] == 3


def test_timm_loads_a_transformer_of_windows_for_another_size_than_its_own(tmp_path: Path) -> None:
    encoder = build_encoder("swin_tiny_patch4_window7_224", size=64)
    model = timm.create_model(f"local-dir:{export(encoder, tmp_path / 'out')}", pretrained=True).eval()
    assert_same_features(model(batch(encoder)), encoder, batch(encoder))


def test_timm_refuses_what_it_cannot_describe_and_names_the_format_that_can(shallow: None, tmp_path: Path) -> None:
    for given in (
        build_encoder("resnet18", stem="small", size=16),
        build_encoder("resnet-tiny", size=8),
        build_encoder("vit-conv-small-v3", size=32),
        build_encoder("shufflenet_v2_x0_5"),
    ):
        with pytest.raises(ValueError, match="timm has no.*--format safetensors") as caught:
            export(given, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# torchvision and safetensors


def test_torchvision_loads_its_names_and_misses_the_classifier_only(
    encoder: ImageEncoder, exported: Callable[[str], Path]
) -> None:
    model = torchvision.models.resnet18()
    left = model.load_state_dict(torch.load(exported("torchvision") / "model.pth", weights_only=True), strict=False)
    assert left.missing_keys == ["fc.weight", "fc.bias"] and not left.unexpected_keys
    model.fc = nn.Identity()
    assert_same_features(model.eval()(batch(encoder)), encoder, batch(encoder))


@pytest.mark.parametrize(("stem", "channels"), [("small-linear", 3), ("small-pad2", 1), ("imagenet", 1)])
def test_another_stem_is_changed_in_torchvisions_network_by_what_the_card_says(
    stem: str, channels: int, tmp_path: Path
) -> None:
    encoder = build_encoder("resnet18", stem=stem, channels=channels, size=32)
    out = export(encoder, tmp_path / "out", format="torchvision")
    model = torchvision.models.resnet18()
    names: dict[str, Any] = {"model": model, "torch": torch}
    changes = [line for line in code_of_card(out)[1].splitlines() if re.match(r"model\.(conv1|relu|maxpool)", line)]
    assert len(changes) == {"small-linear": 3, "small-pad2": 2, "imagenet": 1}[stem]
    exec("\n".join(changes), names)
    model.load_state_dict(torch.load(out / "model.pth", weights_only=True), strict=False)
    model.fc = nn.Identity()
    assert_same_features(model.eval()(batch(encoder)), encoder, batch(encoder))


def test_a_network_of_torchvision_alone_is_exported_in_its_names(tmp_path: Path) -> None:
    encoder = build_encoder("mobilenet_v3_small")
    for form in ("torchvision", "safetensors"):
        export(encoder, tmp_path / form, format=form)


@pytest.mark.parametrize("name", ["vit-small-v3", "efficientnet_b0", "resnet-tiny", "resnet18d"])
def test_torchvision_refuses_networks_that_are_not_its_own(name: str, shallow: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torchvision.*--format safetensors"):
        export(build_encoder(name), tmp_path / "out", format="torchvision")


@pytest.mark.parametrize(
    ("name", "stem", "channels", "size"),
    [
        ("resnet-tiny", "small", 1, 8),
        ("resnet-mini", "small", 3, 32),
        ("resnet18", "small", 3, 16),
        ("resnet18", "small-linear", 3, 16),
        ("vit-small-v3", "imagenet", 3, 32),
        ("vit-conv-small-v3", "imagenet", 3, 32),
    ],
)
def test_safetensors_holds_every_encoder_and_its_card_loads_it_without_this_package(
    name: str, stem: str, channels: int, size: int, shallow: None, tmp_path: Path
) -> None:
    encoder = build_encoder(name, stem=stem, channels=channels, size=size)
    out = export(encoder, tmp_path / "out", format="safetensors")
    loaded = moco.load_encoder(out)
    assert loaded.describe() == encoder.describe()
    assert_same_features(loaded(batch(encoder)), encoder, batch(encoder))
    assert "import moco" not in code_of_card(out)[1] and "from moco" not in code_of_card(out)[1]


def test_a_backbone_of_ones_own_cannot_be_built_anew_by_anybody(tmp_path: Path) -> None:
    encoder = build_encoder("resnet18")
    encoder.name = "mine"
    with pytest.raises(ValueError, match="'mine' is in neither"):
        export(encoder, tmp_path / "out", format="safetensors")


# ONNX


def test_onnxruntime_takes_any_number_of_images(encoder: ImageEncoder, exported: Callable[[str], Path]) -> None:
    session = onnxruntime.InferenceSession(exported("onnx") / "model.onnx")
    for count in (1, 5):
        [features] = session.run(None, {"images": batch(encoder, count).numpy()})
        assert_same_features(features, encoder, batch(encoder, count))
    about = json.loads((exported("onnx") / "preprocessing.json").read_text())
    assert tuple(about["mean"]) == MEAN and about["layout"] == ["n", 3, 64, 64]


def test_a_vision_transformer_is_exported_to_onnx_without_a_word(
    shallow: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = export(build_encoder("vit-small-v3", size=50), tmp_path / "out", format="onnx")
    assert capfd.readouterr() == ("", "")
    assert json.loads((out / "preprocessing.json").read_text())["num_heads"] == 12


def test_onnx_without_its_extra_says_what_to_install(
    encoder: ImageEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'onnxscript.*pip install "moco-ssl\[onnx\]"'):
        export(encoder, tmp_path / "out", format="onnx")
    assert not list(tmp_path.iterdir())


# detectron2


def published_detectron2_name(name: str) -> str:
    """As the authors' conversion script has it, in the order of its replacements."""
    if "layer" not in name:
        name = "stem." + name
    for t in (1, 2, 3, 4):
        name = name.replace(f"layer{t}", f"res{t + 1}")
    for t in (1, 2, 3):
        name = name.replace(f"bn{t}", f"conv{t}.norm")
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def test_detectron2_finds_its_own_names(encoder: ImageEncoder, exported: Callable[[str], Path]) -> None:
    with (exported("detectron2") / "model.pkl").open("rb") as file:
        content = pickle.load(file)
    assert content["__author__"] == "MOCO" and content["matching_heuristics"] is True
    expected = {published_detectron2_name(n): t.numpy() for n, t in encoder.backbone.state_dict().items()}
    assert {"stem.conv1.norm.weight", "res3.0.shortcut.norm.bias", "res5.1.conv2.weight"} < expected.keys()
    assert content["model"].keys() == expected.keys()
    for name, array in content["model"].items():
        np.testing.assert_array_equal(array, expected[name])
        assert array.flags.writeable and array.dtype == expected[name].dtype


def test_names_of_a_deeper_resnet_are_those_of_the_authors_script() -> None:
    with torch.device("meta"):
        names = list(torchvision.models.resnet50().state_dict())
    assert [detectron2_name(name) for name in names] == [published_detectron2_name(name) for name in names]


def test_detectron2_is_told_the_kind_of_resnet_in_its_own_settings(exported: Callable[[str], Path]) -> None:
    [settings] = re.findall(r"```yaml\n(.*?)```", (exported("detectron2") / "README.md").read_text(), re.DOTALL)
    model = yaml.safe_load(settings)["MODEL"]
    assert model["RESNETS"]["DEPTH"] == 18 and model["RESNETS"]["RES2_OUT_CHANNELS"] == 64
    assert model["PIXEL_MEAN"] == pytest.approx([102, 127.5, 153])


def test_a_detectron2_file_names_nothing_that_old_numpy_lacks(exported: Callable[[str], Path]) -> None:
    data = (exported("detectron2") / "model.pkl").read_bytes()
    strings = {argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)}
    assert "ndarray" in strings and not any(each.startswith("numpy.") for each in strings)


def test_detectron2_refuses_what_it_has_no_backbone_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="7x7 stem"):
        export(build_encoder("resnet18", stem="small", size=16), tmp_path / "out", format="detectron2")
    with pytest.raises(ValueError, match="for ResNets"):
        export(build_encoder("mobilenet_v3_small"), tmp_path / "out", format="detectron2")


# The authors' layout


@pytest.mark.parametrize(("variant", "head"), [("v1", ["fc"]), ("v2", ["fc.0", "fc.2"])])
def test_official_holds_both_encoders_their_heads_and_the_queue_of_a_run(
    variant: str, head: list[str], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", variant)
    out = export(run.path, format="official")
    assert out == run.path / "exports" / "official"
    content = torch.load(out / "checkpoint.pth.tar", weights_only=True)
    assert content["arch"] == RUNS_BACKBONE and content["epoch"] == 2
    backbone = [name for name in torchvision.models.get_model(RUNS_BACKBONE).state_dict() if not name.startswith("fc")]
    names = backbone + [f"{layer}.{kind}" for layer in head for kind in ("weight", "bias")]
    both = {f"module.{encoder}.{name}" for encoder in ("encoder_q", "encoder_k") for name in names}
    assert content["state_dict"].keys() == both | {"module.queue", "module.queue_ptr"}
    ours = checkpoint.load(run.last)["model"]
    assert torch.equal(content["state_dict"]["module.queue"], ours["queue.keys"].T)
    assert content["state_dict"]["module.queue_ptr"].tolist() == [5]
    key = "key_encoder.projector.0.weight" if variant == "v2" else "key_encoder.projector.weight"
    assert torch.equal(content["state_dict"][f"module.encoder_k.{head[0]}.weight"], ours[key])


def test_official_of_v3_has_the_names_of_v3(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "v3", hidden_dim=16, queue_size=0)
    state = torch.load(export(run.path, format="official") / "checkpoint.pth.tar", weights_only=True)["state_dict"]
    rest = {name for name in state if re.search(r"\.fc\.|predictor", name) and not name.endswith("tracked")}
    norm = ["weight", "bias", "running_mean", "running_var"]
    head = ["0.weight", *(f"1.{each}" for each in norm), "3.weight", "4.running_mean", "4.running_var"]
    encoders = ("base_encoder", "momentum_encoder")
    expected = {f"module.{encoder}.fc.{each}" for encoder in encoders for each in head}
    assert rest == expected | {f"module.predictor.{each}" for each in head[:6]}


def test_the_official_linear_evaluation_finds_all_but_its_classifier(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    encoder = moco.load_encoder(run.path)
    content = torch.load(export(run.path, format="official") / "checkpoint.pth.tar", weights_only=True)
    model, state, prefix = torchvision.models.get_model(content["arch"]), content["state_dict"], "module.encoder_q."
    state = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix) and ".fc." not in n}
    assert model.load_state_dict(state, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    model.fc = nn.Identity()
    assert_same_features(model.eval()(batch(encoder)), encoder, batch(encoder))


def test_official_of_a_transformer_is_named_as_the_authors_name_it(shallow: None, tmp_path: Path) -> None:
    encoder = build_encoder("vit-conv-small-v3", size=32)
    content = torch.load(export(encoder, tmp_path / "out", format="official") / "checkpoint.pth.tar", weights_only=True)
    assert content["arch"] == "vit_conv_small"
    assert "module.base_encoder.blocks.0.attn.qkv.weight" in content["state_dict"]


@pytest.mark.parametrize("case", ["other step", "other head", "no checkpoint"])
def test_official_holds_the_backbone_only_where_the_rest_does_not_belong_to_it(case: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", head="mlp_bn" if case == "other head" else "variant")
    if case == "other step":
        state = checkpoint.load(run.last)
        state["model"]["query_encoder.backbone.conv1.0.weight"] += 1
        checkpoint.save(run.last, {"step": 31, "model": state["model"]})
    elif case == "no checkpoint":
        run.last.unlink()
    out = export(run.path, tmp_path / "out", format="official")
    state = torch.load(out / "checkpoint.pth.tar", weights_only=True)["state_dict"]
    assert state and all(name.startswith("module.encoder_q.") and ".fc." not in name for name in state)
    assert "only the backbone of the query encoder, because" in (out / "README.md").read_text()


# The card of a run


def test_the_card_of_a_run_tells_how_it_was_trained_and_how_good_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    run.write_json("results.json", {"trained encoder": {"knn_top1": 81.256}})
    run.write_json(
        "evaluations/linear.json", {"name": "linear", "data": "/home/me/birds", "figures": {"top1": 70.5, "odd": None}}
    )
    (run.path / "evaluations" / "broken.json").write_text("{")
    text = (export(run.path, tmp_path / "out", format="torchvision") / "README.md").read_text()
    assert r"# first: shufflenet\_v2" in text and "arXiv:2003.04297" in text
    assert r"| trained encoder, knn\_top1 |  | 81.26 |" in text
    assert "| linear, top1 | birds | 70.50 |" in text and "/home" not in text
    assert "| temperature | 0.2 |" in text and "| queue | 64 keys |" in text


def test_names_of_anybodys_stay_text_in_the_card(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x\n# <img src=q onerror=p()> [a](javascript:b)")
    nasty = "cat|dog\n## Heading <script>alert(1)</script> `code` [link](http://x) ---\n"
    run.write_json("evaluations/knn.json", {"name": nasty, "data": nasty, "figures": {nasty: 1.0}})
    _, front, text = (
        (export(run.path, tmp_path / "out", format="torchvision") / "README.md").read_text().split("---\n", 2)
    )
    assert yaml.safe_load(front)["license"] == "other"
    assert "<script" not in text and "<img" not in text and "\n## Heading" not in text
    assert not re.search(r"(?<!\\)\[(link|a\\?\])", text)
    row = next(line for line in text.splitlines() if "cat" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 4


def test_without_a_run_the_folder_has_to_be_named(encoder: ImageEncoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out is not given"):
        export(encoder)
    encoder_files.save_encoder(tmp_path / "bare", encoder)
    assert (export(tmp_path / "bare", tmp_path / "out") / "model.safetensors").is_file()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["conv1.weight"], encoder.backbone.get_parameter("conv1.weight"))
