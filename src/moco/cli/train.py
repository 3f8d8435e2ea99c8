"""Commands that train, list recipes and describe the machine."""

import json
import signal
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moco import config as settings
from moco.cli.console import print_table, progress, report_run, say, stderr
from moco.cli.flags import Json, flags_of
from moco.config import CONTINUABLE, PretrainConfig
from moco.parallel.launch import launched
from moco.recipes import load_recipe, recipe_names, recipe_record, recipe_text

if TYPE_CHECKING:
    Flags = dict[str, Any]
else:
    Flags = flags_of(PretrainConfig)


def pretrain(
    recipe: str | None = None,
    /,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    print_config: Annotated[bool, Parameter(negative="")] = False,
    as_json: Json = False,
    flags: Annotated[Flags | None, Parameter(name="*")] = None,
) -> None:
    """Train an encoder on unlabelled images.

    Without a recipe, `--data FOLDER` chooses every setting from the images and the machine, and says why. With neither,
    the recipe is `digits`, handwritten digits. Flags override the recipe; `none` resets a setting to "not given".

    Args:
        recipe: Name of a recipe (see `moco recipes`), or a YAML file.
        out: Folder of the run; it must not exist yet.
        resume: Folder of a run that was stopped or killed, to continue from its last checkpoint. If equal to `--out`,
            start the run when it does not exist, otherwise resume it. Or, with a recipe, a training checkpoint of the
            official code.
        print_config: Print every setting as YAML, and do not train.
        flags: Settings that override the recipe.
        as_json: Print the results as JSON.
    """
    overrides = flags or {}
    if resume and resume.is_file() and recipe is None:
        raise ValueError(f"{resume} does not hold the settings it was trained with; give a recipe, too")
    continued = resume is not None and not resume.is_file() and resume != out
    config = _resumed(resume, recipe, out, overrides) if resume and continued else _chosen(recipe, overrides)
    if print_config:
        print(settings.to_yaml(config), end="")
        return
    from moco.parallel.signals import Stopped
    from moco.training.pretrain import pretrain as train

    try:
        with progress(stderr()) as show:
            run = train(config, out=out, resume=resume, on_progress=show)
    except Stopped as stopped:
        name = signal.Signals(stopped.signum).name
        if launched().rank == 0:
            say(f"moco: stopped by {name}; saved; continue with: moco pretrain --resume {quote(str(stopped.path))}")
        raise SystemExit(128 + stopped.signum) from None
    if launched().rank != 0:
        return
    if as_json:
        print(json.dumps({"run": str(run.path), "results": run.results}, indent=2))
    else:
        report_run(run.path, run.results)


def recipes(name: str | None = None, /, *, as_json: Json = False) -> None:
    """List the recipes, or print one in full.

    Args:
        name: Name of a recipe whose YAML to print.
        as_json: Print as JSON.
    """
    if name and not as_json:
        print(recipe_text(name), end="")
        return
    records = [{"name": each, **recipe_record(each)} for each in ([name] if name else recipe_names())]
    if name:
        print(json.dumps(records[0] | {"config": load_recipe(name).model_dump(mode="json")}, indent=2))
    elif as_json:
        print(json.dumps(records, indent=2))
    else:
        # The header's text up to the first semicolon fits on a line.
        told = ("about", "expected", "cost", "source")
        rows = ([record["name"], *(record[key].partition(";")[0] for key in told)] for record in records)
        print_table("", ("recipe", "what it trains", "expected", "cost", "from"), rows)
        run = [record["name"] for record in records if "not yet run here" not in record["expected"]]
        print(f"Results of {' and '.join(run)} were measured by this project; all others are as published.")
        print("moco recipes NAME prints a recipe in full; moco pretrain NAME trains it.")


def doctor(recipe: str | None = None, /, *, as_json: Json = False) -> None:
    """Describe this machine, and what a recipe needs.

    Args:
        recipe: Name of a recipe (see `moco recipes`), or a YAML file.
        as_json: Print as JSON.
    """
    if recipe:
        load_recipe(recipe)  # reports a wrong name before torch is loaded
    from moco.doctor import examine

    rows = examine(recipe)
    if as_json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
    else:
        print_table("", ("", "value", "note"), rows)


def _chosen(recipe: str | None, overrides: dict[str, Any]) -> PretrainConfig:
    """Return the recipe, or settings chosen from the images, overridden by the flags."""
    if recipe is None and "source" in overrides.get("data", {}):
        from moco.training.automatic import auto_config

        config, reasons = auto_config(settings.parse_config({"data": overrides["data"]}).data)
        for reason in reasons if launched().rank == 0 else ():
            say(reason)
    else:
        config = load_recipe(recipe or "digits")
    return settings.merge(config, overrides)


def _resumed(run: Path, recipe: str | None, out: Path | None, overrides: dict[str, Any]) -> PretrainConfig:
    """Return the run's own settings; only those in CONTINUABLE may be given again."""
    from moco.storage.run import Run

    if recipe or out:
        raise ValueError(f"--resume was given with {recipe or f'--out {out}'}; a run keeps its own: leave it out")
    names = [f"{top}.{name}" for top, inner in overrides.items() if isinstance(inner, dict) for name in inner]
    names += [top for top, inner in overrides.items() if not isinstance(inner, dict)]
    opened = Run.open(run)
    # Naming the code of a run again on the command line means trusting it.
    trusted = overrides.get("views", {}).get("recipe") == opened.config.views.recipe
    own = (*CONTINUABLE, "views.recipe") if trusted else CONTINUABLE
    fixed = [f"--{name}" for name in names if name not in own]
    if fixed:
        raise ValueError(f"{fixed[0]} was given with --resume; a run keeps its settings: leave it out, or start anew")
    if not trusted:
        opened.refuse_code()
    return settings.merge(opened.config, overrides)
