import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import moco
from doubles import leave_out_pictures
from moco.config import DataConfig, fields, merge, parse_config
from moco.data import Splits, load_data
from moco.method.optim import key_momentum, learning_rate
from moco.recipes import load_recipe, recipe_names, recipe_record, recipe_text

LONGER = ("", "-400", "-800")
NOTEBOOK = ("cifar10", "cifar10-400", "cifar10-800", "cifar10-symmetric", "cifar10-symmetric-400")
NOTEBOOK += ("cifar10-symmetric-800", "cifar10-mindspore")
STATED = ("data.source", "data.size", "data.channels")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_states_everything_that_decides_its_result(name: str) -> None:
    data = yaml.safe_load(recipe_text(name))
    stated = {f"{top}.{inner}" for top, value in data.items() if isinstance(value, dict) for inner in value}
    stated |= {top for top, value in data.items() if not isinstance(value, dict)}
    owed = {field for field in fields() if not field.startswith(("data.", "engine."))} - {"recipe", "init_from"}
    assert not owed.union(STATED) - stated


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_parses_and_knows_its_name(name: str) -> None:
    assert load_recipe(name).recipe == name


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_headed_by_its_record(name: str) -> None:
    record = recipe_record(name)
    assert list(record) == ["about", "source", "expected", "cost"]
    assert all(record.values())
    assert re.search(r"\d %|not yet run here", record["expected"])
    assert all(len(line) <= 120 for line in recipe_text(name).splitlines())


def test_the_recipes_that_people_look_for_exist() -> None:
    wanted = {"digits", "cifar10-laptop", "cifar10-leftthomas", "cifar10-mindspore", "cifar100-mindspore"}
    wanted |= {f"cifar{n}{kind}{long}" for n in (10, 100) for kind in ("", "-symmetric") for long in LONGER}
    wanted |= {f"imagenet-{name}" for name in ("v1", "v2", "v2-800", "v3-r50-100", "v3-r50-300", "v3-r50-1000")}
    wanted |= {f"imagenet-v3-vit-{name}" for name in ("s", "b", "conv-s", "conv-b")}
    assert wanted == set(recipe_names())


def test_recipes_are_listed_by_name_and_length() -> None:
    names = recipe_names()
    assert names[:3] == ["cifar10", "cifar10-400", "cifar10-800"]
    long = [name for name in names if "-r50-" in name]
    assert long == ["imagenet-v3-r50-100", "imagenet-v3-r50-300", "imagenet-v3-r50-1000"]


@pytest.mark.parametrize("name", recipe_names())
def test_a_record_begins_with_what_fits_a_line(name: str) -> None:
    record = recipe_record(name)
    first = {key: text.partition(";")[0] for key, text in record.items()}
    assert all(len(text) <= 22 for text in first.values())
    assert re.fullmatch(rf"[\w/ -]+, {load_recipe(name).epochs} epochs", first["about"])
    assert first["expected"] in record["expected"] and re.fullmatch(
        r"(kNN|linear) \d\d\.\d %|not stated", first["expected"]
    )


