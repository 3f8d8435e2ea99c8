"""Plots of metrics over the epochs, and of the similarity of views."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moco.figures.letters import plain
from moco.figures.theme import LIGHT, Theme, blank, dress, legend

Rows = Sequence[dict[str, float]]
DASHES = ("dashed", "dotted", "dashdot")
STROKES = ("solid", "dashed", "dashdot", "dotted")


def curves(rows: Rows, *, chance: float, floor: float, baselines: Mapping[str, float], theme: Theme = LIGHT) -> Figure:
    """Plot loss, kNN accuracy, similarities, pretext accuracy and, if measured, health over the epochs.

    Args:
        rows: rows of metrics.csv.
        chance: loss at chance level.
        floor: loss if positives were equal and negatives orthogonal.
        baselines: kNN accuracy in percent of the baselines, by name.
        theme: colours.
    """
    drawings = _panels(rows, chance, floor, baselines, theme)
    high = -(-len(drawings) // 2)
    figure = blank(10, 3.2 * high, theme)
    for axes, draw in zip(figure.subplots(high, 2, squeeze=False).flat, drawings.values(), strict=True):
        draw(axes)
    return figure


def curve_panels(
    rows: Rows, *, chance: float, floor: float, baselines: Mapping[str, float], theme: Theme = LIGHT
) -> dict[str, Figure]:
    """Plot each panel of `curves` as a separate figure, by name, for narrow screens; takes the same arguments."""
    panels: dict[str, Figure] = {}
    for name, draw in _panels(rows, chance, floor, baselines, theme).items():
        panels[name] = blank(4.6, 3.0, theme)
        draw(panels[name].subplots())
    return panels


def _panels(
    rows: Rows, chance: float, floor: float, baselines: Mapping[str, float], theme: Theme
) -> dict[str, Callable[[Axes], None]]:
    """Functions that draw the panels, by name: four, or six with health."""
    found: dict[str, Callable[[Axes], None]] = {
        "loss": lambda axes: _draw_loss(axes, rows, chance, floor, theme),
        "kNN accuracy": lambda axes: _draw_knn(axes, rows, baselines, theme),
        "similarities": lambda axes: _draw_similarity(axes, rows, theme),
        "pretext accuracy and learning rate": lambda axes: _draw_pretext(axes, rows, theme),
    }
    if any("effective_rank" in row for row in rows):
        found["effective rank"] = lambda axes: _draw_rank(axes, rows, theme)
        found["alignment and uniformity"] = lambda axes: _draw_evenness(axes, rows, theme)
    return found


def overlay(
    runs: Mapping[str, Rows],
    column: str,
    *,
    title: str,
    unit: Mapping[str, float] | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """Plot one column of metrics.csv for several runs over the epochs.

    Args:
        runs: rows by name of the run.
        column: column to plot; runs without it are left out.
        title: title of the figure.
        unit: by name of the run, the value to divide its values by; a line then marks 1.
        theme: colours.
    """
    figure = blank(5.2, 3.4, theme)
    axes = figure.subplots()
    drawn = 0
    for number, (name, rows) in enumerate(runs.items()):
        stroke = STROKES[number // len(theme.classes) % len(STROKES)]
        shown = plain(name, 30)
        shown = f" {shown}" if shown.startswith("_") else shown  # else it would be left out of the legend
        if unit:
            rows = [row | {column: row[column] / unit[name]} for row in rows if column in row]
        drawn += _line(axes, rows, column, theme.classes[number % len(theme.classes)], shown, stroke=stroke)
    if drawn:
        legend(axes, theme)
        if unit:
            _level(axes, 1.0, "chance", theme)
    else:
        _say(axes, "nothing measured", theme)
    dress(axes, theme, title=title)
    _over_epochs(axes, theme)
    return figure


def similarities(positive: np.ndarray, negative: np.ndarray, *, theme: Theme = LIGHT) -> Figure:
    """Plot histograms of the cosine similarity of two views of the same image, and of views of different images.

    If the two histograms do not overlap, an image can be told from all others by its other view.

    Args:
        positive: similarities of two views of the same image.
        negative: similarities of views of different images.
        theme: colours.
    """
    figure = blank(7.2, 3.4, theme)
    axes = figure.subplots()
    both = np.concatenate([positive, negative])
    low = max(-1.0, float(np.floor(10 * both.min()) / 10))
    edges = np.linspace(low, 1.0, 61)
    for values, colour, hatch, name in (
        (negative, theme.orange, "", "two images"),
        (positive, theme.blue, "////", "two views of an image"),
    ):
        heights = np.histogram(values, edges)[0] / max(1, len(values)) * 100
        label = f"{name}: mean {values.mean():.2f}"
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.28, edgecolor="none")
        axes.stairs(heights, edges, color=colour, linewidth=1.6, hatch=hatch, label=label)
    axes.set_xlim(low, 1.0)
    axes.set_ylim(bottom=0)
    legend(axes, theme)
    dress(axes, theme, title="Similarity of views", x="cosine similarity", y="% of the pairs")
    return figure


def _draw_loss(axes: Axes, rows: Rows, chance: float, floor: float, theme: Theme) -> None:
    _line(axes, rows, "loss", theme.blue, "loss")
    for level, name in ((chance, "chance"), (floor, "floor")):
        _level(axes, level, name, theme)
    dress(axes, theme, title="InfoNCE loss")
    _over_epochs(axes, theme)
    axes.margins(y=0.12)


def _draw_knn(axes: Axes, rows: Rows, baselines: Mapping[str, float], theme: Theme) -> None:
    drawn = _line(axes, rows, "knn_top1", theme.blue, "features")
    _line(axes, rows, "knn_projection_top1", theme.orange, "projections")
    if drawn:
        for (name, level), style in zip(baselines.items(), DASHES, strict=False):
            axes.axhline(level, color=theme.muted, linewidth=1, linestyle=style, label=name)
        legend(axes, theme)
    else:
        _say(axes, "not measured yet" if baselines else "no labels", theme)
    dress(axes, theme, title="kNN accuracy, %")
    _over_epochs(axes, theme)


def _draw_similarity(axes: Axes, rows: Rows, theme: Theme) -> None:
    _line(axes, rows, "positive", theme.blue, "query and its key")
    _line(axes, rows, "negative", theme.orange, "query and negatives")
    _line(axes, rows, "spread", theme.green, "spread of the keys")
    if rows:
        legend(axes, theme)
    dress(axes, theme, title="Cosine similarity, and spread (0 collapsed, 1 even)")
    _over_epochs(axes, theme)


def _draw_pretext(axes: Axes, rows: Rows, theme: Theme) -> None:
    _line(axes, rows, "pretext_accuracy", theme.blue, "key nearest of all, %")
    axes.set_ylim(0, 102)
    dress(axes, theme)
    axes.set_title("Pretext accuracy, %", loc="left", color=theme.blue, fontsize=11)
    _over_epochs(axes, theme)
    other = axes.twinx()
    _line(other, rows, "lr", theme.orange, "learning rate")
    dress(other, theme)
    other.set_title("learning rate", loc="right", color=theme.orange, fontsize=11)
    other.set_ylim(bottom=0)


def _draw_rank(axes: Axes, rows: Rows, theme: Theme) -> None:
    _line(axes, rows, "effective_rank", theme.blue, "effective rank")
    dress(axes, theme, title="Effective rank of the features")
    _over_epochs(axes, theme)


def _draw_evenness(axes: Axes, rows: Rows, theme: Theme) -> None:
    _line(axes, rows, "alignment", theme.blue, "alignment: 0 if views do not matter")
    _line(axes, rows, "uniformity", theme.orange, "uniformity: the lower, the more even")
    legend(axes, theme)
    dress(axes, theme, title="Alignment and uniformity")
    _over_epochs(axes, theme)


def _level(axes: Axes, level: float, name: str, theme: Theme) -> None:
    axes.axhline(level, color=theme.muted, linewidth=1, linestyle="dotted")
    place = ("axes fraction", "data")
    axes.annotate(name, (1, level), xycoords=place, ha="right", va="bottom", color=theme.muted, fontsize=9)


def _line(axes: Axes, rows: Rows, name: str, colour: str, label: str, stroke: str = "solid") -> bool:
    points = [(row["epoch"], row[name]) for row in rows if name in row]
    if points:
        # A single point makes no line.
        mark = "o" if len(points) == 1 else ""
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=colour, linewidth=1.6, label=label, marker=mark, markersize=4, linestyle=stroke)
    return bool(points)


def _say(axes: Axes, text: str, theme: Theme) -> None:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=theme.muted)


def _over_epochs(axes: Axes, theme: Theme) -> None:
    axes.set_xlabel("epoch", color=theme.ink)
    axes.grid(alpha=0.25, linewidth=0.5, color=theme.muted)
    last = axes.dataLim.x1
    if axes.lines and np.isfinite(last) and last > 0:
        axes.set_xlim(0, 1.01 * last)
