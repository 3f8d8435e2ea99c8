import csv
import json
import os
import re
import shlex
import time
from pathlib import Path
from urllib.parse import unquote_to_bytes

import html5lib
import numpy as np
import pytest
import yaml

import moco
from moco.cli import main
from moco.config import merge, parse_config
from moco.data import ArrayImages, Splits, load_data
from moco.evaluate import held_out
from moco.figures import Alike, Neighbours, Views, embedding_map, neighbours, save, thumbnail_places, views
from moco.recipes import load_recipe
from moco.report.page import compare, page, refresh, report
from moco.report.pictures import (
    MAX_MAPPED,
    NUM_NEIGHBOURS,
    NUM_QUERIES,
    NUM_VIEWED,
    PIXELS,
    SIDES,
    THUMBNAIL,
    draw_map,
    draw_neighbours,
    draw_results,
    draw_similarities,
    draw_start,
)
from moco.report.rerun import changes, command, exact_command, wants_settings
from moco.report.summary import Summary
from moco.storage.encoder_files import load_projector
from moco.storage.run import Run
from small import TINY

HOSTILE = ["<script>alert(1)</script>", "$\\frac$ \"quoted' & co", "猫\x00\x1b[31m", "_under", "</style></svg><b>"]
XHTML, SVG = "{http://www.w3.org/1999/xhtml}", "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    """A finished run with every picture, and an evaluation by classes of hostile names."""
    run = moco.pretrain(
        parse_config(TINY | {"monitor": {"knn_k": 20, "log_every": 5}}), out=tmp_path_factory.mktemp("runs") / "first"
    )
    splits = load_data(run.config.data)
    draw_start(run, splits)
    images = splits.train.select(range(0, 1440, 10))
    encoder = moco.load_encoder(run.path)
    draw_map(run, encoder, images)
    draw_similarities(run, encoder, load_projector(run), images)
    square = np.zeros((8, 8), dtype=np.uint8)
    save(
        neighbours([Neighbours(square, "a", [Alike(square, "b", 0.9)], [Alike(square, "c", 0.1)])]),
        run.path / "neighbours.svg",
    )
    evaluation(run, HOSTILE)
    return run


def evaluation(run: Run, names: list[str]) -> None:
    counts = (8 * np.eye(len(names), dtype=int) + 1).tolist() if len(names) <= 100 else "knn.confusion.npy"
    per_class = {name: 100 * 9 / (8 + len(names)) for name in names}
    run.write_json(
        "evaluations/knn.json",
        {
            "name": "knn",
            "data": "digits",
            "figures": {"top1": 69.23076923076923},
            "per_class": per_class,
            "confusion": counts,
            "notes": ["as <b>published</b>"],
            "settings": {},
        },
    )


def made_by_hand(folder: Path, columns: str = "", rows: tuple[str, ...] = (), **settings: object) -> Run:
    run = Run.create(folder, parse_config(TINY | settings))
    if columns:
        run.write_text("metrics.csv", "\n".join([columns, *rows]) + "\n")
    return run


def parsed(html: str):
    """The tree of a page, by a parser that raises at the first thing that is no HTML5 syntax."""
    return html5lib.HTMLParser(strict=True).parse(html)


BLOCKS = {"section", "div", "p", "ul", "ol", "dl", "table", "figure", "pre", "details", "h1", "h2", "h3", "main", "nav"}
WITHIN = {  # what an element may stand in
    "li": {"ul", "ol"},
    "dt": {"dl"},
    "dd": {"dl"},
    "tr": {"thead", "tbody"},
    "td": {"tr"},
    "th": {"tr"},
    "thead": {"table"},
    "tbody": {"table"},
    "summary": {"details"},
    "main": {"body"},
    "title": {"head"},
}
NEEDED = {
    "html": {"lang"},
    "img": {"src", "alt"},
    "svg": {"role", "aria-label"},
    "data": {"value"},
    "time": {"datetime"},
    "th": {"scope"},
    "a": {"href"},
    "nav": {"aria-label"},
}


def complaints(tree) -> list[str]:
    """What is wrong with a page beyond its syntax, as far as these rules of HTML tell.

    They are of ids, nesting, attributes that have to be there, headings, tables and their columns, and what a keyboard
    can reach. It is no whole validator.
    """
    found = []
    ids = [each.get("id") for each in tree.iter() if each.get("id")]
    found += [f"id {each} twice" for each in set(ids) if ids.count(each) > 1]
    parents = {child: parent for parent in tree.iter() for child in parent}
    levels = [0]
    for each in tree.iter():
        if not isinstance(each.tag, str) or not each.tag.startswith((XHTML, SVG + "svg")):
            continue
        tag = each.tag.rpartition("}")[2]
        above = parents[each].tag.rpartition("}")[2] if each in parents else ""
        if tag in WITHIN and above not in WITHIN[tag]:
            found.append(f"{tag} in {above}")
        if above in ("p", "span", "strong", "a", "h1", "h2", "h3", "pre", "code", "summary") and tag in BLOCKS:
            found.append(f"{tag} in {above}")
        found += [f"{tag} without {name}" for name in NEEDED.get(tag, ()) if not each.get(name)]
        if tag in ("h1", "h2", "h3"):
            level = int(tag[1])
            found += [f"{tag} after h{levels[-1]}"] if level > levels[-1] + 1 else []
            found += [f"empty {tag}"] if not "".join(each.itertext()).strip() else []
            levels.append(level)
        if tag == "table":
            widths = {len([c for c in row if c.tag in (XHTML + "td", XHTML + "th")]) for row in each.iter(XHTML + "tr")}
            found += [f"rows of {sorted(widths)} cells"] if len(widths) != 1 else []
        if "scroll" in (each.get("class") or "").split() and not (each.get("tabindex") and each.get("aria-label")):
            found.append("a part that scrolls out of the keyboard's reach")
        if tag == "a" and (each.get("href") or "")[1:] not in ids:
            found.append(f"link to nowhere {each.get('href')}")
    return [*found, *(["not one h1"] if levels.count(1) != 1 else [])]


def texts(tree, tag: str) -> list[str]:
    return ["".join(each.itertext()) for each in tree.iter(XHTML + tag)]


def test_the_page_parses_and_keeps_the_rules_of_html_that_are_checked_here(trained):
    tree = parsed(report(trained).read_text(encoding="utf-8"))
    assert complaints(tree) == []
    for spoilt, what in (
        ('<p id="a"></p><p id="a"></p>', "id a twice"),
        ("<ul><p>x</p></ul><p><table></table></p>", None),
        ('<img src="#">', "img without alt"),
        ("<span><div></div></span>", "div in span"),
        ("<table><tbody><tr><td></td></tr><tr><td></td><td></td></tr></tbody></table>", "rows of [1, 2] cells"),
        ("<h1>x</h1><h3>y</h3>", "h3 after h1"),
    ):
        of = html5lib.parse(f'<!DOCTYPE html><html lang="en"><head><title>t</title></head><body>{spoilt}</body></html>')
        assert what is None or what in complaints(of)


def test_the_page_has_every_part_of_the_run(trained):
    path = report(trained)
    assert path == trained.path / "report.html"
    tree = parsed(path.read_text(encoding="utf-8"))
    parts = {"what", "result", "health", "curves", "views", "neighbours", "map", "similarities", "numbers", "again"}
    assert parts == {section.get("id") for section in tree.iter(XHTML + "section")}
    assert {link.get("href")[1:] for link in tree.iter(XHTML + "a")} == parts
    # Six curves, the confusion matrix, and four pictures of the folder.
    drawn = list(tree.iter(SVG + "svg"))
    assert len(drawn) == (7 if "effective_rank" in trained.metrics[-1] else 5)
    assert all(
        each.get("role") == "img" and each.get("aria-label") and each.get("viewbox", each.get("viewBox"))
        for each in drawn
    )
    pictures = list(tree.iter(XHTML + "img"))
    assert len(pictures) == 4
    for each in pictures:
        kind, _, content = each.get("src").partition(",")
        assert kind == "data:image/svg+xml" and each.get("alt")
        assert not set(each.get("src")) & set(' \n"<>[]')  # what no URI may hold
        assert unquote_to_bytes(content) in [file.read_bytes() for file in trained.path.glob("*.svg")]
    assert tree.find(f"{XHTML}head/{XHTML}meta[@http-equiv='refresh']") is None
    assert tree.get("lang") == "en"


def test_the_page_fetches_nothing_and_runs_nothing(trained):
    html = report(trained).read_text(encoding="utf-8")
    assert not re.search(r"https?:", html)
    tree = parsed(html)
    tags = {each.tag.rpartition("}")[2] for each in tree.iter() if isinstance(each.tag, str)}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio"})
    for each in tree.iter():
        for name, value in each.attrib.items():
            assert not str(name).startswith("on")
            if str(name).rpartition("}")[2] in ("src", "href", "srcset", "data", "action"):
                assert value.startswith(("#", "data:image/"))
    assert not re.search(r"@import|url\((?!#)", html)
    policy = tree.find(f"{XHTML}head/{XHTML}meta[@http-equiv='Content-Security-Policy']").get("content")
    assert "default-src 'none'" in policy and "script" not in policy


@pytest.mark.slow
def test_a_page_of_noisy_photos_and_a_thousand_classes_stays_under_five_megabytes(tmp_path):
    """Noise as rough as that of photos; of each picture as many pixels as a run draws."""
    run = made_by_hand(tmp_path / "run", "step,epoch,loss", tuple(f"{i},{i / 10},{5 - i / 1000}" for i in range(900)))
    rng = np.random.default_rng(0)

    def noise(side: int) -> np.ndarray:
        # As strong at every scale, as photos are.
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")) + 1 / side
        waves = np.exp(2j * np.pi * rng.uniform(size=(3, *frequency.shape))) / frequency
        pixels = np.fft.irfft2(waves, s=(side, side)).transpose(1, 2, 0)
        return (128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)

    alike = [Alike(noise(PIXELS), "name", 0.5)] * NUM_NEIGHBOURS
    save(neighbours([Neighbours(noise(PIXELS), "name", alike, alike)] * NUM_QUERIES), run.path / "neighbours.svg")
    save(views([Views(noise(PIXELS), "name", noise(224), noise(224))] * NUM_VIEWED), run.path / "views.svg")
    places = rng.uniform(size=(MAX_MAPPED, 2)).astype(np.float32)
    number = len(thumbnail_places(places, SIDES[0]).index)
    assert number > 600
    mapped = embedding_map(places, [noise(THUMBNAIL)] * number, side=SIDES[0])
    save(mapped, run.path / "map.svg")
    names = [f"a class whose name is long {i}" for i in range(1000)]
    evaluation(run, names)
    np.save(run.path / "evaluations/knn.confusion.npy", rng.integers(0, 50, (1000, 1000)))
    html = page(run)
    # To parse so long a page would take a while.
    assert all(f'<section id="{name}">' in html for name in ("views", "neighbours", "map"))
    assert 'aria-label="Confusion matrix of knn' in html and names[-1] in html
    assert len(html.encode()) < 5e6


def test_the_table_holds_the_text_of_the_metrics(trained):
    with (trained.path / "metrics.csv").open(newline="") as file:
        written = list(csv.reader(file))
    tree = parsed(page(trained))
    table = next(each for each in tree.iter(XHTML + "table") if each.get("class") == "raw")
    shown = [["".join(c.itertext()) for c in row if c.tag != "x"] for row in table.iter(XHTML + "tr")]
    assert shown == written and len(written) > 2


def test_every_accuracy_shown_is_that_of_the_results(trained):
    tree = parsed(page(trained))
    section = next(each for each in tree.iter(XHTML + "section") if each.get("id") == "result")
    table = next(section.iter(XHTML + "table"))
    for row in list(table.iter(XHTML + "tr"))[1:]:
        who, *cells = ["".join(cell.itertext()) for cell in row]
        exact = [float(each.get("value")) for each in row.iter(XHTML + "data")]
        assert exact == list(trained.results[who].values())
        assert cells == [f"{value:.1f}" for value in exact]
    assert {"raw pixels", "untrained encoder", "trained encoder"} == set(trained.results)


def test_the_curves_of_the_page_run_through_the_rows_of_the_metrics(trained):
    """Each line of the page's SVG, from its own points back to numbers by the ticks of its axes."""
    tree = parsed(page(trained))
    metrics = trained.metrics
    for label, columns in (
        ("loss", ["loss"]),
        ("similarities", ["positive", "negative", "spread"]),
        ("kNN accuracy", ["knn_top1", "knn_projection_top1"]),
    ):
        drawing = next(each for each in tree.iter(SVG + "svg") if each.get("aria-label") == label)
        groups = {each.get("id").partition("-")[2]: each for each in drawing.iter(SVG + "g") if each.get("id")}

        def scale(axis: str, groups: dict = groups) -> tuple[float, float]:
            """Slope and offset: place of a tick to its number."""
            pairs = []
            for name, group in groups.items():
                if re.fullmatch(rf"{axis}tick_\d+", name):
                    text = "".join(group.itertext()).strip().replace("\N{MINUS SIGN}", "-")
                    marks = [use for use in group.iter(SVG + "use")]
                    pairs.append((float(marks[0].get(axis)), float(text)))
            places, numbers = np.transpose(pairs)
            slope, offset = np.polyfit(places, numbers, 1)
            return float(slope), float(offset)

        (across, left), (up, low) = scale("x"), scale("y")
        drawn = []
        for name, group in groups.items():
            if re.fullmatch(r"line2d_\d+", name) and "tick" not in name:
                for path in group.iter(SVG + "path"):
                    points = re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path.get("d") or "")
                    drawn.append([(across * float(x) + left, up * float(y) + low) for x, y in points])
        for column in columns:
            want = [(row["epoch"], row[column]) for row in metrics if column in row]
            if len(want) > 1:
                span = max(y for _, y in want) - min(y for _, y in want)
                near = [line for line in drawn if len(line) == len(want)]
                assert any(np.allclose(line, want, rtol=0, atol=0.02 * max(span, 0.05)) for line in near), column


