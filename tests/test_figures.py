import io
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from moco.figures import BLUE, GREEN, GREY, ORANGE, Neighbours, curves, neighbours

# Between two looks at the neighbours there are rows without them.
ROWS = [
    {
        "step": float(10 * i),
        "epoch": 0.5 * i,
        "loss": 8 - 0.3 * i,
        "positive": 0.1 * i,
        "negative": 0.01 * i,
        "spread": 1 - 0.02 * i,
        "pretext_accuracy": 5.0 * i,
        "lr": 0.06 / (1 + i),
    }
    | ({"knn_top1": 40.0 + i, "knn_projection_top1": 35.0 + i} if i % 2 == 0 else {})
    for i in range(7)
]
BASELINES = {"raw pixels": 31.0, "untrained encoder": 37.5}


def draw(rows, baselines=BASELINES) -> Figure:
    return curves(rows, chance=8.3, floor=2.1, baselines=baselines)


def lines(figure: Figure) -> dict[str, tuple[list[float], list[float], str]]:
    """Data and colour of every line by its label, from all axes."""
    found = {}
    for line in (line for axes in figure.axes for line in axes.lines):
        x, y = np.asarray(line.get_xydata()).T.tolist()
        found[str(line.get_label())] = (x, y, to_hex(line.get_color()).upper())
    return {label: line for label, line in found.items() if not label.startswith("_")}


def levels(figure: Figure) -> set[float]:
    """Heights of the grey lines."""
    drawn = [line for axes in figure.axes for line in axes.lines if to_hex(line.get_color()) == GREY.lower()]
    return {float(np.asarray(line.get_xydata())[0, 1]) for line in drawn}


@pytest.mark.parametrize(
    "label, column, colour",
    [
        ("loss", "loss", BLUE),
        ("features", "knn_top1", BLUE),
        ("projections", "knn_projection_top1", ORANGE),
        ("query and its key", "positive", BLUE),
        ("query and negatives", "negative", ORANGE),
        ("spread of the keys", "spread", GREEN),
        ("key nearest of all, %", "pretext_accuracy", BLUE),
        ("learning rate", "lr", ORANGE),
    ],
)
def test_each_line_is_a_column_over_the_epochs_where_it_was_taken(label, column, colour):
    taken = [row for row in ROWS if column in row]
    want = [row["epoch"] for row in taken], [row[column] for row in taken], colour
    assert lines(draw(ROWS))[label] == want


def test_chance_floor_and_baselines_are_level_lines():
    figure = draw(ROWS)
    assert levels(figure) == {8.3, 2.1, 31.0, 37.5}
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == ["chance", "floor"]
    boxes = [axes.get_legend() for axes in figure.axes]
    legends = [text.get_text() for box in boxes if box for text in box.get_texts()]
    assert legends[:4] == ["features", "projections", "raw pixels", "untrained encoder"]


def test_without_labels_the_accuracy_says_so():
    rows = [{name: value for name, value in row.items() if not name.startswith("knn")} for row in ROWS]
    figure = draw(rows, baselines={})
    assert {"features", "projections", *BASELINES}.isdisjoint(lines(figure))
    assert "no labels" in [text.get_text() for axes in figure.axes for text in axes.texts]
    assert len(lines(figure)) == 6


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
def test_curves_can_be_written_as_a_picture(rows):
    figure = draw(rows)
    assert isinstance(figure, Figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=30)
    assert buffer.getvalue().startswith(b"\x89PNG")


def test_neighbours_are_shown_most_similar_left_and_least_similar_right_row_by_row():
    def picture(value: int) -> np.ndarray:
        return np.full((8, 8, 3) if value % 2 else (8, 8), value, dtype=np.uint8)

    rows = [
        Neighbours(
            query=picture(100 * row),
            title=f"query {row}",
            nearest=[(picture(100 * row + i), f"near {row} {i}") for i in (1, 2, 3)],
            farthest=[(picture(100 * row + i), f"far {row} {i}") for i in (4, 5)],
        )
        for row in (0, 1)
    ]
    figure = neighbours(rows)
    assert [axes.get_title() for axes in figure.axes] == [
        title
        for row in (0, 1)
        for title in (f"query {row}", *(f"near {row} {i}" for i in (1, 2, 3)), *(f"far {row} {i}" for i in (4, 5)))
    ]
    shown = [int(np.asarray(axes.images[0].get_array()).max()) for axes in figure.axes]
    assert shown == [100 * row + i for row in (0, 1) for i in range(6)]
    left = [axes.get_position().x0 for axes in figure.axes[:6]]
    assert left == sorted(left)
    assert {text.get_text() for text in figure.texts} == {"image", "most similar", "least similar"}
    figure.savefig(io.BytesIO(), format="png", dpi=20)


def test_figures_need_no_window_and_leave_none_open():
    code = (
        "import sys; from moco.figures import curves\n"
        "curves([{'epoch': 1.0, 'loss': 2.0, 'positive': 0.5}], chance=3.0, floor=1.0, baselines={})\n"
        "sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
