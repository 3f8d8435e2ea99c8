"""Grids of images: neighbours, to judge an encoder by, and views, to judge a recipe by."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from moco.figures.letters import fitted
from moco.figures.theme import LIGHT, Theme, blank

CELL, GAP, HEAD, EDGE, LINE = 1.0, 0.12, 0.42, 0.12, 0.2
"""Side of an image, gap between images, and heights of the heading, the margin and a caption, in inches."""
LETTERS = 11
"""Font size of captions in points."""


class Alike(NamedTuple):
    """An image and its similarity to a query; the picture is uint8 `[h, w]` or `[h, w, 3]`."""

    picture: np.ndarray
    name: str
    similarity: float


class Neighbours(NamedTuple):
    """One row of the retrieval figure, images in any order; `query` is uint8 `[h, w]` or `[h, w, 3]`."""

    query: np.ndarray
    title: str
    nearest: Sequence[Alike]
    farthest: Sequence[Alike]


class Views(NamedTuple):
    """An image and two views of it as the model sees them; uint8 `[h, w]` or `[h, w, 3]`."""

    image: np.ndarray
    title: str
    first: np.ndarray
    second: np.ndarray


def neighbours(rows: Sequence[Neighbours], *, theme: Theme = LIGHT) -> Figure:
    """Draw each query with the images that the encoder finds most and least similar, most extreme first.

    The name is above each image, its similarity below.

    Args:
        rows: one per query.
        theme: colours.
    """
    found = [
        (
            row,
            sorted(row.nearest, key=lambda each: -each.similarity),
            sorted(row.farthest, key=lambda each: each.similarity),
        )
        for row in rows
    ]
    near, far = (max(len(each[side]) for each in found) for side in (1, 2))
    every = [each for _, *sides in found for side in sides for each in side]
    above = LINE if any(row.title for row in rows) or any(each.name for each in every) else 0.0
    part, row_height = 0.3, CELL + above + LINE + GAP
    starts = [0.0, part + CELL + GAP, 2 * part + (1 + near) * (CELL + GAP)]
    width = 2 * EDGE + starts[2] + far * (CELL + GAP) - GAP
    figure = blank(width, HEAD + EDGE + len(rows) * row_height - GAP, theme, arranged=False)
    groups = ("image", 1, theme.ink), ("most similar", near, theme.blue), ("least similar", far, theme.orange)
    for start, (heading, count, colour) in zip(starts, groups, strict=True):
        if count:
            _write(figure, EDGE + start + (count * (CELL + GAP) - GAP) / 2, 0.2, heading, colour, size=12)
    for number, (row, nearest, farthest) in enumerate(found):
        top = HEAD + number * row_height
        _draw(figure, EDGE, top + above, row.query)
        _write(figure, EDGE + CELL / 2, top + above / 2, _cut(row.title), theme.ink)
        for start, alike, (_, _, colour) in zip(starts[1:], (nearest, farthest), groups[1:], strict=True):
            for place, each in enumerate(alike):
                left = EDGE + start + place * (CELL + GAP)
                _draw(figure, left, top + above, each.picture)
                _write(figure, left + CELL / 2, top + above / 2, _cut(each.name), colour)
                bottom = top + above + CELL + LINE / 2
                _write(figure, left + CELL / 2, bottom, f"{each.similarity:.2f}", colour)
    return figure


def views(columns: Sequence[Views], *, theme: Theme = LIGHT) -> Figure:
    """Draw images, and below each the two views that the model learns to bring together.

    Args:
        columns: one per image.
        theme: colours.
    """
    side, named = 0.75, any(column.title for column in columns)
    head = EDGE + (LINE if named else 0)
    width = side + len(columns) * (CELL + GAP) - GAP + EDGE
    height = head + 3 * (CELL + GAP) - GAP + EDGE
    figure = blank(width, height, theme, arranged=False)
    for row, (name, colour) in enumerate((("image", theme.ink), ("view 1", theme.blue), ("view 2", theme.orange))):
        _write(figure, side - GAP, head + row * (CELL + GAP) + CELL / 2, name, colour, to="right")
        for place, column in enumerate(columns):
            left = side + place * (CELL + GAP)
            _draw(figure, left, head + row * (CELL + GAP), (column.image, column.first, column.second)[row])
            if row == 0:
                _write(figure, left + CELL / 2, head - LINE / 2, _cut(column.title), colour)
    return figure


def _cut(name: str) -> str:
    return fitted(name, 72 * (CELL + GAP / 2), LETTERS)


def _write(
    figure: Figure, x: float, y: float, text: str, colour: str, *, size: int = LETTERS, to: str = "center"
) -> None:
    """Write text vertically centred on a line; the position is in inches from the left and the top."""
    if text:
        width, height = figure.get_size_inches()
        figure.text(x / width, 1 - y / height, text, color=colour, ha=to, va="center", fontsize=size, parse_math=False)


def _draw(figure: Figure, left: float, top: float, picture: np.ndarray) -> None:
    """Draw a picture in its own aspect ratio, centred in a square; lengths in inches."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 1 - (top + CELL) / height, CELL / width, CELL / height))
    # Pixels of small images stay square, large images are smoothed.
    smooth = "none" if min(picture.shape[:2]) < 48 else "antialiased"
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation=smooth, aspect="equal")
    axes.set_axis_off()