def test_every_figure_of_an_evaluation_is_told_exactly(trained):
    tree = parsed(page(trained))
    of = json.loads((trained.path / "evaluations/knn.json").read_text())
    table = next(each for each in tree.iter(XHTML + "table") if each.get("class") == "figures")
    shown = {"".join(row[0].itertext()): float(row[1][0].get("value")) for row in table.find(XHTML + "tbody")}
    assert shown == of["figures"]
    assert "top-1 69.2 % on digits" in " ".join("".join(tree.itertext()).split())


def test_notes_of_a_health_evaluation_stand_under_health_and_its_figures_in_a_table(tmp_path):
    run = made_by_hand(tmp_path / "run", "step,epoch,loss,spread", ("10,1.5,6.1,0.4",))
    record = {"name": "health", "data": "digits", "figures": {"effective_rank": 56.53196716308594, "dead": 0.0}}
    run.write_json("evaluations/health.json", record | {"per_class": {}, "confusion": None, "notes": ["All is well."]})
    tree = parsed(page(run))
    parts = {each.get("id"): " ".join("".join(each.itertext()).split()) for each in tree.iter(XHTML + "section")}
    assert "All is well." in parts["health"] and "All is well." not in parts["result"]
    assert "All figures of health" in parts["health"] and "effective_rank56.53" in parts["health"]
    assert parts["health"].index("All is well.") < parts["health"].index("effective_rank")


