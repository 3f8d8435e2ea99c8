"""Pictures side by side: an encoder is judged by its neighbours, a recipe by its views."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moco.figures.theme import LIGHT, Theme, blank, plain

CELL, GAP, HEAD, EDGE = 1.0, 0.1, 0.42, 0.12
"""Side of a picture, room between pictures, the heading's and the margin's, in inches."""


class Neighbours(NamedTuple):
    """One row of the retrieval figure; pictures are uint8 `[h, w]` or `[h, w, 3]`."""

    query: np.ndarray
    title: str
    nearest: list[tuple[np.ndarray, str]]
    farthest: list[tuple[np.ndarray, str]]


class Views(NamedTuple):
    """An image and two views of it as the model sees them; uint8 `[h, w]` or `[h, w, 3]`."""

    image: np.ndarray
    title: str
    first: np.ndarray
    second: np.ndarray


def neighbours(rows: Sequence[Neighbours], *, theme: Theme = LIGHT) -> Figure:
    """Each query with the images that the encoder finds most and least like it, and how alike.

    Args:
        rows: one per query, all with equally many neighbours.
        theme: colours.
    """
    near, far = len(rows[0].nearest), len(rows[0].farthest)
    caption, part = 0.24, 0.3
    starts = [0.0, part + CELL + GAP, 2 * part + (1 + near) * (CELL + GAP)]
    width = 2 * EDGE + starts[2] + far * (CELL + GAP) - GAP
    height = HEAD + EDGE + len(rows) * (CELL + caption + GAP) - GAP
    figure = blank(width, height, theme, arranged=False)
    groups = ("image", 1, theme.ink), ("most similar", near, theme.blue), ("least similar", far, theme.orange)
    for start, (heading, count, colour) in zip(starts, groups, strict=True):
        middle = EDGE + start + (count * (CELL + GAP) - GAP) / 2
        figure.text(middle / width, 1 - 0.2 / height, heading, color=colour, ha="center", va="center", fontsize=11)
    for number, row in enumerate(rows):
        top = HEAD + number * (CELL + caption + GAP)
        parts = [(row.query, row.title)], row.nearest, row.farthest
        for start, pictures, (_, _, colour) in zip(starts, parts, groups, strict=True):
            for place, (picture, title) in enumerate(pictures):
                left = EDGE + start + place * (CELL + GAP)
                axes = _cell(figure, left, top + caption, picture)
                axes.set_title(plain(title, 18), fontsize=8.5, color=colour, pad=2.5, parse_math=False)
    return figure


def views(columns: Sequence[Views], *, theme: Theme = LIGHT) -> Figure:
    """Images, and below each the two views that the model learns to bring together.

    Args:
        columns: one per image.
        theme: colours.
    """
    side, named = 0.75, any(column.title for column in columns)
    head = EDGE + (0.24 if named else 0)
    width = side + len(columns) * (CELL + GAP) - GAP + EDGE
    height = head + 3 * (CELL + GAP) - GAP + EDGE
    figure = blank(width, height, theme, arranged=False)
    for row, (name, colour) in enumerate((("image", theme.ink), ("view 1", theme.blue), ("view 2", theme.orange))):
        middle = head + row * (CELL + GAP) + CELL / 2
        figure.text(
            (side - 0.12) / width, 1 - middle / height, name, color=colour, ha="right", va="center", fontsize=10
        )
        for place, column in enumerate(columns):
            picture = (column.image, column.first, column.second)[row]
            axes = _cell(figure, side + place * (CELL + GAP), head + row * (CELL + GAP), picture)
            if row == 0:
                axes.set_title(plain(column.title, 14), fontsize=8.5, color=theme.ink, pad=2.5, parse_math=False)
    return figure


def _cell(figure: Figure, left: float, top: float, picture: np.ndarray) -> Axes:
    """A picture in its own proportions, in the middle of a square; lengths in inches."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 1 - (top + CELL) / height, CELL / width, CELL / height))
    # Few pixels stay squares, many are drawn smoothly.
    smooth = "none" if min(picture.shape[:2]) < 48 else "antialiased"
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation=smooth, aspect="equal")
    axes.set_axis_off()
    return axes
