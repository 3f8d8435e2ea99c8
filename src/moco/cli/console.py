"""Terminal output: progress bars, lines, tables."""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moco.parallel.launch import launched

if TYPE_CHECKING:
    from rich.progress import TaskID


Progress = tuple[int, int, int, dict[str, float]]
"""As `moco.training.loop.Progress`: step, total steps, epoch, metrics."""
MAX_CLASSES = 20
"""Accuracies per class are all printed up to this number of classes; beyond it, only the lowest."""
LINE_EVERY = 10.0  # seconds between progress lines where no bar can be drawn
PROGRESS_METRICS = (  # metric, format
    ("loss", "loss {:.3f}"),
    ("lr", "lr {:.3g}"),
    ("pretext_accuracy", "pretext {:.1f} %"),
    ("knn_top1", "kNN {:.1f} %"),
    ("images_per_second", "{:,.0f} images/s"),
    ("data_wait", "waits {:.0f} % for data"),
)


@contextmanager
def progress(console: Console) -> Generator[Callable[[Progress], None]]:
    """Show the progress of training: a bar on a terminal, elsewhere a line every `LINE_EVERY` seconds."""
    with _display(console, training=True) as show:
        yield lambda now: show("step", now[0], now[1], f"epoch {now[2]}", _in_words(now[3]))


@contextmanager
def working(console: Console) -> Generator[Callable[[str, int, int], None]]:
    """Show the progress of work that has several named parts, one after another, as `progress` does."""
    with _display(console, training=False) as show:
        yield lambda what, done, total: show(what, done, total, "", "")


@contextmanager
def _display(console: Console, *, training: bool) -> Generator[Callable[[str, int, int, str, str], None]]:
    """Yield a function of (part of the work, done, total, detail, results), which shows them."""
    if not console.is_terminal:
        yield _lines(console, training=training)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
    label, results = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[results]}", markup=False)
    bar = Bar(label, *columns, results, console=console, expand=True, transient=not training)
    tasks: dict[str, TaskID] = {}

    def show(part: str, done: int, total: int, detail: str, results: str) -> None:
        if part not in tasks:  # not before, so that steps made before a resume do not count towards the speed
            tasks[part] = bar.add_task("", total=total, completed=done, results="")
        description = _clean(detail or part)
        bar.update(tasks[part], completed=done, total=total, description=description, results=results)

    with bar:
        yield show


def _lines(console: Console, *, training: bool) -> Callable[[str, int, int, str, str], None]:
    """Print a line now and then; for training also the first and the last step."""
    started: dict[str, tuple[float, int]] = {}
    last = -LINE_EVERY if training else time.monotonic()

    def show(part: str, done: int, total: int, detail: str, results: str) -> None:
        nonlocal last
        now = time.monotonic()
        start, first = started.setdefault(part, (now, done))
        if now - last < LINE_EVERY and not (training and done == total):
            return
        last = now
        left = f"{(now - start) / (done - first) * (total - done):.0f} s left" if done > first else ""
        say(", ".join(filter(None, (f"{part} {done}/{total}", detail, left, results))), console)

    return show


def _in_words(metrics: dict[str, float]) -> str:
    return ", ".join(form.format(metrics[name]) for name, form in PROGRESS_METRICS if name in metrics)


def report_run(run: Path, results: dict[str, dict[str, float]]) -> None:
    """Print the results of a run, where it is and what to try next."""
    console = _stdout()
    headings = {
        "knn_top1": "kNN, all labels",
        "one_label": "nearest, 1 label per class",
        "five_labels": "nearest, 5 labels per class",
    }
    columns = [name for name in headings if any(name in row for row in results.values())]
    if columns:
        rows = ((who, *(f"{row[name]:.1f}" if name in row else "" for name in columns)) for who, row in results.items())
        title = "Accuracy on held-out images, in %"
        print_table(title, ["features", *(headings[name] for name in columns)], rows)
        key = "one_label" if "one_label" in columns else "knn_top1"
        scores = [f"{row[key]:.1f} % {who}" for who, row in results.items() if key in row]
        labels = "one label per class" if key == "one_label" else "all labels"
        say(f"With {labels}: {', '.join(scores)}.", console)
    else:
        say("The images have no labels, so there is no accuracy to report; see the curves in report.html.", console)
    say(f"The run is in {run}: encoder, settings, metrics, report.", console)
    where = quote(str(run))
    say("Try next:", console)
    say(f"  moco evaluate {where} --protocol knn", console)
    say(f"  in Python: encoder = moco.load_encoder({str(run)!r})", console)
    say("  moco pretrain --data FOLDER_OF_YOUR_IMAGES", console)


def report_evaluation(
    title: str,
    figures: dict[str, float],
    per_class: dict[str, float],
    notes: Sequence[str],
    written: Path | None,
    mixups: Sequence[tuple[str, str, int]] = (),
) -> None:
    """Print the results of an evaluation.

    Args:
        title: title of the table of figures.
        figures: figures by name.
        per_class: accuracy of each class, in percent.
        notes: remarks, one line each.
        written: path of the files that were written, without suffix; None if there are none.
        mixups: the most frequent confusions: class, class predicted instead, number of images.
    """
    rows = [(name, f"{value:.4g}" if abs(value) < 10 else f"{value:.2f}") for name, value in figures.items()]
    print_table(title, ("measure", ""), rows)
    if 1 < len(per_class) <= MAX_CLASSES:
        print_table("accuracy by class, %", ("class", ""), [(name, f"{v:.1f}") for name, v in per_class.items()])
    elif per_class:
        worst = sorted(per_class.items(), key=lambda item: item[1])[:5]
        say(f"Hardest classes: {', '.join(f'{name} {value:.1f} %' for name, value in worst)}.", _stdout())
    if mixups:
        words = (f"{own} as {other} {count:,} {'time' if count == 1 else 'times'}" for own, other, count in mixups)
        say(f"Most frequent confusions: {', '.join(words)}.", _stdout())
    for note in notes:
        say(note, _stdout())
    if written:
        say(f"Written to {written}.json{' and .png' if per_class else ''}.", _stdout())


@contextmanager
def log_to_stderr() -> Generator[None]:
    """Send the library's log to stderr while a command runs; processes but the first print only what ends them."""
    logger = logging.getLogger("moco")
    handler = _ToStderr(logging.NOTSET if launched().rank == 0 else logging.ERROR)
    level, propagate = logger.level, logger.propagate
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
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
    """Prints INFO plainly, WARNING and above in yellow, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        warned = record.levelno >= logging.WARNING
        say(record.getMessage(), style="yellow" if warned else "")


@cache
def stderr() -> Console:
    # Shared by all: lines printed while a bar is drawn have to go through the bar's console.
    return Console(stderr=True, highlight=False)


def _stdout() -> Console:
    return Console(highlight=False)


def say(text: str, console: Console | None = None, style: str = "") -> None:
    (console or stderr()).print(Text(_clean(text), style=style), soft_wrap=True)


def _clean(text: str) -> str:
    """Replace control characters, with which a hostile file name could manipulate the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], lines: bool = False) -> None:
    table = Table(title=title or None, title_justify="left", title_style="bold", show_lines=lines)
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_clean(cell)) for cell in row))
    _stdout().print(table)