def test_health_is_told_by_the_last_numbers_and_their_trend(tmp_path):
    header = "step,epoch,loss,pretext_accuracy,spread,effective_rank,alignment,uniformity,knn_top1"
    rows = [f"{i},{i / 10},{9 - i / 10:.2f},{i},0.5,20.4,0.31,-2.5,{40 + i}" for i in range(10, 101, 2)]
    of = Summary(made_by_hand(tmp_path / "run", header, tuple(rows), epochs=20))
    chance, floor = of.loss_range
    assert of.health == (
        "not collapsed",
        [
            f"The loss is -1.00; {chance:.2f} would be chance and {floor:.2f} the floor, where views of an image agree "
            "and all other images are unrelated.",
            "For 100 % of the queries, their own key was the nearest of all.",
            "The spread of the keys is 0.50: 0 is collapsed, 1 is uniform in all directions.",
            "The features use about 20 directions (effective rank); a value near 1 means collapse. Compare it "
            "between runs on the same images.",
            "Alignment is 0.31 (0: views of an image look the same to the encoder), uniformity -2.50 (0 is collapsed; "
            "lower is more uniform).",
            "Over the last fifth of the training so far (epochs 8.0 to 10.0), the loss went from 1 to -1, kNN accuracy "
            "from 120.0 to 140.0 %, and the spread of the keys from 0.50 to 0.50.",
        ],
    )
    early = Summary(made_by_hand(tmp_path / "early", header, (rows[0].replace("10,1.0", "9,0.9"),)))
    assert early.health[0] == "too early to say" and not any("last fifth" in each for each in early.health[1])


