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
    CLASS_COLOURS_DARK,
    CLASS_COLOURS_LIGHT,
    DARK,
    LIGHT,
    Alike,
    Neighbours,
    Theme,
    Views,
    confusion_matrix,
    curve_panels,
    curves,
    embedding_map,
    letters,
    neighbours,
    overlay,
    save,
    similarities,
    svg,
    thumbnail_places,
    views,
)

BLUE, ORANGE, GREEN, GREY = LIGHT.blue, LIGHT.orange, LIGHT.green, LIGHT.muted

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


def texts(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """Where each text of a figure stands."""
    found: dict[str, list[tuple[float, float]]] = {}
    for text in figure.texts:
        found.setdefault(text.get_text(), []).append(text.get_position())
    return found


def test_neighbours_are_ranked_by_similarity_the_most_and_the_least_similar_first():
    def picture(value: int) -> np.ndarray:
        return np.full((8, 8, 3) if value % 2 else (8, 8), value, dtype=np.uint8)

    rows = [
        Neighbours(
            query=picture(100 * row),
            title=f"query {row}",
            nearest=[Alike(picture(100 * row + i), f"n{row}{i}", 0.9 - i / 100) for i in (2, 1, 3)],
            farthest=[Alike(picture(100 * row + i), f"f{row}{i}", i / 100 - 0.5) for i in (5, 4)],
        )
        for row in (0, 1)
    ]
    figure = neighbours(rows)
    shown = [int(np.asarray(axes.images[0].get_array()).max()) for axes in figure.axes]
    assert shown == [100 * row + i for row in (0, 1) for i in range(6)]
    boxes = [axes.get_position() for axes in figure.axes]
    assert [box.x0 for box in boxes[:6]] == sorted(box.x0 for box in boxes[:6])
    # The name stands over the middle of its picture, the similarity under it.
    where = texts(figure)
    names = [name for row in (0, 1) for name in (f"query {row}", *(f"n{row}{i}" for i in (1, 2, 3)), f"f{row}4")]
    for name, box in zip(names, [*boxes[:5], *boxes[6:11]], strict=True):
        ((x, y),) = where[name]
        assert x == pytest.approx((box.x0 + box.x1) / 2) and y > box.y1
    assert {"image", "most similar", "least similar"} <= where.keys()
    for similarity, places in (("0.89", (1, 7)), ("-0.46", (4, 10)), ("-0.45", (5, 11))):
        for (x, y), place in zip(where[similarity], places, strict=True):
            assert x == pytest.approx((boxes[place].x0 + boxes[place].x1) / 2) and y < boxes[place].y0


def test_captions_stand_on_one_line_over_pictures_of_any_proportions_and_stay_in_their_cell():
    long = "ILSVRC2012_val_00012345.JPEG"
    figure = neighbours(
        [Neighbours(grey(1, 9, 27), long, [Alike(grey(2, 27, 9), long, 0.5)], [Alike(grey(3), "iiii", 0.1)])]
    )
    figure.draw_without_rendering()
    drawn = [text for text in figure.texts if text.get_text().startswith(("ILSV", "iiii"))]
    assert len({text.get_position()[1] for text in drawn}) == 1 and drawn[0].get_text().endswith("…")
    width = figure.get_window_extent().width
    boxes = sorted((text.get_window_extent() for text in drawn), key=lambda box: box.x0)
    assert boxes[0].x0 >= 0 and boxes[-1].x1 <= width
    assert all(one.x1 < other.x0 for one, other in zip(boxes, boxes[1:], strict=False))
    # A cell is an inch: the name fills it, and hardly more.
    assert 0.8 * 120 < boxes[0].width < 1.1 * 120


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
        [Neighbours(grey(9), "$q", [Alike(grey(1), NAMES[0], 0.9)], [Alike(grey(2), "", 0.1)])], theme=theme
    ),
    "views": lambda theme: views([Views(grey(9), NAMES[0], grey(1), grey(2))], theme=theme),
    "map": lambda theme: embedding_map(
        PLACES,
        [grey(1)] * len(thumbnail_places(PLACES, 0.03).index),
        labels=LABELS,
        classes=NAMES,
        title="$t",
        theme=theme,
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
        neighbours([Neighbours(wide, "", [Alike(tall, "", 0.9), Alike(wide, "", 0.8)], [Alike(tall, "", 0.1)])]),
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
    where = texts(figure)
    assert where.keys() == {"image", "view 1", "view 2", "c1", "c2", "c3"}
    assert where["c1"][0][0] < where["c2"][0][0] < where["c3"][0][0]


def test_thumbnails_fill_squares_of_a_grid_beside_their_points():
    places = np.random.default_rng(0).uniform(size=(400, 2))
    found = thumbnail_places(places, 0.04)
    squares = np.round(found.xy / 0.04 - 0.5)
    np.testing.assert_allclose(found.xy, (squares + 0.5) * 0.04)
    assert len(np.unique(squares, axis=0)) == len(found.index) == len(set(found.index.tolist()))
    assert np.abs(found.xy - places[found.index]).max() <= 1.5 * 0.04 + 1e-9
    # Nearly all of 400 points find one of the 625 squares, which half of that would not with a square each of its own.
    assert found.index[0] == 0 and len(found.index) > 360
    assert thumbnail_places(np.zeros((20, 2)), 0.1).index.tolist() == list(range(9))


def test_the_map_colours_classes_as_far_as_colours_go_and_names_them_beside_the_thumbnails():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 10)
    places = np.stack([labels % 4, labels // 4], axis=1) / 4 + rng.uniform(0, 0.15, (120, 2))
    names = [f"class {number}" for number in range(12)]
    shown = thumbnail_places(places, 0.04)
    figure = embedding_map(places, [grey(1)] * len(shown.index), labels=labels, classes=names, side=0.04)
    axes = figure.axes[0]
    points = axes.collections[0]
    assert np.asarray(points.get_offsets()) == pytest.approx(places)
    colours = [to_hex(colour).upper() for colour in np.asarray(points.get_facecolor())]
    assert colours[::10] == [*LIGHT.classes, LIGHT.muted, LIGHT.muted]
    frames = [to_hex(patch.get_edgecolor()).upper() for patch in axes.patches]
    assert frames == [colours[number] for number in shown.index] and len(axes.images) == len(frames)
    assert [text.get_text() for text in axes.texts] == names
    figure.draw_without_rendering()
    boxes = [patch.get_window_extent() for text in axes.texts if (patch := text.get_bbox_patch())]
    paper = figure.get_window_extent()
    for number, box in enumerate(boxes):
        assert paper.x0 <= box.x0 < box.x1 <= paper.x1 and paper.y0 <= box.y0 < box.y1 <= paper.y1
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
        assert not any(box.overlaps(image.get_window_extent()) for image in axes.images)


def test_of_many_classes_the_map_is_grey():
    places = np.random.default_rng(0).uniform(size=(30, 2))
    number = len(thumbnail_places(places, 0.3).index)
    many = embedding_map(places, [grey(1)] * number, side=0.3, labels=np.arange(30), title="$t")
    assert not many.axes[0].texts and [text.get_text() for text in many.texts] == ["$t"]
    assert {to_hex(c).upper() for c in np.asarray(many.axes[0].collections[0].get_facecolor())} == {LIGHT.muted}


def test_a_flat_map_takes_no_more_paper_than_it_needs():
    x = np.linspace(0, 1, 50)
    for places in (np.stack([x, 0.5 + 0.1 * np.sin(9 * x)], axis=1), np.full((1, 2), 0.5)):
        figure = embedding_map(places, [grey(1)] * len(thumbnail_places(places, 0.05).index), side=0.05)
        pixels = np.asarray(figure.get_size_inches())
        assert pixels[1] < 0.45 * pixels[0] or len(places) == 1
        low, high = np.asarray([figure.axes[0].get_xlim(), figure.axes[0].get_ylim()]).T
        assert (low < places.min(axis=0)).all() and (high > places.max(axis=0)).all()
        assert (high - low)[1] / (high - low)[0] == pytest.approx(pixels[1] / pixels[0], rel=1e-6)


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
    assert axes.get_title(loc="left") == "knn: accuracy 95.0 %"
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {(0, 0): "80", (1, 0): "20", (1, 1): "100"}
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b"]
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first class is the first row


def test_each_panel_is_one_of_the_curves():
    rows = [row | {"effective_rank": 20.0 + i, "alignment": 0.4, "uniformity": -3.0} for i, row in enumerate(ROWS)]
    panels = curve_panels(rows, chance=8.3, floor=2.1, baselines=BASELINES)
    assert len(panels) == 6
    apart = {label: line for figure in panels.values() for label, line in lines(figure).items()}
    assert apart == lines(draw(rows)) and lines(draw(ROWS)).items() < apart.items()
    assert apart["effective rank"][1] == [row["effective_rank"] for row in rows]


def test_runs_are_drawn_over_each_other_by_name():
    figure = overlay({"a": ROWS, "_b": ROWS[:3], "none": [{"epoch": 1.0}]}, "knn_top1", title="kNN")
    drawn = lines(figure)
    assert set(drawn) == {"a", " _b"} and drawn["a"][2] != drawn[" _b"][2]
    assert drawn["a"][1] == [row["knn_top1"] for row in ROWS if "knn_top1" in row]
    assert [text.get_text() for text in overlay({"a": ROWS}, "other", title="").axes[0].texts] == ["nothing measured"]


def test_losses_of_unlike_queues_are_drawn_as_a_share_of_chance():
    figure = overlay({"a": ROWS, "b": ROWS}, "loss", title="", unit={"a": 8.0, "b": 4.0})
    drawn = lines(figure)
    assert drawn["a"][1] == [row["loss"] / 8 for row in ROWS] and drawn["b"][1] == [row["loss"] / 4 for row in ROWS]
    assert levels(figure) == {1.0} and [text.get_text() for text in figure.axes[0].texts] == ["chance"]


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


SIGHT = {  # linear RGB as seen without one kind of cone, Machado, Oliveira and Fernandes 2009, table 1, severity 1
    "full": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_class_colours_are_told_apart_by_all_eyes(theme, sight):
    """Distances in OKLab (Ottosson 2020); 0.07 is some three times what can just be seen."""
    codes = [theme.muted, *theme.classes]
    rgb = np.asarray([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in codes])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ np.asarray(SIGHT[sight]).T
    cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    opponents = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    lab = np.cbrt(linear.clip(0, 1) @ np.asarray(cones).T) @ np.asarray(opponents).T
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=2) + np.eye(len(lab))
    assert len(set(theme.classes)) == 10 and distance.min() > 0.06
    assert distance[1:, 1:].min() > 0.07


def test_the_palettes_are_plain_lists_of_colours():
    for palette, theme in ((CLASS_COLOURS_LIGHT, LIGHT), (CLASS_COLOURS_DARK, DARK)):
        assert palette == theme.classes and all(re.fullmatch("#[0-9A-F]{6}", each) for each in palette)
        assert theme.of_class(10) == theme.of_class(-1) == theme.muted and theme.of_class(3) == palette[3]


def test_letters_that_the_font_lacks_come_from_another_or_are_named_once(monkeypatch, caplog):
    have = {letters.OWN: set(map(ord, "cat … image view 12")), "Some CJK": {ord("猫")}, "Other CJK": set()}
    monkeypatch.setattr(letters, "_letters", lambda name: frozenset(have[name]))
    monkeypatch.setattr(letters, "_wide", lambda: ("Other CJK", "Some CJK"))
    letters._say_once.cache_clear()
    assert letters.families("cat") == [letters.OWN]
    assert letters.families("cat 猫") == [letters.OWN, "Some CJK"]
    figure = views([Views(grey(1), "猫", grey(2), grey(3))])
    letters.lettered(figure, painted=True)
    (drawn,) = [text for text in figure.texts if text.get_text() == "猫"]
    assert drawn.get_fontfamily() == [letters.OWN, "Some CJK"]
    assert "no installed font" not in caplog.text
    for painted, name in ((False, "犬"), (True, "犬"), (True, "鳥")):
        letters.lettered(views([Views(grey(1), name, grey(2), grey(3))]), painted=painted)
        assert caplog.text.count("no installed font has all letters") == painted
    letters._say_once.cache_clear()
