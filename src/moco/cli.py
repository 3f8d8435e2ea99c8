"""The command line: one thin typed function per verb; errors become one line and an exit code.

Heavy modules are imported inside the verbs, so that help and wrong flags answer at once.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from cyclopts.exceptions import CycloptsError

from moco import config as settings
from moco.config import EvaluateConfig, PretrainConfig
from moco.console import heard, print_table, progress, report_evaluation, report_run, say, stderr, working
from moco.flags import explained, flags_of, spelled
from moco.recipes import load_recipe, recipe_names, recipe_record, recipe_text

# What may differ when a run is continued: where and how often, never what is computed.
CONTINUABLE = ("steps", "data.source", "data.workers", "monitor.save_every", "engine.accelerator", "engine.threads")


if TYPE_CHECKING:
    Flags = EvaluationFlags = dict[str, Any]
else:
    Flags, EvaluationFlags = flags_of(PretrainConfig), flags_of(EvaluateConfig)
Json = Annotated[bool, Parameter(name="--json", negative="")]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"moco {version('moco-ssl')}"
    except PackageNotFoundError:
        return "moco, not installed"


app = App(
    name="moco",
    help="Turns a pile of unlabelled images into an image encoder, and says how good it is.",
    help_epilogue="No idea where to start? `moco pretrain` trains on handwritten digits in about a minute.",
    version=_version,
    default_parameter=Parameter(name_transform=str, show_default=False, consume_multiple=True),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)


@app.command
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

    Without a recipe, `--data FOLDER` chooses every setting from the images and the machine and says why; with neither,
    it is handwritten digits. A flag overrules the recipe; `none` takes a setting back to "not given".

    Args:
        recipe: A name that `moco recipes` lists, or a YAML file.
        out: Folder of the run; it must not exist yet.
        resume: Folder of a run that was stopped or killed: continue it from its last checkpoint. Or, with a recipe, a
            training checkpoint of the official code.
        print_config: Print every setting in force as YAML, and train nothing.
        flags: Settings that overrule the recipe.
        as_json: Print the results as JSON.
    """
    given = flags or {}
    if resume and resume.is_file() and recipe is None:
        raise ValueError(f"{resume} does not hold the settings it was trained with; name the recipe too")
    continued = resume is not None and not resume.is_file()
    config = _resumed(resume, recipe, out, given) if resume and continued else _chosen(recipe, given)
    if print_config:
        print(settings.to_yaml(config), end="")
        return
    from moco.engine import Stopped
    from moco.pretrain import pretrain as train

    try:
        with progress(stderr()) as show:
            run = train(config, out=out, resume=resume, on_progress=show)
    except Stopped as stopped:
        name = signal.Signals(stopped.signum).name
        say(f"moco: stopped by {name}; saved; continue with: moco pretrain --resume {quote(str(stopped.path))}")
        raise SystemExit(128 + stopped.signum) from None
    if as_json:
        print(json.dumps({"run": str(run.path), "results": run.results}, indent=2))
    else:
        report_run(run.path, run.results)


@app.command
def evaluate(
    source: str,
    /,
    *,
    protocol: str = "knn",
    data: str | None = None,
    backbone: str | None = None,
    out: Path | None = None,
    as_json: Json = False,
    flags: Annotated[EvaluationFlags | None, Parameter(name="*")] = None,
) -> None:
    """Measure how good an encoder is.

    The figures, accuracies by class and a picture of what is taken for what go into `evaluations/` of the run.

    Args:
        source: Folder of a run, or a checkpoint of anybody's.
        protocol: `knn`, `linear`, `finetune`, or `health`, which needs no labels.
        data: Images to evaluate on; not given: those that the run was trained on.
        backbone: The network, where a foreign checkpoint does not say which it is.
        out: Folder for the results, in place of the run's.
        flags: Settings of the protocol.
        as_json: Print the results as JSON.
    """
    given = settings.parse_evaluation(dict(flags or {}))  # a wrong value is answered before torch is loaded
    from moco.evaluate import evaluate as measure

    with working(stderr()) as show:
        found = measure(source, protocol, data=data, backbone=backbone, out=out, settings=given, on_progress=show)
    if as_json:
        print(json.dumps({"figures": found.figures, "per_class": found.per_class, "notes": found.notes}, indent=2))
    else:
        written = found.folder / found.name if found.folder else None
        report_evaluation(f"{found.name} of {source}", found.figures, found.per_class, found.notes, written)


@app.command
def export(
    source: str,
    /,
    *,
    format: str = "timm",
    backbone: str | None = None,
    out: Path | None = None,
    as_json: Json = False,
) -> None:
    """Write an encoder as another program wants it; it is loaded there and compared before this says done.

    Args:
        source: Folder of a run, or a checkpoint of anybody's.
        format: `timm`, `torchvision`, `safetensors`, `onnx`, `detectron2` or `official`.
        backbone: The network, where a foreign checkpoint does not say which it is.
        out: Folder to write, which must not exist yet; not given: `exports/FORMAT` of the run.
        as_json: Print where it is as JSON.
    """
    if out is None and not (Path(source) / "config.yaml").is_file():
        raise ValueError(f"{source} is not the folder of a run; say with --out where to write the export")
    from moco.checkpoint import load_encoder
    from moco.export import export as write

    encoder = load_encoder(source, backbone=backbone) if backbone else source
    where = write(encoder, out or Path(source) / "exports" / format, format=format)
    if as_json:
        print(json.dumps({"folder": str(where)} | json.loads((where / "export.json").read_text()), indent=2))
    else:
        print(
            f"{where} holds the encoder for {format}; it gives the same features there. README.md says how to load it."
        )


