import importlib
import inspect
import json
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from PIL import Image

import moco
from moco.config import DataConfig, fields, to_yaml
from moco.data import ArrayImages, FileImages, Splits
from moco.recipes import load_recipe
from moco.training.automatic import auto_config

NAMES = [
    "Embeddings", "KeyQueue", "LARS", "PretrainConfig", "Run", "SplitBatchNorm2d", "TwoViews", "create_model", "embed",
    "evaluate", "export", "info_nce", "knn", "linear", "load_encoder", "pack", "pretrain", "search",
]  # fmt: skip


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_instant_and_loads_no_torch():
    code = """
import json, sys, time
start = time.perf_counter()
import moco
seconds = time.perf_counter() - start
print(json.dumps([seconds, [name for name in ("torch", "numpy", "pydantic", "timm") if name in sys.modules]]))
"""
    measured = [json.loads(python(code)) for _ in range(3)]
    assert min(seconds for seconds, _ in measured) < 0.2
    assert all(loaded == [] for _, loaded in measured)


def test_dir_lists_the_public_names():
    assert set(NAMES) <= set(dir(moco)) and dir(moco) == sorted(moco.__all__)


@pytest.mark.parametrize("name", sorted(moco.__all__))
def test_every_public_name_is_there_and_documented(name):
    thing = getattr(moco, name)
    assert callable(thing) and not isinstance(thing, ModuleType)
    assert thing.__name__ == name and thing.__module__.startswith("moco.")
    assert inspect.getdoc(thing)


@pytest.mark.parametrize("name", ["evaluate", "export"])
def test_functions_stay_functions_after_the_rooms_of_their_names_are_imported(name):
    module = importlib.import_module(f"moco.{name}")
    assert isinstance(module, ModuleType) and module.__name__ == f"moco.{name}"
    assert inspect.isfunction(getattr(moco, name)) and getattr(moco, name) is getattr(module, name)


def test_names_and_files_can_both_be_imported_from_the_package():
    from moco import embed
    from moco.embeddings.table import Embeddings
    from moco.views import two_views

    assert inspect.isfunction(embed) and isinstance(two_views, ModuleType)
    assert Embeddings is moco.Embeddings and two_views.TwoViews is moco.TwoViews


def test_other_names_can_be_set_on_the_package_as_on_any(monkeypatch):
    monkeypatch.setattr(moco, "knn", len)
    assert moco.knn is len
    monkeypatch.undo()
    assert moco.knn is importlib.import_module("moco.evaluate").knn


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'moco' has no attribute 'embedd'"):
        moco.embedd  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'embedd'"):
        from moco import embedd  # noqa: F401


def images_of(number: int, side: int) -> Splits:
    pixels = torch.zeros(1, 3, side, side + 5, dtype=torch.uint8).expand(number, -1, -1, -1)
    return Splits(ArrayImages(pixels, None, None, ("",) * number), None)


def value_of(config: moco.PretrainConfig, name: str) -> object:
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
@pytest.mark.parametrize("side", [4, 8, 28, 32, 64, 65, 90, 96, 200, 224, 500])
def test_auto_settings_are_valid_and_each_choice_has_its_reason(side, accelerator, monkeypatch, tmp_path):
    monkeypatch.setattr("moco.training.automatic.choose_accelerator", lambda name: accelerator)
    for number in (16, 17, 31, 33, 100, 999, 5_000, 60_000, 1_300_000):
        given = images_of(number, side)
        config, reasons = auto_config(DataConfig(), given)
        told = [reason.partition(": ") for reason in reasons]
        names = [line.split()[0] for line, _, _ in told]
        assert names == ["--views.size", "--model.backbone", "--model.stem", "--views.recipe", "--batch_size",
                         "--model.queue_size", "--epochs"]  # fmt: skip
        for line, _, why in told:
            name, value = line.removeprefix("--").split()
            assert name in fields() and str(value_of(config, name)) == value and why
        small = side <= 64
        cpu = accelerator == "cpu"
        assert config.model.stem == ("small" if small or cpu else "imagenet")
        assert config.views.recipe == ("cifar" if small else "v2")
        assert max(side, 8) >= config.views.size > 0.65 * min(side, 48 if cpu and not small else 224 if not cpu else 64)
        assert config.batch_size <= number // 2 and config.batch_size <= 256
        assert 2 * config.batch_size <= config.model.queue_size <= max(number / 10, 2 * config.batch_size)
        assert config.batch_size / config.model.bn_splits >= 4 and 5 <= config.epochs <= 800
        (tmp_path / "auto.yaml").write_text(to_yaml(config))
        assert load_recipe(str(tmp_path / "auto.yaml")) == config


def test_auto_suits_the_machine(monkeypatch):
    sizes = {}
    for accelerator in ("cpu", "cuda"):
        monkeypatch.setattr("moco.training.automatic.choose_accelerator", lambda name, fixed=accelerator: fixed)
        sizes[accelerator] = [auto_config(DataConfig(), images_of(2000, side))[0] for side in (32, 224)]
    backbones = {name: [config.model.backbone for config in configs] for name, configs in sizes.items()}
    assert backbones == {"cpu": ["resnet-mini", "resnet-mini"], "cuda": ["resnet18", "resnet50"]}
    assert [config.views.size for config in sizes["cpu"]] == [32, 32]
    assert [config.views.size for config in sizes["cuda"]] == [32, 224]


def save_noise(path, size: tuple[int, int], seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    pixels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def test_auto_looks_into_a_folder_of_small_images(tmp_path, monkeypatch):
    monkeypatch.setattr("moco.training.automatic.choose_accelerator", lambda name: "cpu")
    for index in range(20):
        save_noise(tmp_path / f"{index}.png", (28, 32), index)
    config, reasons = auto_config(DataConfig(source=str(tmp_path), channels=1))
    assert config.data.source == str(tmp_path) and config.data.channels == 1
    assert (config.views.size, config.model.stem) == (24, "small")
    assert reasons[0].startswith("--views.size 24: the images have about 28 pixels")


def test_auto_takes_the_usual_size_of_photos_and_passes_over_broken_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("moco.training.automatic.choose_accelerator", lambda name: "cpu")
    for index in range(20):
        save_noise(tmp_path / f"{index:02}.png", (80, 130) if index % 3 else (400, 300), index)
    # Its header is whole, so that it is found out only when it is decoded.
    broken = tmp_path / "00.png"
    broken.write_bytes(broken.read_bytes()[:5000])
    config, reasons = auto_config(DataConfig(source=str(tmp_path)))
    assert (config.views.size, config.model.stem, config.model.backbone) == (32, "small", "resnet-mini")
    assert (
        reasons[0]
        == "--views.size 32: the images have about 80 pixels on their short side, and 32 suits this processor"
    )
    paths = tuple(str(broken) for _ in range(16))
    with pytest.raises(ValueError, match="none of the images sampled can be read, such as .*00.png"):
        auto_config(DataConfig(), Splits(FileImages(paths, None, None), None))


def test_auto_needs_sixteen_images():
    assert auto_config(DataConfig(), images_of(16, 32))[0].batch_size == 4
    with pytest.raises(ValueError, match="there are 15 images; expected at least 16"):
        auto_config(DataConfig(), images_of(15, 32))
