"""The map in a real browser. Its layout is set by hand, so that a test knows where each image is on the screen."""

import csv
import io
import math
import os
import re
import shutil
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import moco
from moco.data import ArrayImages
from moco.explore.atlas import Atlas, open_atlas
from moco.explore.layout import Layout
from moco.explore.server import serve
from moco.explore.single_file import SCRIPTS, save_page
from moco.figures import CLASS_COLOURS_DARK, CLASS_COLOURS_LIGHT
from moco.method.encoder import ImageEncoder

REQUIRED = os.environ.get("MOCO_BROWSER") == "required"
"""Where a browser has to be, as in CI, that there is none fails the tests."""
if REQUIRED:
    import playwright.sync_api as sync_api
else:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: uv sync --group dev")
expect = sync_api.expect
if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("<script>document.title='broken in'<", "\"><img src=x onerror=alert(1)>'&amp;.png", "猫 кот, גמל.png")
ACROSS, DOWN = 8, 5
WIDTH, HEIGHT = 1100, 760
QUIET = (
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="needs Chromium: apt-get install chromium")


class MeanColour(nn.Module):
    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3)) * self.scale


@dataclass
class Opened:
    """A page, what it asked for and what it complained about."""

    page: "Page"
    atlas: Atlas
    asked: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def at(self, row: int) -> tuple[float, float]:
        """Where an image is on the screen."""
        box = self.page.locator("#map").bounding_box()
        assert box
        left, top, scale = map(float, (self.page.locator("#map").get_attribute("data-view") or "").split())
        x, y = (self.atlas.layout.xy[row] - (left, top)) * scale
        return box["x"] + box["width"] / 2 + float(x), box["y"] + box["height"] / 2 + float(y)

    def screen(self) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")).astype(int)

    def pixels(self, row: int) -> np.ndarray:
        """The four about the middle of an image or its point."""
        x, y = (math.floor(place - 0.5) for place in self.at(row))
        return self.screen()[y : y + 2, x : x + 2].reshape(4, 3)

    def settle(self) -> None:
        """Waits until every thumbnail that is to be seen has come."""
        expect(self.page.locator("#map")).to_have_attribute("data-drawn", re.compile(r" 0$"), timeout=20_000)
        self.page.wait_for_timeout(100)

    def shown(self) -> list[int]:
        """Rows of the panel's tiles, in order."""
        tiles = self.page.locator("#details .tile")
        expect(tiles.first).to_be_visible()
        return [int(tile.get_attribute("data-row") or -1) for tile in tiles.all()]


def by_hand(across: int, down: int) -> Layout:
    """A grid, row by row."""
    x, y = np.meshgrid(np.linspace(0.02, 0.98, across), np.linspace(0.2, 0.8, down))
    xy, total = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32), across * down
    return Layout(
        xy=xy,
        clusters=np.arange(total) % 3,
        outlier=np.linspace(0.1, 0.9, total, dtype=np.float32),
        order=np.arange(total, dtype=np.uint32),
        notes=("Put there by hand.",),
    )


def colours(number: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (number, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    """Forty images of one colour each, in a grid; the folders below each are its classes."""
    folder = tmp_path_factory.mktemp("images")
    for number, colour in enumerate(colours(ACROSS * DOWN)):
        # A name that holds "/" is one of nested folders: </script> can be in a path.
        name = f"{number:02}{NAMES[number] if number < 3 else ''}/script>x.png"
        file = folder / ("even" if number % 2 == 0 else "odd <b>") / name
        file.parent.mkdir(parents=True)
        Image.new("RGB", (40, 40), tuple(colour.tolist())).save(file)
    half = (0.5, 0.5, 0.5)
    encoder = ImageEncoder(
        MeanColour(), name="colour", stem="small", channels=3, mean=half, std=half, input_size=8
    ).eval()
    found = open_atlas(moco.embed(encoder, folder))
    return Atlas("Forty", "40 images", found.embeddings, found.images, by_hand(ACROSS, DOWN), encoder)


@pytest.fixture(scope="module")
def crowd() -> Atlas:
    """So many images that they are points until one zooms in."""
    pixels = torch.from_numpy(np.repeat(colours(8000)[:, :, None, None], 4, axis=2))
    images = ArrayImages(pixels, None, None, tuple(f"points/{number}" for number in range(8000)))
    vectors = np.random.default_rng(0).normal(size=(8000, 8)).astype(np.float32)
    emb = moco.Embeddings(vectors, images.paths, np.arange(8000) % 10, tuple("abcdefghij"))
    return Atlas("Crowd", "", emb, images, by_hand(100, 80), None)


@pytest.fixture(scope="module")
def browser() -> Generator["Browser"]:
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, *root])
        yield browser
        browser.close()


