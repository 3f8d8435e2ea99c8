"""embed, search and explore as a person types them, on real files."""

import json
import re
import shutil
import signal
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco.cli import main
from moco.embeddings.duplicates import duplicates, outliers
from moco.embeddings.search import search
from moco.embeddings.table import load


@pytest.fixture(scope="module")
def table(run: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("table") / "emb"
    (photos / "in" / "cats" / "broken.jpg").write_text("this is no image")
    assert main(["embed", str(run), str(photos / "in"), "-o", str(out), "--precision", "fp32"]) == 0
    return out


def test_embed_writes_the_folder_and_says_what_was_not_read(table, run, photos, capsys):
    assert {path.name for path in table.iterdir()} >= {"vectors.npy", "images.csv", "unreadable.csv", "meta.json"}
    assert main(["embed", str(run), str(photos / "in"), "-o", str(table), "--precision", "fp32", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == 12 == len(np.load(table / "vectors.npy")) and told["unreadable"] == 1
    assert "broken.jpg" in (table / "unreadable.csv").read_text()
    other = ["embed", str(run), str(photos / "in" / "dogs"), "-o", str(table), "--precision", "fp32"]
    assert main(other) == 2 and capsys.readouterr().err.count("\n") == 1


def test_search_prints_what_the_library_finds(table, photos, tmp_path, capsys):
    new, drawn = str(photos / "new.png"), tmp_path / "found.png"
    assert main(["search", str(table), "--query", new, "--k", "4", "--json", "--picture", str(drawn)]) == 0
    told, found = json.loads(capsys.readouterr().out), search(table, new, k=4)
    assert [each["row"] for each in told] == found.rows[0].tolist()
    assert [each["similarity"] for each in told] == pytest.approx(found.similarities[0], abs=1e-4)
    assert {each["class"] for each in told} <= {"cats", "dogs"} and told[0]["query"] == new
    with Image.open(drawn) as opened:
        assert min(opened.size) > 200
    assert main(["search", str(table), "--row", "3", "8", "--k", "2", "--farthest"]) == 0
    out = capsys.readouterr().out
    for row in search(table, [3, 8], k=2, farthest=True).rows.ravel():
        assert re.search(rf"│ {row} +│", out), out


def test_duplicates_and_outliers_are_the_librarys(table, capsys):
    assert main(["search", str(table), "--duplicates", "0.9", "--json"]) == 0
    groups, paths = duplicates(load(table), 0.9), load(table).paths
    assert groups
    assert json.loads(capsys.readouterr().out) == [
        {"group": number, "row": row, "path": paths[row]} for number, each in enumerate(groups) for row in each
    ]
    assert main(["search", str(table), "--outliers", "3", "--k", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["row"] for each in told] == outliers(load(table), 3, k=4).rows.tolist()


def test_where_nothing_is_found_it_says_so(table, capsys):
    assert main(["search", str(table), "--duplicates", "1"]) == 0
    told = capsys.readouterr()
    assert told.out == "" and told.err == "No two images are as similar as 1; try a lower threshold.\n"
    assert main(["search", str(table), "--duplicates", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_picture_of_images_that_are_gone_says_so(run, photos, tmp_path, capsys):
    shutil.copytree(photos / "in", tmp_path / "in")
    assert main(["embed", str(run), str(tmp_path / "in"), "-o", str(tmp_path / "emb")]) == 0
    shutil.rmtree(tmp_path / "in")
    capsys.readouterr()
    drawn = tmp_path / "found.png"
    assert main(["search", str(tmp_path / "emb"), "--row", "3", "--picture", str(drawn)]) == 0
    assert drawn.exists() and "The images of the table were not found (the first is" in capsys.readouterr().err
    assert main(["explore", str(tmp_path / "emb"), "--save", str(tmp_path / "map.html")]) == 2
    assert "were not found (the first is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--query IMAGE"),
        (["--row", "1", "--query", "a.png"], "--query IMAGE"),
        (["--row", "1", "--duplicates", "0.9"], "--query IMAGE"),
        (["--outliers", "3", "--picture", "a.png"], "--picture"),
        (["--duplicates", "0.9", "--farthest"], "--farthest"),
        (["--outliers", "0"], "0 outliers were asked for; expected at least 1"),
        (["--row", "1", "--farthest", "--approximate"], "leave one of them out"),
        (["--row", "12"], "12"),
        (["--query", "nowhere.png"], "nowhere.png"),
        (["--row", "1", "--k", "0"], "k is 0"),
    ],
)
def test_a_wrong_question_is_answered_in_one_line(arguments, says, table, capsys):
    assert main(["search", str(table), *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("moco: ") and err.count("\n") == 1


def test_a_folder_that_is_no_table_is_refused(tmp_path, capsys):
    assert main(["search", str(tmp_path), "--row", "1"]) == 2
    assert main(["explore", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(str(tmp_path) in line and "expected" in line for line in lines)


def test_explore_saves_one_page(table, tmp_path, capsys):
    page = tmp_path / "map.html"
    assert main(["explore", str(table), "--save", str(page), "--max", "9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"page": str(page), "images": 9}
    assert "cats" in page.read_text()


def test_explore_lays_out_by_another_method_and_keeps_each_map(table, tmp_path, capsys, monkeypatch):
    page, kept = tmp_path / "map.html", table / "layout.npz"
    assert main(["explore", str(table), "--save", str(page)]) == 0
    assert "Placed by t-SNE" in page.read_text() and kept.is_file() and not (table / "layout-pca.npz").exists()
    before = kept.stat().st_mtime_ns
    for _ in range(2):
        assert main(["explore", str(table), "--save", str(page), "--layout", "pca"]) == 0
        assert "Placed by the first two principal components" in page.read_text()
    assert (table / "layout-pca.npz").is_file() and kept.stat().st_mtime_ns == before
    assert main(["explore", str(table), "--save", str(page)]) == 0
    assert "Placed by t-SNE" in page.read_text() and kept.stat().st_mtime_ns == before
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "umap", None)
    for layout, code, says in (("umap", 1, 'pip install "moco-ssl[maps]"'), ("tsnee", 2, "tsne")):
        assert main(["explore", str(table), "--save", str(tmp_path / "none.html"), "--layout", layout]) == code
        err = capsys.readouterr().err
        assert says in err and err.startswith("moco: ") and err.count("\n") == 1
    assert not (tmp_path / "none.html").exists()


def test_explore_serves_until_ctrl_c(table, command):
    command.start("explore", table, "--no-open", "--json")
    until = time.monotonic() + 60
    while not (command.stdout.endswith("\n") or command.stderr.startswith("moco")) and time.monotonic() < until:
        time.sleep(0.05)
    told = json.loads(command.stdout)
    assert told["images"] == 12 and told["url"].startswith("http://127.0.0.1:")
    with urllib.request.urlopen(told["url"], timeout=20) as page:
        assert b"<canvas" in page.read()
    command.signal(signal.SIGINT)
    assert command.wait() == 130
    assert "Traceback" not in command.stderr
