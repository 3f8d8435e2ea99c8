import re
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from moco.config import (
    DataConfig,
    EngineConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    PretrainConfig,
    ViewsConfig,
    fields,
    merge,
    parse_config,
    to_yaml,
)
from moco.recipes import load_recipe, recipe_names

SECTIONS = [DataConfig, ViewsConfig, ModelConfig, OptimConfig, MonitorConfig, EngineConfig, PretrainConfig]


def refusal(data: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        parse_config(data)
    text = str(caught.value)
    assert "\n" not in text
    assert "pydantic" not in text
    return text


def test_config_imports_without_torch() -> None:
    code = "import sys, moco.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_setting_has_help() -> None:
    silent = [name for name, field in fields().items() if not field.description]
    assert not silent


def test_the_number_of_settings_stays_small() -> None:
    assert len(fields()) <= 60


def test_defaults_are_themselves_valid() -> None:
    assert parse_config({}) == PretrainConfig()


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_are_frozen(section) -> None:
    name = next(iter(section.model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section(), name, None)


@pytest.mark.parametrize(
    ("data", "name", "closest"),
    [
        ({"optim": {"base_ler": 1}}, "optim.base_ler", "optim.base_lr"),
        ({"optim": {"lr": 1}}, "optim.lr", "optim.base_lr"),
        ({"base_lr": 1}, "base_lr", "optim.base_lr"),
        ({"batchsize": 1}, "batchsize", "batch_size"),
        ({"model": {"queue": 1}}, "model.queue", "model.queue_size"),
        ({"engine": {"num_threads": 1}}, "engine.num_threads", "engine.threads"),
    ],
)
def test_an_unknown_name_is_told_the_closest_one(data, name: str, closest: str) -> None:
    assert refusal(data).startswith(f"{name} is not a setting; did you mean {closest}?")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"epochs": 0}, "epochs is 0; expected greater than 0"),
        ({"epochs": "many"}, "epochs is 'many'; expected a valid integer"),
        ({"optim": {"base_lr": float("inf")}}, "optim.base_lr is inf; expected a finite number"),
        ({"optim": {"base_lr": float("nan")}}, "optim.base_lr is nan; expected a finite number"),
        ({"optim": {"milestones": [10, "x"]}}, "optim.milestones is 'x'; expected a valid integer"),
        (
            {"optim": {"schedule": "cosin"}},
            "optim.schedule is 'cosin'; expected 'cosine', 'step' or 'constant'; did you mean cosine?",
        ),
        ({"engine": {"devices": "two"}}, "engine.devices is 'two'; expected a valid integer or 'auto'"),
        (
            {"optim": 3},
            "optim is 3; expected a group of settings, such as optim.name, optim.base_lr, optim.lr_scaling",
        ),
        ({"data": {"channels": 0}}, "data.channels is 0; expected greater than 0"),
    ],
)
def test_a_wrong_value_is_one_line_with_name_given_and_expected(data, line: str) -> None:
    assert refusal(data) == line


def test_an_empty_source_is_refused_rather_than_read_as_the_current_folder() -> None:
    assert refusal({"data": {"source": ""}}).startswith("data.source is ''")


