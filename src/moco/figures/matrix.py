"""The confusion matrix."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from moco.figures.letters import plain
from moco.figures.theme import LIGHT, Theme, blank, dress

MAX_NAMED, MAX_NUMBERED = 40, 20
"""Most classes that are named, and most for which cells show numbers."""


def confusion_matrix(counts: np.ndarray, classes: Sequence[str], *, title: str, theme: Theme = LIGHT) -> Figure:
    """Draw a confusion matrix in percent of the images of each class.

    Args:
        counts: `[classes, classes]`, number of images of the row's class that were classified as the column's.
        classes: names of the classes in the order of the rows.
        title: title of the figure.
        theme: colours.
    """
    number = len(classes)
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(16.0, max(4.2, 0.42 * number + 2.2))
    figure = blank(side + 0.6, side, theme)
    axes = figure.subplots()
    # From transparent to the full colour, so that it suits any background.
    shades = LinearSegmentedColormap.from_list("share", [theme.blue + "00", theme.blue])
    edges = np.arange(number + 1) - 0.5
    mesh = axes.pcolormesh(edges, edges, share, cmap=shades, vmin=0, vmax=100, rasterized=number > MAX_NAMED)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    named = number <= MAX_NAMED
    for axis, length in ((axes.xaxis, 90 if number > 10 else 45), (axes.yaxis, 0)):
        axis.set_ticks(range(number) if named else [])
        if named:
            names = [plain(name, 18) for name in classes]
            labels = axis.set_ticklabels(names, fontsize=8, rotation=length, parse_math=False)
            for label in labels if length == 45 else ():
                label.set(ha="right", rotation_mode="anchor")
    if number <= MAX_NUMBERED:
        for row, column in zip(*np.nonzero(share >= 0.5), strict=True):
            value = share[row, column]
            colour = theme.paper if value > 55 else theme.ink
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color=colour)
    right = 100 * np.trace(counts) / max(counts.sum(), 1)
    dress(axes, theme, title=f"{title}: accuracy {right:.1f} %", x="predicted class", y="true class")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, shrink=0.7)
    bar.set_label("% of the class", color=theme.ink)
    bar.ax.tick_params(colors=theme.ink)
    bar.outline.set_visible(False)
    return figure