def opened(
    browser: "Browser", atlas: Atlas, url: str, *, offline: bool = False, dark: bool = False, phone: bool = False
) -> Generator[Opened]:
    context = browser.new_context(
        viewport={"width": 360, "height": 700} if phone else {"width": WIDTH, "height": HEIGHT},
        color_scheme="dark" if dark else "light",
        offline=offline,
        has_touch=phone,
        is_mobile=phone,
    )
    found = Opened(context.new_page(), atlas)
    found.page.on("request", lambda request: found.asked.append(request.url))
    found.page.on("pageerror", lambda error: found.said.append(str(error)))
    found.page.on("console", lambda message: found.said.append(message.text) if message.type == "error" else None)
    found.page.goto(url)
    found.settle()
    yield found
    context.close()
    assert not found.said
    hosts = {urlsplit(asked).hostname for asked in found.asked if not asked.startswith(("data:", "blob:", "file:"))}
    assert hosts <= {"127.0.0.1"}


def served(browser: "Browser", atlas: Atlas, *, dark: bool = False, phone: bool = False) -> Generator[Opened]:
    with serve(atlas) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield from opened(browser, atlas, server.url, dark=dark, phone=phone)
        server.shutdown()
        thread.join()


@pytest.fixture
def site(browser: "Browser", atlas: Atlas) -> Generator[Opened]:
    yield from served(browser, atlas)


@pytest.fixture
def saved(browser: "Browser", atlas: Atlas, tmp_path: Path) -> Generator[Opened]:
    save_page(atlas, tmp_path / "map.html")
    yield from opened(browser, atlas, (tmp_path / "map.html").as_uri(), offline=True)


def nearest(atlas: Atlas, query: np.ndarray, own: int) -> tuple[list[int], np.ndarray]:
    vectors, query = atlas.embeddings.vectors.astype(np.float64), query.astype(np.float64)
    likeness = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    order = [row for row in np.argsort(-likeness, kind="stable").tolist() if row != own][:12]
    return order, likeness[order]


def names_of(atlas: Atlas, rows: list[int]) -> list[list[str]]:
    labels, classes = atlas.embeddings.labels, atlas.embeddings.classes
    assert labels is not None and classes is not None
    return [["path", "class"], *([atlas.embeddings.paths[row], classes[labels[row]]] for row in rows)]


def listed(opened: Opened) -> list[list[str]]:
    with opened.page.expect_download() as download:
        opened.page.get_by_role("button", name="Save list").click()
    text = download.value.path().read_text(encoding="utf-8")
    return list(csv.reader(io.StringIO(text)))


def test_thumbnails_stand_where_their_images_belong(site: Opened) -> None:
    for row in (0, 13, 30):
        colour = site.atlas.images.decode(row)[:, 0, 0].numpy()
        assert np.abs(site.pixels(row) - colour).max() < 16
    assert len(np.unique(site.screen().reshape(-1, 3), axis=0)) > 200


@pytest.mark.parametrize(("painter", "dark"), [("webgl", False), ("canvas", True)])
def test_points_have_their_place_and_the_colour_of_their_class(
    browser: "Browser", crowd: Atlas, painter: str, dark: bool
) -> None:
    for opened in served(browser, crowd, dark=dark):
        if painter == "canvas":
            opened.page.add_init_script(
                "const get = HTMLCanvasElement.prototype.getContext; HTMLCanvasElement.prototype.getContext ="
                "function (kind, ...rest) { return kind.startsWith('webgl') ? null : get.call(this, kind, ...rest); }"
            )
            opened.page.reload()
            opened.settle()
        drawn = (opened.page.locator("#map").get_attribute("data-drawn") or "").split()
        if painter == "webgl" and drawn[0] == "canvas":
            pytest.skip("this browser has no WebGL")
        assert drawn == [painter, "0", "0"]
        names = CLASS_COLOURS_DARK if dark else CLASS_COLOURS_LIGHT
        known = np.array([[int(name[at : at + 2], 16) for at in (1, 3, 5)] for name in names])
        for row in (0, 1, 2, 103, 4057, 5049):
            distance = np.abs(known - opened.pixels(row)[:, None]).max(axis=2).min(axis=0)
            assert distance.argmin() == row % 10 and distance.min() < 60, row
        opened.page.locator("#map").focus()
        for _ in range(8):
            opened.page.keyboard.press("+")
        opened.settle()
        count = int((opened.page.locator("#map").get_attribute("data-drawn") or "").split()[1])
        assert 0 < count <= 3000