def test_a_long_wrong_value_is_cut() -> None:
    assert len(refusal({"epochs": "9" * 10_000 + "x"})) < 200


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"batch_size": 2048, "model": {"queue_size": 1024}},
            ["1024", "2048", "--model.queue_size", "--batch_size"],
        ),
        ({"batch_size": 600, "model": {"queue_size": 1024, "symmetric": True}}, ["1024", "1200", "symmetric"]),
        ({"model": {"variant": "v3", "queue_size": 1024}}, ["1024", "v3 has no queue", "--model.queue_size 0"]),
        ({"optim": {"schedule": "step", "milestones": []}}, ["--optim.milestones"]),
        ({"epochs": 10, "optim": {"warmup_epochs": 10}}, ["warmup_epochs is 10", "10 epochs"]),
        ({"batch_size": 8, "model": {"bn_splits": 8}}, ["bn_splits is 8", "8 images", "--model.bn_splits"]),
        (
            {"batch_size": 256, "optim": {"accumulate": 32}, "model": {"bn_splits": 8}},
            ["bn_splits is 8", "8 images"],
        ),
        ({"batch_size": 256, "optim": {"accumulate": 3}}, ["batch_size is 256", "multiple of 3"]),
        ({"batch_size": 256, "engine": {"devices": 3}}, ["batch_size is 256", "multiple of 3"]),
    ],
)
def test_settings_that_cannot_go_together_are_refused(data, words: list[str]) -> None:
    line = refusal(data)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "data",
    [
        {"batch_size": 1024, "model": {"queue_size": 1024}},
        {"batch_size": 512, "model": {"queue_size": 1024, "symmetric": True}},
        {"model": {"variant": "v3", "queue_size": 0}},
        {"batch_size": 8, "model": {"bn_splits": 4}},
        {"batch_size": 8, "model": {"batchnorm": "plain"}},
        {"batch_size": 8, "model": {"variant": "v3", "queue_size": 0}},
        {"batch_size": 64, "engine": {"devices": 8}},  # `auto` shuffles across devices and splits nothing
        {"optim": {"schedule": "step", "milestones": [120, 160]}},
    ],
)
def test_settings_at_the_edge_are_accepted(data) -> None:
    parse_config(data)


def test_the_model_itself_refuses_what_cannot_go_together() -> None:
    with pytest.raises(ValueError, match="v3 has no queue"):
        PretrainConfig(model=ModelConfig(variant="v3", queue_size=1024))


def test_sections_alone_are_not_checked_against_what_they_do_not_own() -> None:
    assert ModelConfig(variant="v3", queue_size=1024).queue_size == 1024


def test_merge_changes_only_what_is_given() -> None:
    base = load_recipe("cifar10")
    merged = merge(base, {"epochs": 5, "optim": {"base_lr": 0.5}, "data": {"source": "here"}})
    changed = {"epochs": 5, "optim": base.optim.model_copy(update={"base_lr": 0.5})}
    assert merged == base.model_copy(update=changed | {"data": base.data.model_copy(update={"source": "here"})})


def test_merge_checks_the_whole_and_not_the_parts() -> None:
    base = load_recipe("cifar10")
    to_v3 = {"model": {"variant": "v3", "queue_size": 0, "batchnorm": "sync"}}
    assert merge(base, to_v3).model.variant == "v3"
    with pytest.raises(ValueError, match="v3 has no queue"):
        merge(base, {"model": {"variant": "v3"}})


def test_merge_can_take_a_setting_back_to_not_given() -> None:
    assert merge(load_recipe("cifar10"), {"views": {"crop_min": None}}).views.crop_min is None


@pytest.mark.parametrize("name", recipe_names())
def test_yaml_of_a_configuration_is_complete_and_reads_back_equal(name: str, tmp_path) -> None:
    changed = {"optim": {"weight_decay": 1e-6, "clip_norm": 1e10}, "data": {"source": "Öl: #1 [x] 'y' 1e-3"}}
    config = merge(load_recipe(name), changed)
    text = to_yaml(config)
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert load_recipe(str(tmp_path / "config.yaml")) == config
    assert "#" not in re.sub(r"source:.*", "", text)
    assert all(re.search(rf"^ *{field.rpartition('.')[2]}:", text, re.MULTILINE) for field in fields())


@pytest.mark.parametrize("source", ["null", "123", "true", "1e5", "~", "- a", "a\nb", " x "])
def test_a_folder_may_have_a_name_that_yaml_takes_for_something_else(source: str, tmp_path) -> None:
    config = merge(load_recipe("digits"), {"data": {"source": source}})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_recipe(str(tmp_path / "config.yaml")).data.source == source