def test_a_record_may_run_over_several_lines_and_hold_colons(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("# about: one: two\n#   three\n# expected: 9 %\n\n# cost: not in the header\nepochs: 3\n")
    assert recipe_record(str(path)) == {"about": "one: two three", "expected": "9 %"}


def test_cifar10_has_the_settings_of_the_official_notebook() -> None:
    config = load_recipe("cifar10")
    assert config.optim.base_lr * config.batch_size / 256 == pytest.approx(0.06)
    assert (config.epochs, config.batch_size, config.views.recipe, config.views.size) == (200, 512, "cifar", 32)
    model, optim = config.model, config.optim
    assert (model.variant, model.backbone, model.stem, model.symmetric) == ("v1", "resnet18", "small", False)
    assert (model.dim, model.queue_size, model.temperature, model.momentum) == (128, 4096, 0.1, 0.99)
    assert (model.batchnorm, model.bn_splits, model.mask_own) == ("split", 8, False)
    assert (optim.name, optim.momentum, optim.weight_decay) == ("sgd", 0.9, 5e-4)
    assert (optim.schedule, optim.per, optim.first_epoch, optim.warmup_epochs) == ("cosine", "epoch", 1, 0)
    assert (config.monitor.split, config.monitor.knn_k, config.monitor.knn_temperature) == ("test", 200, 0.1)


@pytest.mark.parametrize(
    ("name", "like", "changes"),
    [
        ("cifar10-400", "cifar10", {"epochs": 400}),
        ("cifar10-800", "cifar10", {"epochs": 800}),
        ("cifar10-symmetric", "cifar10", {"model": {"symmetric": True}}),
        ("cifar10-symmetric-400", "cifar10-symmetric", {"epochs": 400}),
        ("cifar10-symmetric-800", "cifar10-symmetric", {"epochs": 800}),
        ("cifar10-mindspore", "cifar10", {"optim": {"schedule": "step", "milestones": [120, 160]}}),
        *((name.replace("10", "100"), name, {"data": {"source": "cifar100"}}) for name in NOTEBOOK),
        ("imagenet-v2-800", "imagenet-v2", {"epochs": 800}),
        (
            "imagenet-v2",
            "imagenet-v1",
            {
                "views": {"recipe": "v2"},
                "model": {"variant": "v2", "temperature": 0.2},
                "optim": {"schedule": "cosine", "milestones": []},
            },
        ),
        ("imagenet-v3-r50-300", "imagenet-v3-r50-100", {"epochs": 300, "optim": {"base_lr": 0.3}}),
        (
            "imagenet-v3-r50-1000",
            "imagenet-v3-r50-300",
            {"epochs": 1000, "optim": {"weight_decay": 1.5e-6}, "model": {"momentum": 0.996}},
        ),
        (
            "imagenet-v3-vit-s",
            "imagenet-v3-r50-300",
            {
                "views": {"crop_min": 0.08},
                "model": {"backbone": "vit-small-v3", "temperature": 0.2},
                "optim": {"name": "adamw", "base_lr": 1.5e-4, "weight_decay": 0.1, "warmup_epochs": 40},
            },
        ),
        ("imagenet-v3-vit-b", "imagenet-v3-vit-s", {"model": {"backbone": "vit-base-v3"}}),
        ("imagenet-v3-vit-conv-s", "imagenet-v3-vit-s", {"model": {"backbone": "vit-conv-small-v3"}}),
        ("imagenet-v3-vit-conv-b", "imagenet-v3-vit-s", {"model": {"backbone": "vit-conv-base-v3"}}),
    ],
)
def test_recipes_of_a_family_differ_in_this_alone(name: str, like: str, changes: dict[str, Any]) -> None:
    assert load_recipe(name) == merge(load_recipe(like), {"recipe": name} | changes)


def test_imagenet_v1_has_the_settings_of_the_official_code() -> None:
    config = load_recipe("imagenet-v1")
    model, optim = config.model, config.optim
    assert (config.epochs, config.batch_size, config.views.size, config.views.crop_min) == (200, 256, 224, 0.2)
    assert (config.data.source, config.views.recipe, model.variant, model.symmetric) == ("imagenet", "v1", "v1", False)
    assert (model.backbone, model.stem, model.head, model.mask_own) == ("resnet50", "imagenet", "variant", False)
    assert (model.dim, model.queue_size, model.temperature) == (128, 65536, 0.07)
    assert (model.momentum, model.momentum_schedule) == (0.999, "constant")
    # On one device as many images share their statistics as on each of the eight that were published.
    assert (model.batchnorm, config.batch_size // model.bn_splits) == ("auto", 32)
    assert (optim.name, optim.momentum, optim.weight_decay, optim.base_lr) == ("sgd", 0.9, 1e-4, 0.03)
    assert (optim.schedule, optim.milestones, optim.per, optim.first_epoch) == ("step", (120, 160), "epoch", 0)


def test_v3_on_resnet50_has_the_settings_of_the_official_code() -> None:
    config = load_recipe("imagenet-v3-r50-100")
    model, optim = config.model, config.optim
    assert (config.epochs, config.batch_size, config.views.recipe, config.views.crop_min) == (100, 4096, "v3", 0.2)
    assert (model.variant, model.backbone, model.dim, model.hidden_dim) == ("v3", "resnet50", 256, 4096)
    assert (model.queue_size, model.temperature, model.batchnorm, model.symmetric) == (0, 1.0, "auto", True)
    assert (model.momentum, model.momentum_schedule) == (0.99, "cosine")
    assert (optim.name, optim.base_lr, optim.lr_scaling, optim.weight_decay) == ("lars", 0.6, "linear", 1e-6)
    assert (optim.momentum, optim.schedule, optim.per, optim.warmup_epochs) == (0.9, "cosine", "step", 10)


@pytest.mark.parametrize(
    ("name", "epoch", "lr", "momentum"),
    [
        ("cifar10", 0, 0.059996, 0.99),  # the notebook counts from 1: 0.03 (1 + cos(pi / 200))
        ("cifar10", 99, 0.03, 0.99),
        ("cifar10", 199, 0.0, 0.99),
        ("cifar100-symmetric-800", 399, 0.03, 0.99),
        ("cifar10-mindspore", 118, 0.06, 0.99),
        ("cifar10-mindspore", 119, 0.006, 0.99),
        ("cifar10-mindspore", 159, 0.0006, 0.99),
        ("cifar10-leftthomas", 499, 0.001, 0.999),
        ("imagenet-v1", 119, 0.03, 0.999),
        ("imagenet-v1", 120, 0.003, 0.999),
        ("imagenet-v1", 199, 0.0003, 0.999),
        ("imagenet-v2", 0, 0.03, 0.999),
        ("imagenet-v2", 100, 0.015, 0.999),
        ("imagenet-v2", 199, 1.850513e-6, 0.999),
        ("imagenet-v2-800", 400, 0.015, 0.999),
        ("imagenet-v3-r50-100", 5, 4.8, 0.99006156),
        ("imagenet-v3-r50-100", 10, 9.6, 0.99024472),
        ("imagenet-v3-r50-100", 55, 4.8, 0.99578217),
        ("imagenet-v3-r50-300", 155, 2.4, 0.99526168),
        ("imagenet-v3-r50-1000", 505, 2.4, 0.99803142),
        ("imagenet-v3-vit-s", 20, 1.2e-3, 0.99010926),
        ("imagenet-v3-vit-s", 40, 2.4e-3, 0.99043227),
        ("imagenet-v3-vit-b", 170, 1.2e-3, 0.99603956),
        ("imagenet-v3-vit-b", 300, 0.0, 1.0),
    ],
)
def test_rates_at_the_start_of_an_epoch_are_those_published(name: str, epoch: int, lr: float, momentum: float) -> None:
    config = load_recipe(name)
    per_epoch = {"cifar10": 50_000, "cifar100": 50_000, "imagenet": 1_281_167}[config.data.source] // config.batch_size
    step, total = epoch * per_epoch, config.epochs * per_epoch
    batch = {"steps_per_epoch": per_epoch, "epochs": config.epochs, "batch_size": config.batch_size}
    assert learning_rate(config.optim, step, **batch) == pytest.approx(lr, rel=1e-5, abs=1e-12)
    kept = key_momentum(config.model.momentum, config.model.momentum_schedule, step, total_steps=total)
    assert kept == pytest.approx(momentum, abs=1e-8)


def test_leftthomas_has_the_settings_of_its_repository() -> None:
    config = load_recipe("cifar10-leftthomas")
    model, optim = config.model, config.optim
    assert (config.epochs, config.batch_size, model.backbone, model.stem) == (500, 256, "resnet50", "small")
    assert (model.head, model.hidden_dim, model.dim, model.queue_size) == ("mlp_bn", 512, 128, 4096)
    assert (model.temperature, model.momentum, model.batchnorm) == (0.5, 0.999, "plain")
    assert (optim.name, optim.base_lr, optim.lr_scaling, optim.weight_decay) == ("adam", 1e-3, "none", 1e-6)
    assert (optim.schedule, config.views.recipe, config.monitor.knn_temperature) == ("constant", "cifar", 0.5)


def test_an_unknown_recipe_is_told_the_closest_and_all_others() -> None:
    with pytest.raises(
        ValueError, match=r"^no recipe 'digit'; did you mean digits\?; expected one of cifar10, "
    ) as caught:
        load_recipe("digit")
    assert all(name in str(caught.value) for name in recipe_names())


def test_a_path_to_no_file_is_said_to_be_one() -> None:
    with pytest.raises(FileNotFoundError, match=r"^no file mine\.yaml; expected"):
        load_recipe("mine.yaml")


def test_a_yaml_of_ones_own_takes_its_name_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 3\noptim:\n  base_lr: 1e-3\n")
    config = load_recipe(str(path))
    assert (config.recipe, config.epochs, config.optim.base_lr) == ("mine", 3, 0.001)


def test_a_recipe_printed_to_a_file_is_the_same_experiment(tmp_path: Path) -> None:
    path = tmp_path / "cifar10.yaml"
    path.write_text(recipe_text("cifar10"))
    assert load_recipe(str(path)) == load_recipe("cifar10")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"epochs: [1", r"bad\.yaml is not valid YAML: .*line 1"),
        (b"- epochs", r"bad\.yaml holds \['epochs'\]; expected lines such as"),
        (b"", r"bad\.yaml holds None; expected lines such as"),
        (b"\xff\xfe\x00", r"bad\.yaml is not text"),
        (b"epoch: 3", r"^epoch is not a setting; did you mean epochs\?.* \(in bad\.yaml\)$"),
        (b"optim:\n  base_lr: fast", r"^optim\.base_lr is 'fast'; expected a valid number \(in bad\.yaml\)$"),
        (b"!!python/object/apply:os.system ['exit 3']", r"bad\.yaml is not valid YAML"),
    ],
)
def test_a_bad_yaml_is_refused_in_one_line(content: bytes, line: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=line) as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)


