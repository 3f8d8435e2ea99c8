import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from PIL import Image

from moco.figures import (
    BLUE,
    DARK,
    GREEN,
    GREY,
    LIGHT,
    ORANGE,
    Neighbours,
    Theme,
    Views,
    apart,
    confusion_matrix,
    coordinates,
    curve_panels,
    curves,
    embedding_map,
    neighbours,
    overlay,
    save,
    similarities,
    svg,
    views,
)

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


def grey(value: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.full((height, width), value, dtype=np.uint8)


PLACES = np.asarray([[0, 0], [0.01, 0], [1, 1], [0.5, 1], [0.5, 0.9]], dtype=np.float32)
LABELS = np.asarray([0, 0, 1, 1, 2])
NAMES = ["<i> & $\\frac$", "猫", "_c"]

EVERY: dict[str, Callable[[Theme], Figure]] = {
    "curves": lambda theme: curves(ROWS, chance=8.3, floor=2.1, baselines=BASELINES, theme=theme),
    "loss": lambda theme: curve_panels(ROWS, chance=8.3, floor=2.1, baselines={}, theme=theme)["loss"],
    "overlay": lambda theme: overlay({"a": ROWS, "_$b": ROWS[:1]}, "loss", title="$x", theme=theme),
    "neighbours": lambda theme: neighbours(
        [Neighbours(grey(9), "$q", [(grey(1), NAMES[0])], [(grey(2), "")])], theme=theme
    ),
    "views": lambda theme: views([Views(grey(9), NAMES[0], grey(1), grey(2))], theme=theme),
    "map": lambda theme: embedding_map(
        PLACES, [grey(1)] * len(apart(PLACES, 0.042)), labels=LABELS, classes=NAMES, title="$t", theme=theme
    ),
    "similarities": lambda theme: similarities(np.linspace(0, 1, 50), np.linspace(-0.9, 0.3, 99), theme=theme),
    "confusion": lambda theme: confusion_matrix(np.eye(3, dtype=int), NAMES, title="$t", theme=theme),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_every_picture_shows_something_on_the_paper_of_its_theme(name, theme, tmp_path):
    save(EVERY[name](theme), tmp_path / "picture.png")
    pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB"))
    paper = tuple(int(theme.paper[i : i + 2], 16) for i in (1, 3, 5))
    assert tuple(pixels[1, 1]) == paper
    drawn = (pixels != np.asarray(paper)).any(axis=2)
    assert 0.003 < drawn.mean() < 0.95
    # Words are there in ink that can be read: somewhere it is far from the paper.
    assert np.abs(pixels.astype(int) - np.asarray(paper)).sum(axis=2).max() > 400


@pytest.mark.parametrize("name", EVERY)
def test_an_svg_is_whole_takes_both_themes_and_names_no_address(name, tmp_path):
    save(EVERY[name](LIGHT), tmp_path / "picture.svg")
    save(EVERY[name](LIGHT), tmp_path / "again.svg")
    text = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "again.svg").read_text(encoding="utf-8")
    tree = ET.fromstring(text)
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    outside = [value for each in tree.iter() for key, value in each.attrib.items() if key.endswith("href")]
    assert all(value.startswith(("#", "data:image/")) for value in outside)
    assert set(re.findall(r"https?://[^\"']*", text)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    style = "".join(each.text or "" for each in tree.iter("{http://www.w3.org/2000/svg}style"))
    assert LIGHT.ink in style and DARK.ink in style.partition("prefers-color-scheme: dark")[2]
    drawn = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    assert "var(--figure-ink)" in drawn and LIGHT.ink.lower() not in drawn.lower()
    # Only what points within the element, to something that is there.
    ids = {each.get("id") for each in tree.iter()}
    targets = re.findall(r'(?:href="|url\()#([^")]+)', text)
    assert set(targets) <= ids


def test_an_svg_within_a_page_brings_no_rules_and_no_ids_of_another(tmp_path):
    text = svg(EVERY["loss"](LIGHT), name="first")
    assert text.startswith("<svg viewBox=") and "http" not in text and "<style" not in text
    assert all(each.startswith("first-") for each in re.findall(r'\bid="([^"]*)"', text))
    assert set(re.findall(r"#(first-[^\")]+)", text)) <= set(re.findall(r'\bid="([^"]*)"', text))


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected .png or .svg"):
        save(EVERY["loss"](LIGHT), tmp_path / "picture.pdf")


def test_a_photo_within_an_svg_is_small(tmp_path):
    rng = np.random.default_rng(0)
    noise = np.asarray(Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((96, 96)))
    save(views([Views(noise, "", noise, noise)]), tmp_path / "photo.svg")
    save(views([Views(grey(0), "", grey(0), grey(9))]), tmp_path / "drawing.svg")
    assert (tmp_path / "photo.svg").read_text().count("data:image/jpeg") == 3
    assert (tmp_path / "drawing.svg").read_text().count("data:image/png") == 3


def test_pictures_keep_their_proportions():
    wide, tall = grey(5, 20, 60), grey(7, 60, 20)
    grids = [
        views([Views(wide, "", tall, tall)]),
        neighbours([Neighbours(wide, "", [(tall, ""), (wide, "")], [(tall, "")])]),
    ]
    for figure in grids:
        figure.draw_without_rendering()
        for axes in figure.axes:
            height, width = np.asarray(axes.images[0].get_array()).shape
            box = axes.get_window_extent()
            assert box.width / box.height == pytest.approx(width / height, rel=0.02)
    figure = embedding_map(np.asarray([[0.2, 0.2], [0.8, 0.8]]), [wide, tall])
    figure.draw_without_rendering()
    for image in figure.axes[0].images:
        height, width = np.asarray(image.get_array()).shape
        box = image.get_window_extent()
        assert box.width / box.height == pytest.approx(width / height, rel=0.02)


def test_views_stand_below_their_image():
    figure = views([Views(grey(10 * i), f"c{i}", grey(10 * i + 1), grey(10 * i + 2)) for i in (1, 2, 3)])
    places = {int(np.asarray(axes.images[0].get_array()).max()): axes.get_position() for axes in figure.axes}
    for column in (1, 2, 3):
        image, first, second = (places[10 * column + row] for row in range(3))
        assert image.x0 == first.x0 == second.x0 and image.y0 > first.y0 > second.y0
    assert places[10].x0 < places[20].x0 < places[30].x0
    assert {text.get_text() for text in figure.texts} == {"image", "view 1", "view 2"}
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["c1", "c2", "c3"]


def test_similar_vectors_come_to_lie_together():
    rng = np.random.default_rng(0)
    centres = np.eye(3, 16, dtype=np.float32)
    vectors = np.concatenate([centre + 0.05 * rng.standard_normal((30, 16), dtype=np.float32) for centre in centres])
    vectors *= rng.uniform(0.1, 10, (90, 1)).astype(np.float32)  # only the direction counts
    for method in ("tsne", "pca"):
        places = coordinates(vectors, method=method)
        assert places.shape == (90, 2) and places.min() >= 0 and places.max() <= 1
        groups = places.reshape(3, 30, 2)
        within = np.linalg.norm(groups - groups.mean(axis=1, keepdims=True), axis=2).max()
        middles = groups.mean(axis=1)
        between = min(np.linalg.norm(middles[i] - middles[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
        assert between > 2 * within, method
        np.testing.assert_array_equal(places, coordinates(vectors, method=method))


@pytest.mark.parametrize("vectors", [np.ones((1, 4)), np.ones((30, 4)), np.zeros((3, 4)), np.eye(2, 1), np.eye(5)])
def test_few_or_equal_vectors_have_places_too(vectors):
    places = coordinates(vectors.astype(np.float32))
    assert places.shape == (len(vectors), 2) and np.isfinite(places).all()
    assert places.min() >= 0 and places.max() <= 1


def test_thumbnails_do_not_overlap_and_fill_the_room():
    places = np.random.default_rng(0).uniform(size=(400, 2))
    chosen = apart(places, 0.1)
    distance = np.abs(places[:, None] - places[chosen][None]).max(axis=2)
    among = distance[chosen] + np.eye(len(chosen))
    assert among.min() >= 0.1 and (distance.min(axis=1) < 0.1).all() and chosen[0] == 0


def test_the_map_colours_and_names_few_classes_and_leaves_many_grey():
    figure = EVERY["map"](LIGHT)
    points = figure.axes[0].collections[0]
    assert np.asarray(points.get_offsets()) == pytest.approx(PLACES)
    colours = [to_hex(colour).upper() for colour in np.asarray(points.get_facecolor())]
    assert [colours[0], colours[2], colours[4]] == [LIGHT.blue, LIGHT.amber, LIGHT.green] and colours[0] == colours[1]
    assert [text.get_text() for text in figure.axes[0].texts] == NAMES
    # The second point has no room beside the first.
    assert len(figure.axes[0].images) == len(figure.axes[0].patches) == 4
    many = embedding_map(np.random.default_rng(0).uniform(size=(30, 2)), [grey(1)], side=2.0, labels=np.arange(30))
    assert not many.axes[0].texts
    assert {to_hex(c).upper() for c in np.asarray(many.axes[0].collections[0].get_facecolor())} == {LIGHT.muted}


def test_the_histogram_counts_percent_of_each_kind_of_pair():
    figure = similarities(np.asarray([0.9, 0.95, 0.97, 0.2]), np.linspace(-0.5, 0.5, 1000))
    axes = figure.axes[0]
    assert axes.get_xlabel() == "cosine similarity" and axes.get_ylabel() == "% of the pairs"
    box = axes.get_legend()
    assert box is not None
    assert {text.get_text() for text in box.get_texts()} == {
        "two images: mean 0.00",
        "two views of an image: mean 0.76",
    }
    steps = [patch for patch in axes.patches if isinstance(patch, StepPatch)]
    assert [patch.get_data()[0].sum() for patch in steps] == pytest.approx([100] * 4)


def test_the_matrix_shows_shares_of_each_class_and_of_all_that_are_right():
    figure = confusion_matrix(np.asarray([[8, 2], [0, 30]]), ["a", "b"], title="knn")
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "knn: 95.0 % right"
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {(0, 0): "80", (1, 0): "20", (1, 1): "100"}
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b"]
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first class is the first row


def test_each_panel_is_one_of_the_curves():
    rows = [row | {"effective_rank": 20.0 + i, "alignment": 0.4, "uniformity": -3.0} for i, row in enumerate(ROWS)]
    panels = curve_panels(rows, chance=8.3, floor=2.1, baselines=BASELINES)
    assert len(panels) == 6
    whole = lines(draw(ROWS))
    apart_ = {label: line for figure in panels.values() for label, line in lines(figure).items()}
    assert whole.items() <= apart_.items()
    assert apart_["effective rank"][1] == [row["effective_rank"] for row in rows]


def test_runs_are_drawn_over_each_other_by_name():
    figure = overlay({"a": ROWS, "_b": ROWS[:3], "none": [{"epoch": 1.0}]}, "knn_top1", title="kNN")
    drawn = lines(figure)
    assert set(drawn) == {"a", " _b"} and drawn["a"][2] != drawn[" _b"][2]
    assert drawn["a"][1] == [row["knn_top1"] for row in ROWS if "knn_top1" in row]
    assert [text.get_text() for text in overlay({"a": ROWS}, "other", title="").axes[0].texts] == ["nothing measured"]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_lines_and_letters_stand_out_from_the_paper(theme):
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    def contrast(one: str, other: str) -> float:
        low, high = sorted([luminance(one), luminance(other)])
        return (high + 0.05) / (low + 0.05)

    assert contrast(theme.ink, theme.paper) > 7 and contrast(theme.muted, theme.paper) > 4.5
    # Words are written in blue and orange, too; the others are of lines and points.
    assert min(contrast(theme.blue, theme.paper), contrast(theme.orange, theme.paper)) > 3.5
    assert all(contrast(each, theme.paper) > 1.7 for each in theme.classes)
    assert len(set(theme.classes)) == 8