@app.command
def report(runs: list[Path], /, *, out: Path | None = None, as_json: Json = False) -> None:
    """Write a run as one HTML page, or several side by side.

    Args:
        runs: Folders of runs.
        out: The file; not given: `report.html` of the run, or `comparison.html` here.
        as_json: Print where it is as JSON.
    """
    from moco.explore import report as pages

    path = pages.report(runs[0], out) if len(runs) == 1 else pages.compare(runs, out or "comparison.html")
    print(json.dumps({"report": str(path)}) if as_json else path)


@app.command
def recipes(name: str | None = None, /, *, as_json: Json = False) -> None:
    """List the recipes, or print one in full.

    Args:
        name: A recipe; its YAML is printed as written.
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
        # What a header says up to the first semicolon is short enough for a line.
        told = ("about", "expected", "cost", "source")
        rows = ([record["name"], *(record[key].partition(";")[0] for key in told)] for record in records)
        print_table("", ("recipe", "what it trains", "expected", "cost", "from"), rows)
        run = [record["name"] for record in records if "not yet run here" not in record["expected"]]
        print(f"Measured here: {', '.join(run)}. All others as published, not yet run here.")
        print("moco recipes NAME prints one in full; moco pretrain NAME trains it.")


@app.command
def doctor(recipe: str | None = None, /, *, as_json: Json = False) -> None:
    """Describe this machine, and what a recipe would need.

    Args:
        recipe: A name that `moco recipes` lists, or a YAML file.
        as_json: Print as JSON.
    """
    if recipe:
        load_recipe(recipe)  # a wrong name is answered before torch is loaded
    from moco.doctor import examine

    rows = examine(recipe)
    if as_json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
    else:
        print_table("", ("", "value", "note"), rows)


def _refused(error: Exception, code: int) -> int:
    if os.environ.get("MOCO_TRACEBACK") == "1":
        raise error
    say(f"moco: {explained(error)}")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; not given: the process's own.

    Returns:
        0; 2 after a mistake in what was given; 1 after a failure; 128 + signal after a stop.
    """
    # A core that waits for another spins for some microseconds, then gives way: without this, training beside other
    # programs stalls; without spinning it takes half as long again (results/LOG.md). Said before torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    tokens = spelled(list(sys.argv[1:] if arguments is None else arguments))
    with heard():
        try:
            app(tokens, exit_on_error=False, print_error=False, verbose=False)
            sys.stdout.flush()
            return 0
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except KeyboardInterrupt:
            say("moco: stopped by SIGINT")
            return 128 + signal.SIGINT
        except BrokenPipeError:
            # The reader has left (`moco recipes | head`): nothing more to say, at exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except (CycloptsError, ValueError, FileNotFoundError, FileExistsError) as error:
            return _refused(error, 2)
        except (OSError, RuntimeError, MemoryError, ImportError) as error:
            return _refused(error, 1)


def _chosen(recipe: str | None, given: dict[str, Any]) -> PretrainConfig:
    """The recipe, or what suits the images, with the given flags on top."""
    if recipe is None and "source" in given.get("data", {}):
        from moco.auto import auto_config

        config, reasons = auto_config(settings.parse_config({"data": given["data"]}).data)
        for reason in reasons:
            say(reason)
    else:
        config = load_recipe(recipe or "digits")
    return settings.merge(config, given)


def _resumed(run: Path, recipe: str | None, out: Path | None, given: dict[str, Any]) -> PretrainConfig:
    """The run's own settings; another machine may look for data and threads elsewhere."""
    from moco.run import Run

    if recipe or out:
        raise ValueError(f"--resume was given with {recipe or f'--out {out}'}; a run goes on as and where it began")
    names = [f"{top}.{name}" for top, inner in given.items() if isinstance(inner, dict) for name in inner]
    names += [top for top, inner in given.items() if not isinstance(inner, dict)]
    opened = Run.open(run)
    # To name the code again that a run names is to say that one trusts it.
    trusted = given.get("views", {}).get("recipe") == opened.config.views.recipe
    own = (*CONTINUABLE, "views.recipe") if trusted else CONTINUABLE
    fixed = [f"--{name}" for name in names if not name.startswith(own)]
    if fixed:
        raise ValueError(f"{fixed[0]} was given with --resume; a run goes on with its own settings: start a new one")
    if not trusted:
        opened.refuse_code()
    return settings.merge(opened.config, given)


if __name__ == "__main__":
    sys.exit(main())
