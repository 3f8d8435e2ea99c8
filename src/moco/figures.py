"""Pictures, each returned as a figure."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"


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


def _line(axes: Any, rows: Sequence[dict[str, float]], name: str, colour: str, label: str) -> bool:
    points = [(row["epoch"], row[name]) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, label=label)
    return bool(points)