@pytest.mark.parametrize(
    "parted, asked, words",
    [
        ("test", "A few test images, which were not trained on", "Each test image, which was not trained on"),
        ("tenth", "A few of every tenth training image", "There are no test images: every tenth training image"),
        ("none", "A few training images, with those of all 60 training images", "The images have no labels"),
    ],
)
def test_the_page_says_which_images_were_asked_about_and_how_many_are_shown(trained, tmp_path, parted, asked, words):
    splits = load_data(trained.config.data)
    train, test = splits.train.select(range(60)), splits.test
    assert isinstance(train, ArrayImages)
    if parted == "none":
        train = ArrayImages(train.images, labels=None, classes=None, paths=train.paths)
    splits = Splits(train, test if parted == "test" else None)
    run = made_by_hand(tmp_path / "run")
    measured = {} if parted == "none" else {"knn_top1": 50.0}
    run.write_json("results.json", {"raw pixels": measured})
    draw_start(run, splits)
    held = None if parted == "none" else held_out(splits)
    encoder = moco.load_encoder(trained.path)
    draw_neighbours(run, encoder, *(held or (train, train)))
    draw_map(run, encoder, train)
    told = " ".join("".join(parsed(page(run)).itertext()).split())
    assert asked in told and words in told and "All 60 training images on a plane" in told
    assert ("not trained on" in told) == (parted == "test")


