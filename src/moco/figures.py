"""Pictures, each returned as a figure."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision.
BLACK, BLUE, ORANGE, GREEN, GREY = "#000000", "#0072B2", "#D55E00", "#009E73", "#8A8A8A"


def curves(rows: Sequence[dict[str, float]], *, chance: float, floor: float, baselines: dict[str, float]) -> Figure:
    """Loss, kNN accuracy, similarities and learning rate over the epochs.

    Args:
        rows: of metrics.csv.
        chance: loss of an encoder that knows nothing.
        floor: loss if positives were equal and negatives orthogonal.
        baselines: kNN accuracy in percent of what the encoder has to beat, by name.
    """
    figure = Figure(figsize=(10, 6.4), layout="constrained", dpi=120)
    loss, knn, similarity, rate = figure.subplots(2, 2).flat

    _line(loss, rows, "loss", BLUE, "loss")
    for level, name in ((chance, "chance"), (floor, "floor")):
        loss.axhline(level, color=GREY, linewidth=1, linestyle="dotted")
        loss.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=GREY)
    loss.set_title("InfoNCE loss", loc="left")

    drawn = _line(knn, rows, "knn_top1", BLUE, "features")
    _line(knn, rows, "knn_projection_top1", ORANGE, "projections")
    if drawn:
        for (name, level), style in zip(baselines.items(), ("dashed", "dotted", "dashdot"), strict=False):
            knn.axhline(level, color=GREY, linewidth=1, linestyle=style, label=name)
        knn.legend(frameon=False, fontsize="small")
    else:
        knn.text(0.5, 0.5, "no labels", transform=knn.transAxes, ha="center", color=GREY)
    knn.set_title("kNN accuracy, %", loc="left")

    _line(similarity, rows, "positive", BLUE, "query and its key")
    _line(similarity, rows, "negative", ORANGE, "query and negatives")
    _line(similarity, rows, "spread", GREEN, "spread of the keys")
    similarity.legend(frameon=False, fontsize="small")
    similarity.set_title("Cosine similarity, and spread (0 collapsed, 1 even)", loc="left")

    _line(rate, rows, "pretext_accuracy", BLUE, "key nearest of all, %")
    rate.set_ylim(0, 102)
    other = rate.twinx()
    other.spines["top"].set_visible(False)
    _line(other, rows, "lr", ORANGE, "learning rate")
    rate.set_title("Pretext accuracy, %", loc="left", color=BLUE)
    other.set_title("learning rate", loc="right", color=ORANGE)

    for axes in (loss, knn, similarity, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.set_xlabel("epoch")
        axes.margins(x=0.01)
    return figure


class Neighbours(NamedTuple):
    """One row of the retrieval figure; pictures are uint8 `[h, w]` or `[h, w, 3]`."""

    query: np.ndarray
    title: str
    nearest: list[tuple[np.ndarray, str]]
    farthest: list[tuple[np.ndarray, str]]


def neighbours(rows: Sequence[Neighbours]) -> Figure:
    """Each query with the images that the encoder finds most and least like it, and how alike.

    Args:
        rows: one per query, all with equally many neighbours.
    """
    near, far = len(rows[0].nearest), len(rows[0].farthest)
    columns = 1 + near + far
    widths = [1.0, 0.3, *[1.0] * near, 0.3, *[1.0] * far]
    figure = Figure(figsize=(1.05 * columns + 0.6, 1.36 * len(rows) + 0.45), dpi=120, facecolor="white")
    grid = figure.add_gridspec(
        len(rows), columns + 2, width_ratios=widths, left=0.02, right=0.98, top=1 - 0.5 / (1.36 * len(rows) + 0.45),
        bottom=0.02, wspace=0.08, hspace=0.32,
    )  # fmt: skip
    for number, row in enumerate(rows):
        cells = [(0, row.query, row.title, BLACK)]
        cells += [(2 + place, picture, title, BLUE) for place, (picture, title) in enumerate(row.nearest)]
        cells += [(3 + near + place, picture, title, ORANGE) for place, (picture, title) in enumerate(row.farthest)]
        for column, picture, title, colour in cells:
            axes = figure.add_subplot(grid[number, column])
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_title(title, fontsize=8, color=colour, pad=2.5)
            axes.set_axis_off()
    middle = figure.transFigure
    total, y = sum(widths), 1 - 0.2 / (1.36 * len(rows) + 0.45)
    for start, width, text, colour in (
        (0, 1, "image", BLACK),
        (1.3, near, "most similar", BLUE),
        (1.6 + near, far, "least similar", ORANGE),
    ):
        centre = 0.02 + 0.96 * (start + width / 2) / total
        figure.text(centre, y, text, color=colour, ha="center", va="center", fontsize=11, transform=middle)
    return figure


def _line(axes: Any, rows: Sequence[dict[str, float]], name: str, colour: str, label: str) -> bool:
    points = [(row["epoch"], row[name]) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, label=label)
    return bool(points)
