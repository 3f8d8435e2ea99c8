import base64
import csv
import json
import os
import re
import shlex
import time
from pathlib import Path

import html5lib
import numpy as np
import pytest
import yaml

import moco
from moco.checkpoint import load_projector
from moco.cli import main
from moco.config import parse_config
from moco.data import ArrayImages, load_data
from moco.explore.command import changes, command, exact_command
from moco.explore.report import compare, page, refresh, report
from moco.explore.summary import Summary
from moco.figures import Neighbours, neighbours, save
from moco.pictures import draw_map, draw_similarities, draw_views
from moco.recipes import load_recipe
from moco.run import Run
from small import TINY

HOSTILE = ["<script>alert(1)</script>", "$\\frac$ \"quoted' & co", "猫\x00\x1b[31m", "_under", "</style></svg><b>"]
XHTML, SVG = "{http://www.w3.org/1999/xhtml}", "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    """A finished run with every picture, and an evaluation by classes of hostile names."""
    run = moco.pretrain(
        parse_config(TINY | {"monitor": {"knn_k": 20, "log_every": 5}}), out=tmp_path_factory.mktemp("runs") / "first"
    )
    images = load_data(run.config.data).train.select(range(0, 1440, 10))
    encoder = moco.load_encoder(run.path)
    draw_views(run, images)
    draw_map(run, encoder, images)
    draw_similarities(run, encoder, load_projector(run), images)
    square = np.zeros((8, 8), dtype=np.uint8)
    save(neighbours([Neighbours(square, "a", [(square, "b")], [(square, "c")])]), run.path / "neighbours.svg")
    evaluation(run, HOSTILE)
    return run


def evaluation(run: Run, names: list[str]) -> None:
    counts = (8 * np.eye(len(names), dtype=int) + 1).tolist()
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
    """The tree of a page, by a parser that raises at the first thing that is not HTML5."""
    return html5lib.HTMLParser(strict=True).parse(html)


def texts(tree, tag: str) -> list[str]:
    return ["".join(each.itertext()) for each in tree.iter(XHTML + tag)]


def test_the_page_is_valid_html_with_every_part_of_the_run(trained):
    path = report(trained)
    assert path == trained.path / "report.html"
    tree = parsed(path.read_text(encoding="utf-8"))
    ids = [each.get("id") for each in tree.iter() if each.get("id")]
    assert len(ids) == len(set(ids))
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
        kind, _, content = each.get("src").partition(";base64,")
        assert kind == "data:image/svg+xml" and each.get("alt")
        assert base64.b64decode(content) in [file.read_bytes() for file in trained.path.glob("*.svg")]
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


def test_before_the_first_numbers_the_page_says_so_and_loads_itself_again(tmp_path):
    run = made_by_hand(tmp_path / "run")
    tree = parsed(page(run))
    assert tree.find(f"{XHTML}head/{XHTML}meta[@http-equiv='refresh']").get("content") == "30"
    words = "".join(tree.itertext())
    assert "not finished: before the first numbers" in words and "Nothing has been measured yet" in words
    assert not list(tree.iter(SVG + "svg"))


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
    assert "Health: not collapsed" in texts(tree, "h2")
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
    assert again | {"engine": 0} == given.model_dump(mode="json") | {"engine": 0}
    program, *arguments = shlex.split(exact_command(run))
    assert main([*arguments, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == given.model_dump(mode="json")
    assert command(run) in "".join(parsed(page(run)).itertext())
    assert "engine" not in command(run) and "--model.symmetric true" in command(run)


def test_a_recipe_says_what_to_expect_and_what_was_changed(tmp_path):
    plain = Run.create(tmp_path / "plain", load_recipe("digits"))
    words = "".join(parsed(page(plain)).itertext())
    assert "Expected of this recipe: kNN" in words and "settings was changed" not in words
    assert command(plain) == "moco pretrain digits"
    own = Run.create(tmp_path / "own", parse_config(TINY))
    assert command(own) == exact_command(own) and changes(own.config) is None
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
    refresh(run)
    assert "report.html could not be written" in caplog.text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no run"):
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
    assert not re.search(r"https?:", html) and "<b>" not in html
    names = [f"{trained.path.parent.name}/first", f"{tmp_path.name}/_<b>$x$", "deep/first"]
    tables = list(tree.iter(XHTML + "table"))
    cells = [[["".join(c.itertext()).strip() for c in row] for row in each.iter(XHTML + "tr")] for each in tables]
    results, settings, last = cells
    assert [row[0] for row in results[1:]] == names
    assert [row for row in settings if not row[0].startswith(("engine.", "monitor."))] == [
        ["setting", *names],
        ["seed", "0", "3", "0"],
        ["epochs", "1", "5", "1"],
    ]
    assert last[0] == ["column", *names]
    by_column = {row[0]: row[1:] for row in last[1:]}
    assert by_column["loss"][1:] == ["3.125", "3.25"] and by_column["knn_top1"][1:] == ["40.5", ""]
    with (trained.path / "metrics.csv").open(newline="") as file:
        assert by_column["loss"][0] == list(csv.DictReader(file))[-1]["loss"]
    drawn = ["".join(each.itertext()).strip() for each in tree.iter(SVG + "text")]
    assert {"kNN accuracy, %", "InfoNCE loss", "deep/first"} <= set(drawn)
    ids = [each.get("id") for each in tree.iter() if each.get("id")]
    assert len(ids) == len(set(ids))


def test_pictures_are_drawn_without_labels_and_of_few_images(tmp_path, trained):
    """Three unlabelled images: too few for t-SNE, and no classes to colour by."""
    some = load_data(trained.config.data).train
    assert isinstance(some, ArrayImages)
    few = ArrayImages(some.images[:3], labels=None, classes=None, paths=some.paths[:3])
    run = made_by_hand(tmp_path / "run")
    draw_views(run, few)
    draw_map(run, moco.load_encoder(trained.path), few)
    assert [each.name for each in Summary(run).pictures] == ["views", "map"]