def test_a_picture_that_cannot_be_drawn_is_named_and_the_others_are_drawn(trained, tmp_path, monkeypatch, caplog):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no room\nfor t-SNE")

    monkeypatch.setattr("moco.report.pictures.coordinates", broken)
    run = made_by_hand(tmp_path / "run")
    images = load_data(trained.config.data).train.select(range(40))
    draw_results(run, moco.load_encoder(trained.path), load_projector(trained), images, None)
    assert "map.svg could not be drawn: RuntimeError: no room for t-SNE" in caplog.text
    assert {each.name for each in run.path.iterdir()} >= {"curves.png", "neighbours.svg", "similarities.svg"}
    assert not (run.path / "map.svg").exists()


def test_of_many_rows_some_are_shown_and_always_the_last(tmp_path):
    rows = tuple(f"{i},{i / 10},{5 - i / 1000}" for i in range(1, 1002))
    summary = Summary(made_by_hand(tmp_path / "long", "step,epoch,loss", rows))
    shown = [row["step"] for row in summary.shown_rows]
    assert len(shown) <= 200 and shown[-1] == "1001" and len(set(np.diff([int(s) for s in shown]))) == 1


def test_hostile_names_are_text(trained, tmp_path):
    html = page(trained)
    assert "<script" not in html and "</svg><b>" not in html and "<b>published" not in html
    tree = parsed(html)
    expected = [name.replace("\x00", "\ufffd").replace("\x1b", "\ufffd") for name in HOSTILE]
    assert [name for name in texts(tree, "th") if name in expected] == expected
    drawn = ["".join(each.itertext()) for each in tree.iter(SVG + "text")]
    assert any(name.startswith("<script>alert(") for name in drawn) and "$\\frac$ \"quoted' …" in drawn
    evil = tmp_path / "a<img src=x onerror=alert(1)>$b$"
    Run.create(evil, trained.config)
    tree = parsed(report(evil).read_text(encoding="utf-8"))
    assert texts(tree, "h1") == [evil.name] and not list(tree.iter(XHTML + "img"))


