"""The command that trains a run's encoder again."""

import shlex
from collections.abc import Mapping
from typing import Any

from moco.config import PretrainConfig
from moco.data import DATASETS, GIVEN
from moco.recipes import load_recipe, recipe_names
from moco.storage.run import Run

MAX_FLAGS = 20
"""Most flags in a command; with more, the YAML file is used instead."""
ANY_IMAGES = "YOUR_IMAGES"
"""Replaces a path that exists only on the machine of the run."""


def command(run: Run) -> str:
    """Return the command that trains such an encoder anywhere: the recipe, and a flag for each setting that differs.

    If that would be too long, or the settings come from no recipe, the command uses them as config.yaml
    (`wants_settings`).
    """
    config, changed = run.config, changes(run.config) or {}
    if wants_settings(run):
        changed = {} if _anywhere(config.data.source) else {"data.source": (None, config.data.source)}
    flags = [
        f"--{name} {ANY_IMAGES if name == 'data.source' and not _anywhere(str(own)) else _flag(own)}"
        for name, (_, own) in changed.items()
    ]
    return " ".join(["moco pretrain", "config.yaml" if wants_settings(run) else config.recipe, *flags])


def wants_settings(run: Run) -> bool:
    """Whether `command` needs the run's settings as config.yaml."""
    changed = changes(run.config)
    return changed is None or len(changed) > MAX_FLAGS or any(own == [] for _, own in changed.values())


def exact_command(run: Run) -> str:
    """Return the command that repeats the run on this machine, with every machine-dependent choice as it was made."""
    return f"moco pretrain {shlex.quote(str(run.path.resolve() / 'config.yaml'))}"


def changes(config: PretrainConfig) -> dict[str, tuple[Any, Any]] | None:
    """Return settings that differ from the recipe's, as (recipe's value, own); None if from no known recipe.

    Choices that the recipe leaves to the machine do not count.
    """
    if config.recipe not in recipe_names():
        return None
    recipe, own = flat(load_recipe(config.recipe)), flat(config)
    left = {name for name, value in recipe.items() if name.startswith("engine.") and value in ("auto", None)}
    return {name: (recipe[name], own[name]) for name in own if name not in left and own[name] != recipe[name]}


def flat(config: PretrainConfig) -> dict[str, Any]:
    """All settings by dotted name, except for the recipe's name."""

    def walk(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in section.items():
            found |= walk(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return found

    return walk(config.model_dump(mode="json", exclude={"recipe"}), "")


def _anywhere(source: str) -> bool:
    """Whether this name refers to the same images on any machine."""
    return source in (*DATASETS, GIVEN) or source.startswith("hf:") or "://" in source


def _flag(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    return " ".join(shlex.quote(str(each)) for each in (value if isinstance(value, list) else [value]))