def test_recipes_can_be_shortened_for_a_trial() -> None:
    for name in recipe_names():
        config = load_recipe(name)
        assert parse_config(config.model_dump() | {"steps": 2}).steps == 2


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in recipe_names() if name.endswith("-b")]


@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.endswith("-b")] + LARGE)
def test_a_recipe_trains_for_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own network and everything of its method, on few and small digits; only checkpoints are left out."""
    recipe = load_recipe(name)
    side = 8 if name == "digits" else 16 if recipe.model.stem == "small" else 32
    small = {
        "steps": 2,
        "batch_size": 4,
        "data": {"size": side},
        "views": {"size": side},
        "model": {
            "bn_splits": min(2, recipe.model.bn_splits),
            "queue_size": min(64, recipe.model.queue_size),
            "hidden_dim": recipe.model.hidden_dim and 256,
        },
        "monitor": {"log_every": 1, "every": 0},
        "engine": {"accelerator": "cpu", "precision": "fp32", "threads": 1},
    }

    def few(config: DataConfig) -> Splits:
        images = load_data(DataConfig(source="digits", channels=config.channels)).train
        return Splits(images.select(range(20)), images.select(range(20, 24)))

    for module, name_of, stand_in in (
        ("moco.training.pretrain", "load_data", few),
        # Gigabytes of a large transformer; what is in them is tested elsewhere.
        ("moco.storage.checkpoint", "save", lambda path, state: None),
        ("moco.storage.encoder_files", "save_encoder", lambda path, encoder: None),
    ):
        monkeypatch.setattr(importlib.import_module(module), name_of, stand_in)
    leave_out_pictures(monkeypatch)
    config = merge(recipe, small)
    run = moco.pretrain(config, out=tmp_path / "run")
    first, second = run.metrics
    assert (first["step"], second["step"]) == (1, 2) and first["loss"] != second["loss"]
    for step, row in enumerate((first, second)):
        lr = learning_rate(config.optim, step, steps_per_epoch=5, epochs=config.epochs, batch_size=4)
        assert row["lr"] == pytest.approx(lr)
        assert 0.1 < row["spread"] < 1.5 and 0 <= row["pretext_accuracy"] <= 100
    # A warm-up begins at 0.
    assert (first["lr"] > 0) == (recipe.optim.warmup_epochs == 0) and second["lr"] > 0
    if recipe.model.queue_size:
        assert second["queue_fill"] > first["queue_fill"]
    assert 0 <= run.results["trained encoder"]["knn_top1"] <= 100


def test_imagenet_is_read_from_where_it_was_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_imagenet(tmp_path / "imagenet", monkeypatch)
    splits = load_data(load_recipe("imagenet-v2").data)
    assert splits.test is not None and splits.test.labels is not None and splits.train.labels is not None
    assert (splits.train.labels.tolist(), splits.test.labels.tolist()) == ([0, 0, 1, 1], [0, 1])
    assert splits.train.classes == ("n01440764", "n01443537")


def write_imagenet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOCO_DATA", str(folder.parent))
    for part, count in (("train", 2), ("val", 1)):
        for number, name in enumerate(("n01440764", "n01443537")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                colour = (100 * number, 50 * index, 0)
                Image.new("RGB", (70 + index, 80), colour).save(folder / part / name / f"{index}.JPEG", "JPEG")


def test_without_imagenet_one_line_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_recipe("imagenet-v1").data
    monkeypatch.setenv("MOCO_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    where = re.escape(str(tmp_path / "imagenet" / "train"))
    with pytest.raises(
        ValueError, match=rf"^imagenet: no folder {where} nor .*home.*licence .* --data FOLDER$"
    ) as error:
        load_data(data)
    assert "\n" not in str(error.value)
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "ILSVRC2012_img_train.tar").touch()
    with pytest.raises(ValueError, match=r"ILSVRC2012_img_train\.tar' is not unpacked here: put train/ and val/ there"):
        load_data(data)


def test_validation_images_that_are_in_no_classes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "imagenet"
    write_imagenet(folder, monkeypatch)
    for path in sorted((folder / "val").rglob("*.JPEG")):  # as the archive of the 50,000 holds them
        path.rename(folder / "val" / f"{path.parent.name}.JPEG")
        path.parent.rmdir()
    with pytest.raises(
        ValueError, match=r"imagenet/val' has no class folders; .* --data .*imagenet/train'?, which needs"
    ):
        load_data(DataConfig(source="imagenet"))
