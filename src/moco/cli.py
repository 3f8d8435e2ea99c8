"""The command line: one thin typed function per verb; errors become one line and an exit code.

Heavy modules are imported inside the verbs, so that help and wrong flags answer at once.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, get_args

from cyclopts import App, Group, Parameter
from cyclopts.exceptions import CycloptsError, UnknownOptionError, UnusedCliTokensError
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moco import config as settings
from moco.config import PretrainConfig

Progress = tuple[int, int, int, dict[str, float]]
"""As `moco.pretrain.Progress`: step, steps in all, epoch, metrics."""
# What may differ when a run is continued: where and how often, never what is computed.
CONTINUABLE = ("steps", "data.source", "data.memory", "data.workers", "monitor.save_every", "engine.")
LINE_EVERY = 10.0  # seconds between progress lines where no bar can be drawn
SHOWN = (  # metric, how it is said
    ("loss", "loss {:.3f}"),
    ("lr", "lr {:.3g}"),
    ("pretext_accuracy", "pretext {:.1f} %"),
    ("knn_top1", "kNN {:.1f} %"),
    ("images_per_second", "{:,.0f} images/s"),
    ("data_wait", "waits {:.0f} % for data"),
)


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
        with _progress(_stderr()) as show:
            run = train(config, out=out, resume=resume, on_progress=show)
    except Stopped as stopped:
        name = signal.Signals(stopped.signum).name
        _say(f"moco: stopped by {name}; saved; continue with: moco pretrain --resume {quote(str(stopped.path))}")
        raise SystemExit(128 + stopped.signum) from None
    if as_json:
        print(json.dumps({"run": str(run.path), "results": run.results}, indent=2))
    else:
        _report(run.path, run.results)


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
        _print_table(
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
        _print_table("", ("recipe", "what it is, what to expect, what it costs, where it is from"), rows, lines=True)
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
        _print_table("", ("", "value", "note"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; not given: the process's own.

    Returns:
        0; 2 after a mistake in what was given; 1 after a failure; 128 + signal after a stop.
    """
    tokens = _spelled(list(sys.argv[1:] if arguments is None else arguments))
    with _heard():
        try:
            app(tokens, exit_on_error=False, print_error=False, verbose=False)
            sys.stdout.flush()
            return 0
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except KeyboardInterrupt:
            _say("moco: stopped by SIGINT")
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
    text = str(error)
    if isinstance(error.__cause__, ValidationError):
        error = error.__cause__
    if isinstance(error, ValidationError):
        text = settings.explain(error)
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
    _say(f"moco: {' '.join(text.split())}")
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
            _say(reason)
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
    fixed = [f"--{name}" for name in names if not name.startswith(CONTINUABLE)]
    if fixed:
        raise ValueError(f"{fixed[0]} was given with --resume; a run goes on with its own settings: start a new one")
    return settings.merge(Run.open(run).config, given)


@contextmanager
def _progress(console: Console) -> Generator[Callable[[Progress], None]]:
    """A bar on a terminal; elsewhere a line now and then."""
    if not console.is_terminal:
        yield _lines(console)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}", markup=False),
        console=console,
        expand=True,
    )

    def show(progress: Progress) -> None:
        step, total, epoch, metrics = progress
        if not bar.task_ids:
            # Made here, so that the steps before a resume do not count as speed.
            bar.add_task("", total=total, completed=step, epoch=epoch, said="")
        bar.update(bar.task_ids[0], completed=step, epoch=epoch, said=_said(metrics))

    with bar:
        yield show


def _lines(console: Console) -> Callable[[Progress], None]:
    began: tuple[float, int] | None = None
    last = -LINE_EVERY

    def show(progress: Progress) -> None:
        nonlocal began, last
        (step, total, epoch, metrics), now = progress, time.monotonic()
        began = began or (now, step)
        if now - last < LINE_EVERY and step < total:
            return
        last, done = now, step - began[1]
        left = f"{(now - began[0]) / done * (total - step):.0f} s left, " if done else ""
        _say(f"step {step}/{total}, epoch {epoch}, {left}{_said(metrics)}", console)

    return show


def _said(metrics: dict[str, float]) -> str:
    return ", ".join(form.format(metrics[name]) for name, form in SHOWN if name in metrics)


def _report(run: Path, results: dict[str, dict[str, float]]) -> None:
    """What came out, where it lies and what to try next."""
    console = _stdout()
    headings = {
        "knn_top1": "kNN, all labels",
        "one_label": "nearest, 1 label per class",
        "five_labels": "nearest, 5 labels per class",
    }
    columns = [name for name in headings if any(name in row for row in results.values())]
    if columns:
        rows = ((who, *(f"{row[name]:.1f}" if name in row else "" for name in columns)) for who, row in results.items())
        title = "Correct on images that were held out, in %"
        _print_table(title, ["seen through", *(headings[name] for name in columns)], rows)
        key = "one_label" if "one_label" in columns else "knn_top1"
        scores = [f"{row[key]:.1f} % {who}" for who, row in results.items() if key in row]
        labels = "one label per class" if key == "one_label" else "all labels"
        _say(f"With {labels}: {', '.join(scores)}.", console)
    else:
        _say("The images have no labels, so there is no accuracy to report; look at the curves.", console)
    _say(f"The run is in {run}: encoder, settings, metrics, curves.", console)
    where = quote(str(run))
    _say("Try next:", console)
    _say(f"  moco evaluate {where} --protocol knn", console)
    _say(f"  in Python: encoder = moco.load_encoder({str(run)!r})", console)
    _say("  moco pretrain --data FOLDER_OF_YOUR_IMAGES", console)


@contextmanager
def _heard() -> Generator[None]:
    """What the library says goes to stderr while a command runs."""
    logger, handler = logging.getLogger("moco"), _ToStderr()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


class _ToStderr(logging.Handler):
    """INFO plainly, WARNING and above in yellow, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        warned = record.levelno >= logging.WARNING
        _say(record.getMessage(), style="yellow" if warned else "")


@cache
def _stderr() -> Console:
    # One for all: what is said while a bar is drawn has to know of the bar.
    return Console(stderr=True, highlight=False)


def _stdout() -> Console:
    return Console(highlight=False)


def _say(text: str, console: Console | None = None, style: str = "") -> None:
    (console or _stderr()).print(Text(_clean(text), style=style), soft_wrap=True)


def _clean(text: str) -> str:
    """Without what a hostile file name could do to a terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def _print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], lines: bool = False) -> None:
    table = Table(title=title or None, title_justify="left", title_style="bold", show_lines=lines)
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(_clean(cell)) for cell in row))
    _stdout().print(table)


if __name__ == "__main__":
    sys.exit(main())
