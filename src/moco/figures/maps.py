"""Maps: all images on a plane, similar ones near each other."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moco.figures.letters import fitted, measured
from moco.figures.theme import LIGHT, Theme, blank

MAX_NAMED = 20
"""Most classes for which points are coloured, as far as there are colours, and classes named."""
WIDTH, LETTERS = 8.6, 11
"""Width of the figure in inches, and font size of names in points."""
AROUND = 0.16
"""Margin for names around the points, as a fraction of their extent; what is not needed is cropped."""


class Thumbnails(NamedTuple):
    """Points that have a thumbnail, in the order of the points, and the centre of each thumbnail."""

    index: Int64[np.ndarray, " m"]
    xy: Float[np.ndarray, "m 2"]


def thumbnail_places(places: np.ndarray, side: float) -> Thumbnails:
    """Place thumbnails in squares of a grid, at most one in each: the point's own square, or one that touches it.

    Args:
        places: positions `[n, 2]`; if several points share a square, the first gets it.
        side: side of a square, in the same unit.
    """
    taken: dict[tuple[int, int], int] = {}
    left = []
    squares = np.floor(places / side).astype(int)
    for number, (column, row) in enumerate(squares.tolist()):
        if taken.setdefault((column, row), number) != number:
            left.append(number)
    for number in left:
        column, row = squares[number].tolist()
        around = [(column + i, row + j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (column + i, row + j) not in taken]
        if around:
            middles = (np.asarray(around) + 0.5) * side
            taken[around[int(np.linalg.norm(middles - places[number], axis=1).argmin())]] = number
    order = sorted((number, square) for square, number in taken.items())
    index = np.asarray([number for number, _ in order], dtype=np.int64)
    return Thumbnails(index, (np.asarray([square for _, square in order], dtype=float) + 0.5) * side)


def embedding_map(
    places: np.ndarray,
    pictures: Sequence[np.ndarray],
    *,
    labels: np.ndarray | None = None,
    classes: Sequence[str] = (),
    title: str = "",
    side: float = 0.03,
    theme: Theme = LIGHT,
) -> Figure:
    """Draw every image as a point, and as a thumbnail if there is room for one.

    Args:
        places: positions `[n, 2]` in [0, 1], as `moco.layout.coordinates` returns them.
        pictures: thumbnails of the points that `thumbnail_places` chooses, in that order; uint8 `[h, w]` or
            `[h, w, 3]`.
        labels: class number of each image. With at most 20 classes, points and frames are coloured (grey if there are
            more classes than colours), and each class is named near most of its images.
        classes: names of the classes.
        title: title of the figure.
        side: side of a thumbnail with its frame.
        theme: colours.
    """
    shown = thumbnail_places(places, side)
    named = labels is not None and len(np.unique(labels)) <= MAX_NAMED
    shades = np.asarray([theme.of_class(int(label)) if named else theme.muted for label in _labels(labels, places)])
    corners = np.concatenate([shown.xy - side / 2, shown.xy + side / 2, places])
    names = _names(places, shown, labels, classes, side) if labels is not None and named else []
    boxes = np.asarray([box for _, _, _, box in names]).reshape(-1, 2)
    low, high = (edge(np.concatenate([corners, boxes]), axis=0) for edge in (np.min, np.max))
    low, high = low - side / 2, high + side / 2
    high = np.maximum(high, low + 0.3)
    head = 0.34 if title else 0.0
    body = WIDTH * float((high[1] - low[1]) / (high[0] - low[0]))
    figure = blank(WIDTH, body + head, theme, arranged=False)
    axes = figure.add_axes((0, 0, 1, body / (body + head)))
    axes.set_axis_off()
    axes.scatter(places[:, 0], places[:, 1], s=9, c=shades, linewidths=0, alpha=0.75)
    for number, (x, y), picture in zip(shown.index, shown.xy.tolist(), pictures, strict=True):
        _draw(axes, picture, x, y, side, str(shades[number]))
    for name, label, anchor, box in names:
        (left, bottom), (right, top) = box
        x, y, colour = (left + right) / 2, (bottom + top) / 2, theme.of_class(label)
        axes.plot([anchor[0], x], [anchor[1], y], color=colour, linewidth=1.2, zorder=4)
        style = {"boxstyle": "round,pad=0.25", "facecolor": theme.paper, "edgecolor": colour, "linewidth": 1.4}
        text = axes.text(x, y, name, ha="center", va="center", fontsize=LETTERS, bbox=style, zorder=5)
        text.set(color=theme.ink, parse_math=False)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    if title:
        words = fitted(title, 72 * WIDTH - 12, LETTERS)
        y = 1 - 0.17 / (body + head)
        figure.text(0.01, y, words, color=theme.ink, va="center", fontsize=LETTERS, parse_math=False)
    return figure


def _labels(labels: np.ndarray | None, places: np.ndarray) -> np.ndarray:
    return np.full(len(places), -1) if labels is None else labels


def _draw(axes: Axes, picture: np.ndarray, x: float, y: float, side: float, colour: str) -> None:
    height, width = picture.shape[:2]
    across, up = (0.45 * side * length / max(height, width) for length in (width, height))
    smooth = "none" if min(height, width) < 32 else "antialiased"
    extent = (x - across, x + across, y - up, y + up)
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=extent, interpolation=smooth, zorder=2)
    frame = Rectangle((x - across, y - up), 2 * across, 2 * up, fill=False, linewidth=1.3, zorder=3)
    frame.set_edgecolor(colour)
    axes.add_patch(frame)


Name = tuple[str, int, tuple[float, float], tuple[tuple[float, float], tuple[float, float]]]


def _names(
    places: np.ndarray, shown: Thumbnails, labels: np.ndarray, classes: Sequence[str], side: float
) -> list[Name]:
    """For each class: its name, number, the position of most of it, and the corners of the nearest free box."""
    step = side / 2
    unit = 72 * WIDTH / (1 + 2 * AROUND)  # points to a unit of the map, or more
    start = np.minimum(shown.xy.min(axis=0), places.min(axis=0)) - AROUND - side
    end = np.maximum(shown.xy.max(axis=0), places.max(axis=0)) + AROUND + side
    taken = np.zeros(np.ceil((end - start) / step).astype(int) + 1, dtype=bool)
    for low in np.floor((shown.xy - side / 2 - start) / step + 0.5).astype(int).tolist():
        taken[low[0] : low[0] + 2, low[1] : low[1] + 2] = True
    found: list[Name] = []
    numbers, counts = np.unique(labels, return_counts=True)
    for label in numbers[np.argsort(-counts, kind="stable")].tolist():
        name = fitted(classes[label] if 0 <= label < len(classes) else str(label), 150, LETTERS)
        own = places[labels == label]
        distance = np.linalg.norm(own[:, None] - own[None, :200], axis=2)
        anchor = own[np.median(distance, axis=1).argmin()]
        size = np.asarray([measured(name, LETTERS) + 1.2 * LETTERS, 2.0 * LETTERS]) / unit
        across, up = np.minimum(np.ceil(size / step).astype(int), taken.shape)
        total = np.pad(taken.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
        inside = total[across:, up:] - total[:-across, up:] - total[across:, :-up] + total[:-across, :-up]
        columns, rows = np.nonzero(inside == inside.min())
        middles = start + step * (np.stack([columns, rows], axis=1) + np.asarray([across, up]) / 2)
        best = int(np.linalg.norm(middles - anchor, axis=1).argmin())
        taken[columns[best] : columns[best] + across, rows[best] : rows[best] + up] = True
        (x, y), (wide, high) = middles[best].tolist(), size.tolist()
        box = (x - wide / 2, y - high / 2), (x + wide / 2, y + high / 2)
        found.append((name, label, (float(anchor[0]), float(anchor[1])), box))
    return sorted(found, key=lambda each: each[1])