@pytest.mark.parametrize(
    "broken",
    [
        ("results.json", "{"),
        ("results.json", '["a"]'),
        ("results.json", '{"trained encoder": {"knn_top1": "<b>"}}'),
        ("environment.json", "null"),
        ("evaluations/x.json", '{"name": 1}'),
        (
            "evaluations/x.json",
            '{"name":"x","data":"d","figures":{},"per_class":{"a":1},"confusion":[[1,2]],"notes":[]}',
        ),
        ("metrics.csv", "step,epoch,loss\n3,0.1,2.5\n4,0.2"),
        ("metrics.csv", "step,epoch,loss\n3,0.1,<b>\n"),
        ("metrics.csv", ""),
        ("map.svg", "<html>"),
        ("log.txt", "\udcff"),
    ],
)
def test_a_file_that_is_cut_short_or_something_else_is_left_out(tmp_path, broken):
    run = made_by_hand(tmp_path / "run")
    name, text = broken
    path = run.path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    html = page(run)
    parsed(html)
    assert "<b>" not in html


def test_a_page_loads_itself_again_only_while_its_run_trains(tmp_path):
    run = made_by_hand(tmp_path / "run")
    path = run.path / "report.html"

    def told() -> tuple[str, str]:
        tree = parsed(path.read_text(encoding="utf-8"))
        again = tree.find(f"{XHTML}head/{XHTML}meta[@http-equiv='refresh']")
        return "" if again is None else again.get("content"), " ".join("".join(tree.itertext()).split())

    assert refresh(run)
    content, words = told()
    assert content == "30" and "reloads every 30 seconds" in words
    assert "not finished: before the first numbers" in words and "Nothing has been measured yet" in words
    assert "<svg" not in path.read_text(encoding="utf-8")
    assert not refresh(run, live=False) and told()[0] == "30"  # it has just been written
    assert refresh(run, between=0, live=False)
    content, words = told()
    assert not content and "updated during training" not in words
    assert f"Resume the run with moco pretrain --resume {shlex.quote(str(run.path.resolve()))}." in words
    assert re.search(r"last written \d\d:\d\d on \d\d [A-Z][a-z]+ \d{4}", words)
    run.write_json("results.json", {"trained encoder": {}})
    assert refresh(run, between=0)
    content, words = told()
    assert not content and "finished: before" in words and "Resume the run" not in words


def test_without_labels_there_is_no_table_of_accuracies(tmp_path):
    rows = ("10,0.5,6.1,0.4", "20,1.0,5.9,0.05")
    run = made_by_hand(tmp_path / "run", "step,epoch,loss,spread", rows)
    run.write_json("results.json", {"raw pixels": {}, "untrained encoder": {}, "trained encoder": {}})
    tree = parsed(page(run))
    assert "The images have no labels" in "".join(tree.itertext())
    assert not any(each.get("class") == "results" for each in tree.iter(XHTML + "table"))
    assert "Health: collapsed" in texts(tree, "h2")
    assert len(list(tree.iter(SVG + "svg"))) == 4