def test_a_list_of_many_says_how_many_classes_it_leaves_out(browser: "Browser", crowd: Atlas) -> None:
    for opened in served(browser, crowd):
        opened.page.locator("#filter").focus()
        opened.page.keyboard.press("Enter")
        expect(opened.page.locator("#details h2")).to_have_text("8,000 images selected")
        expect(opened.page.locator(".bars b")).to_have_text(["800"] * 8)
        expect(opened.page.locator(".bars small")).to_have_text("and 2 more")
        expect(opened.page.locator("#details .tile")).to_have_count(240)


def test_the_map_stays_where_it_is_when_the_panel_opens_and_closes(site: Opened) -> None:
    before = site.at(4)
    site.page.mouse.click(*before)
    site.shown()
    site.settle()
    assert site.at(4) == pytest.approx(before, abs=0.6)
    assert np.abs(site.pixels(4) - site.atlas.images.decode(4)[:, 0, 0].numpy()).max() < 16
    site.page.keyboard.press("Escape")
    site.settle()
    assert site.at(4) == pytest.approx(before, abs=0.6)
    last = ACROSS * DOWN - 1  # where the panel will be
    site.page.mouse.click(*site.at(last))
    edge = site.page.locator("#panel").bounding_box()
    assert edge
    site.page.wait_for_timeout(500)
    assert site.at(last)[0] < edge["x"]


@pytest.mark.parametrize("phone", [False, True])
def test_no_image_lies_under_the_legend_at_first(browser: "Browser", atlas: Atlas, phone: bool) -> None:
    for opened in served(browser, atlas, phone=phone):
        card = opened.page.locator("#legend").bounding_box()
        frame = opened.page.locator("#map").bounding_box()
        assert card and frame
        for row in range(ACROSS * DOWN):
            x, y = opened.at(row)
            assert x > card["x"] + card["width"] or y < card["y"], row
            assert frame["x"] < x < frame["x"] + frame["width"] and frame["y"] < y < frame["y"] + frame["height"], row


@pytest.mark.parametrize("where", ["site", "saved"])
def test_a_click_shows_the_image_and_its_nearest_neighbours(where: str, request: pytest.FixtureRequest) -> None:
    opened: Opened = request.getfixturevalue(where)
    for row in (13, 1):
        opened.page.mouse.click(*opened.at(row))
        order, likeness = nearest(opened.atlas, opened.atlas.embeddings.vectors[row], own=row)
        expect(opened.page.locator(f"#details .tile[data-row='{order[0]}']")).to_be_visible()
        assert opened.shown() == order
        assert order == moco_search(opened.atlas, row)
        texts = [
            text.replace("\N{MINUS SIGN}", "-") for text in opened.page.locator("#details .tile").all_inner_texts()
        ]
        assert [float(text) for text in texts] == pytest.approx(likeness.tolist(), abs=0.00501)
        title = opened.page.locator("#details h2").inner_text().splitlines()[0]
        assert title == Path(opened.atlas.embeddings.paths[row]).name
        opened.page.keyboard.press("Escape")


def moco_search(atlas: Atlas, row: int) -> list[int]:
    from moco.embeddings.search import search

    return search(atlas.embeddings, row, k=12).rows[0].tolist()


def test_a_neighbour_leads_to_its_own_neighbours(site: Opened) -> None:
    site.page.mouse.click(*site.at(20))
    first = site.shown()[0]
    site.page.locator("#details .tile").first.press("Enter")
    expect(site.page.locator("#details h2")).to_contain_text(Path(site.atlas.embeddings.paths[first]).name)
    expect(site.page.locator("#details h2")).to_be_focused()


