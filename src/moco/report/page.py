"""A report on a run as one HTML page that fetches nothing, runs no scripts and shows every name as plain text."""

import logging
import re
import shlex
import time
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from moco.config import to_yaml
from moco.figures import DARK, LIGHT, confusion_matrix, curve_panels, overlay, svg
from moco.figures.theme import colours
from moco.files import write_atomically
from moco.packages import version_of
from moco.report.evaluations import Evaluated
from moco.report.rerun import changes, command, exact_command, flat, wants_settings
from moco.report.summary import TRAINED, Summary
from moco.storage.run import Run

TEMPLATES = Path(__file__).parent / "templates"
REFRESH = 30
"""Seconds after which the page of an unfinished run reloads."""
BETWEEN = 60.0
"""Least seconds between two updates of the file."""


def report(run: Run | str | Path, out: str | Path | None = None) -> Path:
    """Write a report on a run as one HTML file.

    Args:
        run: a run or its folder; it need not have finished.
        out: file to write; not given: report.html in the run's folder.

    Returns:
        Path of the file.

    Raises:
        FileNotFoundError: there is no run at `run`.

    Example:
        >>> report("runs/first")                                                             # doctest: +SKIP
        PosixPath('runs/first/report.html')
    """
    opened = run if isinstance(run, Run) else Run.open(run)
    path = opened.path / "report.html" if out is None else Path(out)
    _write(path, page(opened))
    return path


def refresh(run: Run, *, between: float = BETWEEN, live: bool = True) -> bool:
    """Update the report during training, at most every `between` seconds; never raises an error.

    Errors are logged.

    Args:
        run: a run in training, finished or stopped.
        between: least seconds since the file was last written; 0: update in any case.
        live: whether the page reloads until the run has finished; false when training stops.

    Returns:
        Whether the report was written.
    """
    path = run.path / "report.html"
    try:
        if between and path.is_file() and time.time() - path.stat().st_mtime < between:
            return False
        _write(path, page(run, live=live))
    except Exception as error:  # a page is not worth hours of training
        words = " ".join(str(error).split())
        logging.getLogger("moco").warning("report.html could not be written: %s: %s", type(error).__name__, words)
        return False
    return True


def compare(runs: Sequence[Run | str | Path], out: str | Path = "comparison.html") -> Path:
    """Write a comparison of several runs as one HTML file.

    Args:
        runs: at least two runs, or their folders.
        out: file to write.

    Returns:
        Path of the file.

    Raises:
        ValueError: fewer than two runs were given.
        FileNotFoundError: one of the folders holds no run.
    """
    opened = [run if isinstance(run, Run) else Run.open(run) for run in runs]
    if len(opened) < 2:
        raise ValueError(f"{len(opened)} run was given; give at least two to compare")
    _write(Path(out), comparison(opened))
    return Path(out)


def page(run: Run, *, live: bool = False) -> str:
    """Return the HTML of `report`; `live`: the page reloads until the run has finished."""
    of = Summary(run)
    chance, floor = of.loss_range
    panels = curve_panels(of.rows, chance=chance, floor=floor, baselines=of.baselines) if of.rows else {}
    drawn = [(each, _confusion(each, number)) for number, each in enumerate(of.evaluations)]
    pictures = of.pictures
    sections = [("what", "What"), ("result", "Result"), ("health", "Health")]
    sections += [("curves", "Curves")] if panels else []
    sections += [(picture.name, picture.heading) for picture in pictures]
    sections += [("numbers", "Numbers")] if of.table else []
    key = [(f"kNN, {who}", of.cell(who, "knn_top1")) for who in (TRAINED, *of.baselines)]
    changed = changes(run.config)
    return _rendered(
        "report.html.jinja",
        {
            "title": run.path.resolve().name,
            "refresh": REFRESH if live and not of.finished else None,
            "of": of,
            "key": [(name, cell) for name, cell in key if cell],
            "sections": [*sections, ("again", "Do it again")],
            "evaluations": [each for each in drawn if not each[0].of_health],
            "checkups": [each for each in drawn if each[0].of_health],
            "curves": [_inline(figure, name, f"curve{n}") for n, (name, figure) in enumerate(panels.items())],
            "pictures": pictures,
            "changed": {name: each for name, each in (changed or {}).items() if name != "data.source"},
            "command": command(run),
            "wants_settings": wants_settings(run),
            "exact_command": exact_command(run),
            "resume": f"moco pretrain --resume {shlex.quote(str(run.path.resolve()))}",
            "yaml": to_yaml(run.config),
            "environment": {name: _plain(words) for name, words in of.environment.items()},
        },
    )


def comparison(runs: Sequence[Run]) -> str:
    """Return the HTML of `compare`."""
    found = [Summary(run) for run in runs]
    names = _names([run.path for run in runs])
    settings = [flat(of.config) | {"recipe": of.config.recipe} for of in found]
    rows = {name: of.rows for name, of in zip(names, found, strict=True)}
    columns = list(dict.fromkeys(column for of in found for row in of.table for column in row))
    last = [{column: text for row in of.table for column, text in row.items() if text} for of in found]
    drawn = {"knn_top1": "kNN accuracy, %", "loss": "InfoNCE loss / chance", "spread": "Spread of the keys"}
    drawn |= {"effective_rank": "Effective rank of the features"} if "effective_rank" in columns else {}
    # Chance depends on the length of the queue, so the losses themselves cannot be compared.
    units = {"loss": {name: of.loss_range[0] for name, of in zip(names, found, strict=True)}}
    curves = [
        _inline(overlay(rows, column, title=title, unit=units.get(column)), title, column)
        for column, title in drawn.items()
    ]
    return _rendered(
        "compare.html.jinja",
        {
            "title": f"{len(runs)} runs side by side",
            "refresh": None,
            "runs": [(name, of, n % len(LIGHT.classes)) for n, (name, of) in enumerate(zip(names, found, strict=True))],
            "measures": {name: words for of in found for name, words in of.measures.items()},
            "settings": {
                name: [each[name] for each in settings]
                for name in settings[0]
                if any(each[name] != settings[0][name] for each in settings)
            },
            "curves": curves,
            "last": {column: [each.get(column, "") for each in last] for column in columns},
        },
    )


def _names(paths: list[Path]) -> list[str]:
    """Return the names of the folders, with as many parents as tell them apart, or else with a number."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(paths, start=1)]


def _confusion(of: Evaluated, number: int) -> Markup | None:
    if of.counts is None:
        return None
    figure = confusion_matrix(of.counts, list(of.per_class), title=of.name)
    return _inline(figure, f"Confusion matrix of {of.name}", f"confusion{number}")


def _inline(figure: Figure, label: str, name: str) -> Markup:
    """Return a figure to embed in the page; its text was escaped when it was drawn."""
    return Markup(svg(figure, name=name)).replace("<svg", Markup('<svg role="img" aria-label="{}"').format(label), 1)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items())
    return " ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _rendered(template: str, content: dict[str, Any]) -> str:
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    css += f":root {{ {colours(LIGHT)} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {colours(DARK)} }} }}\n"
    return (
        _environment()
        .get_template(template)
        .render(
            content
            | {"css": Markup(css), "version": version_of("moco-ssl") or "", "written": datetime.now().astimezone()}
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
    )


def _clean(value: Any) -> Any:
    """Spell settings as on the command line, and replace characters that are not allowed in a page.

    These are control characters, and lone surrogates, which file names can contain.
    """
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not isinstance(value, Markup):
        return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", value)
    return value


def _write(path: Path, html: str) -> None:
    content = html.encode()
    write_atomically(path, lambda file: file.write(content))
