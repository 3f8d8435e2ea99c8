"""A run as one page that opens anywhere: nothing is fetched, nothing is run, and every name is shown as text."""

import logging
import re
import shlex
import time
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from moco.config import to_yaml
from moco.explore.command import changes, command, exact_command, flat, wants_settings
from moco.explore.evaluated import Evaluated
from moco.explore.summary import TRAINED, Summary
from moco.figures import DARK, LIGHT, confusion_matrix, curve_panels, overlay, svg
from moco.figures.theme import colours
from moco.run import Run, write_atomically

TEMPLATES = Path(__file__).parent / "templates"
REFRESH = 30
"""Seconds after which the page of an unfinished run loads itself again."""
BETWEEN = 60.0
"""Seconds between two writings of it, at least."""


def report(run: Run | str | Path, out: str | Path | None = None) -> Path:
    """Writes what there is to see of a run as one HTML file.

    Args:
        run: or its folder; it need not have finished.
        out: the file; not given: report.html of the run.

    Returns:
        Where it is.

    Raises:
        FileNotFoundError: there is no run there.

    Example:
        >>> report("runs/first")                                                             # doctest: +SKIP
        PosixPath('runs/first/report.html')
    """
    opened = run if isinstance(run, Run) else Run.open(run)
    path = opened.path / "report.html" if out is None else Path(out)
    _write(path, page(opened))
    return path


def refresh(run: Run, *, between: float = BETWEEN, live: bool = True) -> bool:
    """The same by the process that trains: not again within `between` seconds, and never in training's way.

    What goes wrong is said in the log.

    Args:
        run: in training, finished or stopped.
        between: seconds since the file was last written; 0: at once.
        live: the page loads itself again until the run has finished; not so when training stops.

    Returns:
        Whether it was written.
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
    """Writes several runs side by side as one HTML file.

    Args:
        runs: or their folders, at least two.
        out: the file.

    Returns:
        Where it is.

    Raises:
        ValueError: fewer than two runs.
        FileNotFoundError: there is no run in one of the folders.
    """
    opened = [run if isinstance(run, Run) else Run.open(run) for run in runs]
    if len(opened) < 2:
        raise ValueError(f"{len(opened)} run was given; expected at least two to compare")
    _write(Path(out), comparison(opened))
    return Path(out)


def page(run: Run, *, live: bool = False) -> str:
    """The HTML of `report`; `live`: it is written anew as training goes on."""
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
    """The HTML of `compare`."""
    found = [Summary(run) for run in runs]
    names = _names([run.path for run in runs])
    settings = [flat(of.config) | {"recipe": of.config.recipe} for of in found]
    rows = {name: of.rows for name, of in zip(names, found, strict=True)}
    columns = list(dict.fromkeys(column for of in found for row in of.table for column in row))
    last = [{column: text for row in of.table for column, text in row.items() if text} for of in found]
    drawn = {"knn_top1": "kNN accuracy, %", "loss": "InfoNCE loss as a share of chance", "spread": "Spread of the keys"}
    drawn |= {"effective_rank": "Effective rank of the features"} if "effective_rank" in columns else {}
    # Queues of different length have different chance: the losses themselves say little beside each other.
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
    """The folders' names, with as much of what is above them as tells them apart; at last their numbers."""
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
    return _inline(figure, f"Confusion matrix of {of.name}: which classes are taken for which", f"confusion{number}")


def _inline(figure: Figure, label: str, name: str) -> Markup:
    """A figure for a place within the page; what is drawn in it was escaped when it was drawn."""
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
        .render(content | {"css": Markup(css), "version": _version(), "written": datetime.now().astimezone()})
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
    """Settings as the command line spells them, and names without what no page may hold.

    That is control characters, and the halves of letters that names of files can have.
    """
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not isinstance(value, Markup):
        return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", value)
    return value


def _version() -> str:
    try:
        return version("moco-ssl")
    except PackageNotFoundError:
        return ""


def _write(path: Path, html: str) -> None:
    content = html.encode()
    write_atomically(path, lambda file: file.write(content))