@pytest.mark.parametrize("where", ["site", "saved"])
@pytest.mark.parametrize("how", ["shift", "button"])
def test_a_lasso_saves_the_list_of_what_is_inside(where: str, how: str, request: pytest.FixtureRequest) -> None:
    opened: Opened = request.getfixturevalue(where)
    mouse, inside = opened.page.mouse, [0, 1, 2, ACROSS, ACROSS + 1, ACROSS + 2]
    left, top = (edge - 20 for edge in opened.at(0))
    right, bottom = (edge + 20 for edge in opened.at(ACROSS + 2))
    if how == "shift":
        opened.page.keyboard.down("Shift")
    else:
        opened.page.get_by_role("button", name="Lasso").click()
    mouse.move(left, top)
    mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom)):
        mouse.move(x, y, steps=3)
    mouse.up()
    opened.page.keyboard.up("Shift")
    expect(opened.page.locator("#details h2")).to_have_text("6 images selected")
    expect(opened.page.locator("#status")).to_have_text("6 images selected")
    assert opened.shown() == inside
    expected = names_of(opened.atlas, inside)
    if where == "saved":  # says nothing about the folders of the machine that it was made on
        root = os.path.commonpath(opened.atlas.embeddings.paths) + os.sep
        expected = [[path.removeprefix(root), name] for path, name in expected]
    assert listed(opened) == expected


def test_hostile_names_are_shown_as_text(site: Opened) -> None:
    for row in range(3):
        place = next(i for i, path in enumerate(site.atlas.embeddings.paths) if NAMES[row] in path)
        site.page.mouse.click(*site.at(place))
        expect(site.page.locator("#details small").first).to_contain_text(NAMES[row])
        expect(site.page.locator("#details .tile").first).to_be_visible()
    assert site.page.title() == "Forty: map of images"
    assert site.page.locator("script").count() == len(SCRIPTS)
    assert site.page.locator("#details img").count() == 1 and site.page.locator("b b, span b").count() == 0
    assert "odd <b>" in site.page.locator("#entries").inner_text()


def test_the_filter_keeps_what_matches_by_name_or_class(site: Opened) -> None:
    site.page.keyboard.press("/")
    expect(site.page.locator("#filter")).to_be_focused()
    site.page.keyboard.type("КОТ")
    expect(site.page.locator("#status")).to_have_text("1 image shown")
    site.page.locator("#filter").fill("odd <")
    expect(site.page.locator("#status")).to_have_text("20 images shown")
    site.page.keyboard.press("Enter")
    expect(site.page.locator("#details h2")).to_have_text("20 images selected")
    labels = site.atlas.embeddings.labels
    assert labels is not None
    assert listed(site) == names_of(site.atlas, np.flatnonzero(labels == 1).tolist())
    site.page.keyboard.press("Escape")
    site.page.keyboard.press("Escape")
    expect(site.page.locator("#filter")).to_have_value("")
    expect(site.page.locator("#matches")).to_be_hidden()


def test_the_legend_colours_by_class_cluster_and_outlier_score_and_filters(site: Opened) -> None:
    entries, modes = site.page.locator("#entries button"), site.page.locator("#modes")
    assert [text.split("\n") for text in entries.all_inner_texts()] == [["even", "20"], ["odd <b>", "20"]]
    modes.get_by_text("Cluster").click()
    assert [text.split("\n") for text in entries.all_inner_texts()] == [
        ["Cluster 1", "14"],
        ["Cluster 2", "13"],
        ["Cluster 3", "13"],
    ]
    entries.nth(1).click()
    expect(entries.nth(1)).to_have_attribute("aria-pressed", "true")
    expect(site.page.locator("#matches")).to_have_text("List 13")
    site.page.locator("#matches").click()
    assert site.shown() == list(range(1, 40, 3))
    modes.get_by_text("Outliers").click()
    expect(site.page.locator("#scale")).to_be_visible()
    expect(entries).to_have_count(0)


