import importlib
import re
from pathlib import Path

import pytest
import yaml

import moco
from moco.config import fields, load_recipe, merge, parse_config, recipe_names, recipe_record, recipe_text

STATED = ("data.source", "data.size", "data.channels")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_states_everything_that_decides_its_result(name: str) -> None:
    data = yaml.safe_load(recipe_text(name))
    stated = {f"{top}.{inner}" for top, value in data.items() if isinstance(value, dict) for inner in value}
    stated |= {top for top, value in data.items() if not isinstance(value, dict)}
    owed = {field for field in fields() if not field.startswith(("data.", "engine.")) and field != "recipe"}
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
    wanted = {"digits", "cifar10", "cifar10-symmetric", "cifar10-leftthomas", "cifar10-mindspore", "cifar10-laptop"}
    assert wanted <= set(recipe_names())


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


def test_the_symmetric_recipe_differs_in_the_loss_alone() -> None:
    symmetric = merge(load_recipe("cifar10"), {"recipe": "cifar10-symmetric", "model": {"symmetric": True}})
    assert load_recipe("cifar10-symmetric") == symmetric


def test_the_mindspore_recipe_differs_from_the_notebook_in_the_schedule_alone() -> None:
    stepped = {"recipe": "cifar10-mindspore", "optim": {"schedule": "step", "milestones": [120, 160]}}
    assert load_recipe("cifar10-mindspore") == merge(load_recipe("cifar10"), stepped)


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
        (b"epochs: [1", r"bad\.yaml is not YAML: .*line 1"),
        (b"- epochs", r"bad\.yaml holds \['epochs'\]; expected lines such as"),
        (b"", r"bad\.yaml holds None; expected lines such as"),
        (b"\xff\xfe\x00", r"bad\.yaml is not text"),
        (b"epoch: 3", r"^epoch is not a setting; did you mean epochs\?.* \(in bad\.yaml\)$"),
        (b"optim:\n  base_lr: fast", r"^optim\.base_lr is 'fast'; expected a valid number \(in bad\.yaml\)$"),
        (b"!!python/object/apply:os.system ['exit 3']", r"bad\.yaml is not YAML"),
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


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_trains_for_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything of its method, on digits, through a small network."""
    recipe = load_recipe(name)
    small = {
        "steps": 2,
        "batch_size": 16,
        "data": {"source": "digits", "size": 8},
        "views": {"size": 8},
        "model": {"backbone": "resnet-tiny", "bn_splits": 2, "queue_size": min(64, recipe.model.queue_size)},
        "monitor": {"log_every": 1},
        "engine": {"accelerator": "cpu", "precision": "fp32", "threads": 1},
    }
    module = importlib.import_module("moco.pretrain")
    monkeypatch.setattr(module, "draw_curves", lambda run: None)
    monkeypatch.setattr(module, "draw_neighbours", lambda run, monitor, images: None)
    run = moco.pretrain(merge(recipe, small), out=tmp_path / "run")
    first, second = run.metrics
    assert (first["step"], second["step"]) == (1, 2) and first["loss"] != second["loss"]
    # A warm-up begins at 0.
    assert (first["lr"] > 0) == (recipe.optim.warmup_epochs == 0) and second["lr"] > 0
    assert second["queue_fill"] > first["queue_fill"]
    assert run.results["trained encoder"]["knn_top1"] > 50