def test_one_row_is_enough_for_a_page(tmp_path):
    run = made_by_hand(tmp_path / "run", "step,epoch,loss,spread,knn_top1", ("10,0.5,6.1,0.4,",))
    tree = parsed(page(run))
    assert "Health: too early to say" in texts(tree, "h2")
    assert "epoch 0.5 of 1" in "".join(tree.itertext())


def test_a_png_serves_where_there_is_no_svg_and_nothing_else_does(tmp_path):
    run = made_by_hand(tmp_path / "run")
    (run.path / "neighbours.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    (run.path / "views.png").write_bytes(b"<svg onload='alert(1)'>")
    assert [(each.name, each.source[:15]) for each in Summary(run).pictures] == [("neighbours", "data:image/png;")]


def test_the_command_given_trains_with_the_same_settings(trained, tmp_path, capsys):
    recipe = load_recipe("digits")
    given = parse_config(
        recipe.model_dump()
        | {"epochs": 7, "steps": 9, "data": recipe.data.model_dump() | {"source": "my 'photos' & $HOME"}}
        | {"model": recipe.model.model_dump() | {"symmetric": True, "queue_size": 512, "bn_splits": 4}}
        | {"optim": recipe.optim.model_dump() | {"schedule": "step", "milestones": (3, 5), "warmup_epochs": 0.5}}
        | {"engine": recipe.engine.model_dump() | {"accelerator": "cpu", "precision": "bf16"}}
    )
    run = Run.create(tmp_path / "run", given)
    program, *arguments = shlex.split(command(run))
    assert program == "moco" and main([*arguments, "--print_config"]) == 0
    again = yaml.safe_load(capsys.readouterr().out)
    assert again["data"].pop("source") == "YOUR_IMAGES"
    again["data"]["source"] = given.data.source
    assert again | {"engine": 0} == given.model_dump(mode="json") | {"engine": 0}
    program, *arguments = shlex.split(exact_command(run))
    assert main([*arguments, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == given.model_dump(mode="json")
    assert command(run) in "".join(parsed(page(run)).itertext())
    assert str(tmp_path.resolve()) in exact_command(run) and "$HOME" not in command(run)
    assert "engine" not in command(run) and "--model.symmetric true" in command(run)


def test_a_recipe_says_what_to_expect_and_what_was_changed(tmp_path):
    plain = Run.create(tmp_path / "plain", load_recipe("digits"))
    words = "".join(parsed(page(plain)).itertext())
    assert "Expected of this recipe: kNN" in words and "settings was changed" not in words
    assert command(plain) == "moco pretrain digits"
    moved = Run.create(tmp_path / "moved", merge(load_recipe("digits"), {"data": {"source": "/my/own"}, "epochs": 3}))
    words = " ".join("".join(parsed(page(moved)).itertext()).split())
    assert "here, 1 of its settings was changed" in words and "here it was /my/own" in words
    assert set(shlex.split(command(moved))) == {*"moco pretrain digits --data.source YOUR_IMAGES --epochs 3".split()}
    own = Run.create(tmp_path / "own", parse_config(TINY))
    assert wants_settings(own) and command(own) == "moco pretrain config.yaml" and changes(own.config) is None
    other = Run.create(tmp_path / "other", merge(own.config, {"data": {"source": "photos"}}))
    assert command(other) == "moco pretrain config.yaml --data.source YOUR_IMAGES"
    words = " ".join("".join(parsed(page(other)).itertext()).split())
    assert "save the settings below as config.yaml, then: moco pretrain config.yaml" in words
    assert "Expected of this recipe" not in page(own)


def test_the_page_says_on_how_many_images_and_which_machine(trained):
    words = " ".join("".join(parsed(page(trained)).itertext()).split())
    assert "1,442 images of digits" in words
    assert json.loads((trained.path / "environment.json").read_text())["versions"]["torch"] in words


def test_writing_is_all_or_nothing(trained, tmp_path, monkeypatch):
    path = report(trained, tmp_path / "page.html")
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        report(trained, path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["page.html"]


def test_a_refresh_waits_and_never_stops_training(tmp_path, caplog):
    run = made_by_hand(tmp_path / "run")
    path = run.path / "report.html"
    refresh(run)
    first = path.stat().st_mtime_ns
    refresh(run)
    assert path.stat().st_mtime_ns == first
    os.utime(path, (time.time() - 61, time.time() - 61))
    refresh(run)
    assert path.stat().st_mtime > time.time() - 30
    path.unlink()
    path.mkdir()
    os.utime(path, (0, 0))
    assert not refresh(run)
    assert "report.html could not be written" in caplog.text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run"):
        report(tmp_path)
    with pytest.raises(ValueError, match="at least two"):
        compare([made_by_hand(tmp_path / "run")], tmp_path / "c.html")


def test_runs_stand_side_by_side(trained, tmp_path):
    other = made_by_hand(
        tmp_path / "_<b>$x$", "step,epoch,loss,knn_top1", ("1,0.1,3.25,40.5", "2,0.2,3.125,"), epochs=5, seed=3
    )
    same = made_by_hand(tmp_path / "deep" / "first", "step,epoch,loss", ("1,0.1,3.25",))
    path = compare([trained, other.path, same], tmp_path / "comparison.html")
    html = path.read_text(encoding="utf-8")
    tree = parsed(html)
    assert not re.search(r"https?:", html) and "<b>" not in html and complaints(tree) == []
    names = [f"{trained.path.parent.name}/first", f"{tmp_path.name}/_<b>$x$", "deep/first"]
    tables = list(tree.iter(XHTML + "table"))
    cells = [[["".join(c.itertext()).strip() for c in row] for row in each.iter(XHTML + "tr")] for each in tables]
    # On a phone each value says which run, or what, it is of.
    for each in (value for table in tables for value in table.iter(XHTML + "td")):
        assert each.get("data-of") in {*names, "kNN, all labels", "one label per class", "five labels per class"}
    results, settings, last = cells
    assert [row[0] for row in results[1:]] == names
    assert [row for row in settings if not row[0].startswith(("engine.", "monitor."))] == [
        ["setting", *names],
        ["seed", "0", "3", "0"],
        ["epochs", "1", "5", "1"],
    ]
    assert last[0] == ["column", *names]
    by_column = {row[0]: row[1:] for row in last[1:]}
    assert by_column["loss"][1:] == ["3.125", "3.25"] and by_column["knn_top1"][1:] == ["40.5", "–"]
    exact = [each.get("value") for each in tables[2].iter(XHTML + "data")]
    with (trained.path / "metrics.csv").open(newline="") as file:
        loss = list(csv.DictReader(file))[-1]["loss"]
    assert loss in exact and by_column["loss"][0] == f"{float(loss):.4g}"
    drawn = ["".join(each.itertext()).strip() for each in tree.iter(SVG + "text")]
    assert {"kNN accuracy, %", "InfoNCE loss / chance", "chance", "deep/first"} <= set(drawn)


def test_pictures_are_drawn_without_labels_and_of_few_images(tmp_path, trained):
    """Three unlabelled images: too few for t-SNE, and no classes to colour by."""
    some = load_data(trained.config.data).train
    assert isinstance(some, ArrayImages)
    few = ArrayImages(some.images[:3], labels=None, classes=None, paths=some.paths[:3])
    run = made_by_hand(tmp_path / "run")
    draw_start(run, Splits(few, None))
    draw_map(run, moco.load_encoder(trained.path), few)
    assert [each.name for each in Summary(run).pictures] == ["views", "map"]