def test_the_map_is_used_by_keyboard_alone(site: Opened) -> None:
    page = site.page
    expect(page.locator("#map")).to_have_count(1)
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.locator("#map").evaluate("map => map === document.activeElement"):
            break
    expect(page.locator("#map")).to_be_focused()
    seen = [float(each) for each in (page.locator("#map").get_attribute("data-view") or "").split()]
    middle = int(np.linalg.norm(site.atlas.layout.xy - seen[:2], axis=1).argmin())
    page.keyboard.press("Enter")
    title = page.locator("#details h2")
    expect(title).to_contain_text("x.png")
    expect(page.locator("#details small").first).to_contain_text(Path(site.atlas.embeddings.paths[middle]).parent.name)
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    expect(page.locator("#map")).to_be_focused()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    expect(page.locator("#details small").first).to_contain_text(Path(site.atlas.embeddings.paths[0]).parent.name)
    page.keyboard.press("Escape")
    page.keyboard.press("0")
    for _ in range(4):
        page.keyboard.press("+")
    site.settle()
    drawn = page.locator("#map").get_attribute("data-drawn")
    page.keyboard.press("-")
    page.keyboard.press("-")
    expect(page.locator("#map")).not_to_have_attribute("data-drawn", str(drawn))


def test_every_button_and_field_has_a_name(site: Opened) -> None:
    site.page.mouse.click(*site.at(5))
    site.shown()
    for control in site.page.locator("button:visible, input:visible").all():
        assert control.get_attribute("aria-label") or control.inner_text().strip(), control


def test_an_image_from_elsewhere_is_searched_by(site: Opened, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), (250, 20, 30)).save(tmp_path / "red.png")
    site.page.locator("#file").set_input_files(tmp_path / "red.png")
    query = np.array([250, 20, 30]) / 255 - 0.5
    assert site.shown() == nearest(site.atlas, query, own=-1)[0]
    site.said.clear()
    (tmp_path / "bad.png").write_bytes(b"no image")
    site.page.locator("#file").set_input_files(tmp_path / "bad.png")
    expect(site.page.locator("#status")).to_contain_text("cannot be read as an image")
    assert all("400" in each for each in site.said)
    site.said.clear()


def test_the_saved_page_needs_no_server(saved: Opened) -> None:
    assert [asked for asked in saved.asked if not asked.startswith(("data:", "blob:"))] == [saved.page.url]
    assert saved.page.url.startswith("file:")
    expect(saved.page.get_by_role("button", name="Search by image")).to_be_hidden()
    saved.page.mouse.click(*saved.at(3))
    colour = saved.atlas.images.decode(3)[:, 0, 0].numpy()
    canvas = saved.page.locator(".picture canvas")
    expect(canvas).to_be_visible()
    saved.page.wait_for_timeout(200)
    shown = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")).astype(int)
    assert np.abs(shown[shown.shape[0] // 2, shown.shape[1] // 2] - colour).max() < 16


def test_it_follows_the_system_into_the_dark_and_back_by_a_button(browser: "Browser", atlas: Atlas) -> None:
    for opened in served(browser, atlas, dark=True):
        assert opened.screen()[HEIGHT // 2, 4].max() < 60
        opened.page.get_by_role("button", name="Light or dark").click()
        assert opened.screen()[HEIGHT // 2, 4].min() > 200


def test_it_fits_a_phone_and_answers_to_touch(browser: "Browser", atlas: Atlas) -> None:
    for opened in served(browser, atlas, phone=True):
        wide = opened.page.evaluate("() => document.documentElement.scrollWidth")
        assert wide <= 360
        expect(opened.page.locator("#filter")).to_have_attribute("placeholder", "Filter")
        expect(opened.page.locator("#note")).to_be_visible()
        for button in opened.page.locator("#entries button, #modes button, .zoom button").all():
            size = button.bounding_box()
            assert size and size["height"] >= 40
        opened.page.touchscreen.tap(*opened.at(20))
        assert len(opened.shown()) == 12


def test_the_address_with_the_token_opens_the_map_beyond_loopback(browser: "Browser", atlas: Atlas) -> None:
    with serve(atlas, host="0.0.0.0") as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_address[1]}/"
        page = browser.new_page()
        page.goto(here)
        expect(page.locator("body")).to_contain_text("Open the address with the token")
        page.goto(here + "?" + server.url.partition("?")[2])
        expect(page.locator("#title")).to_have_text("Forty")
        assert page.url == here
        page.close()
        server.shutdown()
