"""A run as one page that opens anywhere: nothing is fetched, nothing is run, and every name is shown as text."""

import logging
import re
import time
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from moco.config import to_yaml
from moco.explore.command import changes, command, exact_command, flat
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


def refresh(run: Run, *, between: float = BETWEEN) -> None:
    """The same while it is trained: not again within `between` seconds, and never in training's way.

    What goes wrong is said in the log.
    """
    path = run.path / "report.html"
    try:
        if not path.is_file() or time.time() - path.stat().st_mtime >= between:
            report(run)
    except Exception as error:  # a page is not worth hours of training
        logging.getLogger("moco").warning("report.html could not be written: %s", error)


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


def page(run: Run) -> str:
    """The HTML of `report`."""
    of = Summary(run)
    chance, floor = of.loss_range
    panels = curve_panels(of.rows, chance=chance, floor=floor, baselines=of.baselines) if of.rows else {}
    evaluations = [
        {"of": each, "svg": _confusion(each.counts, list(each.per_class), each.name, number)}
        for number, each in enumerate(of.evaluations)
    ]
    pictures = of.pictures
    sections = [("what", "What"), ("result", "Result"), ("health", "Health")]
    sections += [("curves", "Curves")] if panels else []
    sections += [(picture.name, picture.heading) for picture in pictures]
    sections += [("numbers", "Numbers")] if of.table else []
    key = [(f"kNN, {who}", of.cell(who, "knn_top1")) for who in (TRAINED, *of.baselines)]
    return _rendered(
        "report.html.jinja",
        {
            "title": run.path.resolve().name,
            "refresh": None if of.finished else REFRESH,
            "of": of,
            "key": [(name, cell) for name, cell in key if cell],
            "sections": [*sections, ("again", "Do it again")],
            "evaluations": evaluations,
            "curves": [_inline(figure, name, f"curve{n}") for n, (name, figure) in enumerate(panels.items())],
            "pictures": pictures,
            "changed": changes(run.config),
            "command": command(run),
            "exact_command": exact_command(run),
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
    drawn = {"knn_top1": "kNN accuracy, %", "loss": "InfoNCE loss", "spread": "Spread of the keys"}
    drawn |= {"effective_rank": "Effective rank of the features"} if "effective_rank" in columns else {}
    curves = [_inline(overlay(rows, column, title=title), title, column) for column, title in drawn.items()]
    hues = ("blue", "amber", "green", "orange", "sky", "purple", "yellow", "ink")  # as `Theme.classes` has them
    return _rendered(
        "compare.html.jinja",
        {
            "title": f"{len(runs)} runs side by side",
            "refresh": None if all(of.finished for of in found) else REFRESH,
            "runs": [(name, of, hues[n % len(hues)]) for n, (name, of) in enumerate(zip(names, found, strict=True))],
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


def _confusion(counts: list[list[int]] | None, classes: list[str], name: str, number: int) -> Markup | None:
    if counts is None or len(counts) < 2:
        return None
    figure = confusion_matrix(np.asarray(counts), classes, title=name)
    return _inline(figure, f"Confusion matrix of {name}: which classes are taken for which", f"confusion{number}")


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
    return _environment().get_template(template).render(content | {"css": Markup(css), "version": _version()})


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
