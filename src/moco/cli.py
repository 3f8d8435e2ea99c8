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
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, get_args

from cyclopts import App, Group, Parameter
from cyclopts.exceptions import CycloptsError, UnknownOptionError, UnusedCliTokensError
from pydantic import BaseModel, ValidationError

from moco import config as settings
from moco.config import PretrainConfig
from moco.console import heard, print_table, progress, report, say, stderr

# What may differ when a run is continued: where and how often, never what is computed.
CONTINUABLE = ("steps", "data.source", "data.workers", "monitor.save_every", "engine.accelerator", "engine.threads")


def _flags(section: type[BaseModel], prefix: str = "") -> Any:
    """The section as flags: the same names, types and help, and only those that are given are there.

    A TypedDict and no pydantic model: the parser would read pydantic's own source for help, half a second of it.
    """
    fields: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        dotted = prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            group = Group(f"{dotted}: {(field.annotation.__doc__ or '').rstrip('.')}", sort_key=len(fields))
            inner = _flags(field.annotation, f"{dotted}.")
            fields[name] = Annotated[inner, Parameter(group=group)]  # ty: ignore[invalid-type-form]
        elif dotted != "recipe":
            names = [f"--{dotted}", "--data"] if dotted == "data.source" else None
            fields[name] = Annotated[field.annotation, Parameter(name=names, help=field.description)]
    return TypedDict(section.__name__, fields, total=False)  # ty: ignore[invalid-argument-type]


if TYPE_CHECKING:
    Flags = dict[str, Any]
else:
    Flags = _flags(PretrainConfig)
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
        resume: Folder of a run that was stopped or killed: continue it from its last checkpoint.
        print_config: Print every setting in force as YAML, and train nothing.
        flags: Settings that overrule the recipe.
        as_json: Print the results as JSON.
    """
    given = flags or {}
    config = _resumed(resume, recipe, out, given) if resume else _chosen(recipe, given)
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
        report(run.path, run.results)


@app.command
def evaluate(
    run: Path,
    /,
    *,
    protocol: str = "knn",
    data: str | None = None,
    k: int | None = None,
    temperature: float | None = None,
    as_json: Json = False,
) -> None:
    """Measure how good a trained encoder is.

    Args:
        run: Folder of a run.
        protocol: `knn`: weighted vote of the nearest training images.
        data: Images to evaluate on, with labels; not given: those that the run was trained on.
        k: Neighbours that vote; not given: as in the run.
        temperature: A neighbour's vote is exp(similarity / temperature); not given: as in the run.
        as_json: Print the results as JSON.
    """
    from moco.evaluate import evaluate as measure

    results = measure(run, protocol, data=data, k=k, temperature=temperature)
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        print_table(
            f"{protocol} of {run}", ("measure", ""), ((name, f"{value:.2f}") for name, value in results.items())
        )


@app.command
def recipes(name: str | None = None, /, *, as_json: Json = False) -> None:
    """List the recipes, or print one in full.

    Args:
        name: A recipe; its YAML is printed as written.
        as_json: Print as JSON.
    """
    if name and not as_json:
        print(settings.recipe_text(name), end="")
        return
    records = [{"name": each, **settings.recipe_record(each)} for each in ([name] if name else settings.recipe_names())]
    if name:
        print(json.dumps(records[0] | {"config": settings.load_recipe(name).model_dump(mode="json")}, indent=2))
    elif as_json:
        print(json.dumps(records, indent=2))
    else:
        told = ("expected", "cost", "source")
        rows = (
            (record["name"], "\n".join([record["about"], *(f"{key}: {record[key]}" for key in told)]))
            for record in records
        )
        print_table("", ("recipe", "what it is, what to expect, what it costs, where it is from"), rows, lines=True)
        print("moco recipes NAME prints one in full; moco pretrain NAME trains it.")


@app.command
def doctor(recipe: str | None = None, /, *, as_json: Json = False) -> None:
    """Describe this machine, and what a recipe would need.

    Args:
        recipe: A name that `moco recipes` lists, or a YAML file.
        as_json: Print as JSON.
    """
    if recipe:
        settings.load_recipe(recipe)  # a wrong name is answered before torch is loaded
    from moco.doctor import examine

    rows = examine(recipe)
    if as_json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
    else:
        print_table("", ("", "value", "note"), rows)


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
    tokens = _spelled(list(sys.argv[1:] if arguments is None else arguments))
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


def _refused(error: BaseException, code: int) -> int:
    if os.environ.get("MOCO_TRACEBACK") == "1":
        raise error
    text, flag = str(error), ""
    if isinstance(error, CycloptsError) and isinstance(error.__cause__, ValidationError):
        # The parser has some values checked one by one: pydantic then does not know whose they are.
        flag = error.argument.name.lstrip("-") if error.argument and not error.__cause__.errors()[0]["loc"] else ""
        error = error.__cause__
    if isinstance(error, ValidationError):
        text = flag + settings.explain(error)
    elif isinstance(error, UnknownOptionError) and "." in (
        flag := (error.token.keyword or error.token.value)[2:].partition("=")[0]
    ):
        text = f"--{flag} is not a setting{settings.closest(flag, list(settings.fields())).replace('mean ', 'mean --')}"
    elif isinstance(error, UnusedCliTokensError):
        text = f"unexpected {' '.join(error.unused_tokens or ())}; `moco VERB --help` shows what a verb takes"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
    elif isinstance(error, RuntimeError | ImportError | MemoryError):
        text = f"{text or type(error).__name__} (MOCO_TRACEBACK=1 shows where)"
    say(f"moco: {' '.join(text.split())}")
    return code


def _spelled(tokens: list[str]) -> list[str]:
    """`pretrain`'s tokens as the parser wants them: `--data X`, hyphens for underscores, `--model.symmetric false`."""
    if tokens[:1] != ["pretrain"]:
        return tokens
    hints = {name: field.annotation for name, field in settings.fields().items()} | {"print_config": None}
    result: list[str] = []
    for token in tokens:
        last = result[-1][2:] if result and result[-1].startswith("--") else ""
        if token.lower() in ("true", "false", "none", "null") and bool in (hints.get(last), *get_args(hints.get(last))):
            result[-1] += "=" + token.lower().replace("none", "null")
            continue
        flag, equals, value = token.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        name = "data.source" if name == "data" else name
        result.append(f"--{name}{equals}{value}" if name in hints else token)
    return result


def _chosen(recipe: str | None, given: dict[str, Any]) -> PretrainConfig:
    """The recipe, or what suits the images, with the given flags on top."""
    if recipe is None and "source" in given.get("data", {}):
        from moco.auto import auto_config

        config, reasons = auto_config(settings.parse_config({"data": given["data"]}).data)
        for reason in reasons:
            say(reason)
    else:
        config = settings.load_recipe(recipe or "digits")
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
