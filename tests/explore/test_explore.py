import base64
import http.client
import io
import json
import re
import threading
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import moco
from moco.config import parse_config
from moco.data import ArrayImages, FileImages
from moco.embeddings.coordinates import Method
from moco.embeddings.embed import embed_to
from moco.explore import cached, thumbnails
from moco.explore.atlas import Atlas, open_atlas, page_data
from moco.explore.layout import Layout, lay_out, level_order
from moco.explore.server import Server, respond, search_upload, serve
from moco.explore.single_file import SCRIPTS, save_page
from moco.explore.thumbnails import large, sheet
from moco.method.backbones import build_backbone
from moco.method.encoder import ImageEncoder
from moco.storage.encoder_files import save_encoder
from moco.storage.run import Run
from moco.views.pixels import pixels_of
from small import TINY

HOSTILE = ("</script><script>alert(1)</script>.png", "a\"b'c&d,e.png", "猫 кот.png", "a..png", "=1+1.png")


class MeanColour(nn.Module):
    """Three features that a test can work out."""

    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3)) * self.scale


def colour_encoder() -> ImageEncoder:
    half = (0.5, 0.5, 0.5)
    return ImageEncoder(
        MeanColour(), name="mean-colour", stem="small", channels=3, mean=half, std=half, input_size=8
    ).eval()


def blobs(count: int, *, per: int = 30, dims: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of several kinds, and which kind each is."""
    random = np.random.default_rng(0)
    kinds = np.arange(count * per) % count
    return (8 * np.eye(dims)[kinds] + random.normal(size=(len(kinds), dims))).astype(np.float32), kinds


def unpacked(packed: tuple[str, str]) -> np.ndarray:
    kinds = {"Uint8Array": "u1", "Uint16Array": "<u2", "Uint32Array": "<u4", "Int32Array": "<i4", "Float32Array": "<f4"}
    return np.frombuffer(base64.b64decode(packed[1]), kinds[packed[0]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty files of one colour each, wide and tall, some with names that are hard to bear."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(1)
    for number, name in enumerate([*HOSTILE, *(f"{i:02}.png" for i in range(35))]):
        file = folder / str(number % 2) / name  # a name may hold </script> across folders
        file.parent.mkdir(parents=True, exist_ok=True)
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        Image.new("RGB", (60, 30) if number % 2 else (20, 100), colour).save(file)
    return folder


@pytest.fixture(scope="module")
def atlas(folder: Path) -> Atlas:
    return open_atlas(moco.embed(colour_encoder(), folder))


@pytest.fixture(scope="module")
def server(atlas: Atlas) -> Generator[Server]:
    with serve(atlas) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def ask(
    server: Server, path: str, *, method: str = "GET", body: bytes | None = None, headers: dict[str, str] | None = None
) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    reply = Reply(answer.status, answer.headers, answer.read())
    connection.close()
    return reply


def cosine_ranking(vectors: np.ndarray, query: np.ndarray, own: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    vectors, query = vectors.astype(np.float64), query.astype(np.float64)
    likeness = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    order = np.array([row for row in np.argsort(-likeness, kind="stable") if row != own])
    return order, likeness[order]


def test_images_that_are_alike_lie_together_on_the_map() -> None:
    vectors, kinds = blobs(4)
    layout = lay_out(vectors)
    apart = np.linalg.norm(layout.xy[:, None] - layout.xy[None], axis=2) + 9 * np.eye(len(vectors))
    assert (kinds[apart.argmin(axis=1)] == kinds).mean() > 0.95
    assert 0 <= layout.xy.min() and layout.xy.max() <= 1 and np.ptp(layout.xy, axis=0).max() > 0.99
    np.testing.assert_array_equal(layout.xy, lay_out(vectors).xy)


def test_images_beyond_the_landmarks_are_put_among_those_they_are_like() -> None:
    vectors, kinds = blobs(4)
    layout = lay_out(vectors, landmarks=40)
    middle = np.stack([np.median(layout.xy[kinds == kind], axis=0) for kind in range(4)])
    nearest = np.linalg.norm(layout.xy[:, None] - middle, axis=2).argmin(axis=1)
    assert (nearest == kinds).mean() > 0.95
    assert any("40 images" in note for note in layout.notes)


def test_the_outlier_score_is_the_mean_cosine_distance_to_the_ten_nearest() -> None:
    vectors, _ = blobs(2)
    vectors[17] = -vectors[17]
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors, axis=1, keepdims=True)
    distance = np.sort(1 - unit @ unit.T + 9 * np.eye(len(unit)), axis=1)[:, :10].mean(axis=1)
    found = lay_out(vectors).outlier
    np.testing.assert_allclose(found, distance, atol=1e-5)
    assert found.argmax() == 17


def test_clusters_are_the_kinds_of_images_the_largest_first() -> None:
    vectors, kinds = blobs(2, per=50)
    vectors, kinds = vectors[kinds + np.arange(100) % 3 > 0], kinds[kinds + np.arange(100) % 3 > 0]
    clusters = lay_out(vectors).clusters
    sizes = np.bincount(clusters)
    assert list(sizes) == sorted(sizes, reverse=True) and (clusters == 1 - kinds).all()


@pytest.mark.parametrize("vectors", [np.ones((1, 4)), np.eye(2), np.ones((30, 4)), np.zeros((12, 4)), np.ones((30, 1))])
def test_few_images_or_an_encoder_that_sees_no_difference_still_make_a_map(vectors: np.ndarray) -> None:
    layout = lay_out(vectors.astype(np.float32))
    assert np.isfinite(layout.xy).all() and np.isfinite(layout.outlier).all()
    assert sorted(layout.order) == list(range(len(vectors)))
    assert len(np.unique(layout.xy, axis=0)) == len(vectors)


def test_vectors_that_are_not_finite_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="not finite"):
        lay_out(np.full((20, 4), np.nan, dtype=np.float32))


def test_thumbnails_come_forward_evenly_over_the_map_and_lie_on_few_sheets() -> None:
    xy = np.random.default_rng(0).random((20_000, 2)).astype(np.float32)
    order = level_order(xy)
    assert sorted(order) == list(range(len(xy)))
    squares = {tuple(each) for each in (xy[order[:256]] * 16).astype(int)}
    assert len(squares) == 256
    corner = (xy < 0.1).all(axis=1)
    sheets = {int(slot) // 256 for slot in np.flatnonzero(np.isin(order, np.flatnonzero(corner)))}
    assert len(sheets) < 0.35 * len(xy) / 256  # in row order it would be all of them


def test_a_sheet_holds_thumbnails_of_the_right_images_in_their_own_shape(atlas: Atlas, tmp_path: Path) -> None:
    rows = [3, 0, 21]
    made = sheet(atlas.images, rows)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(made["image"].split(",")[1]))).convert("RGB"))
    for place, row in enumerate(rows):
        width, height = made["sizes"][place]
        image = atlas.images.decode(row)
        assert max(width, height) == 48
        assert width / height == pytest.approx(image.shape[2] / image.shape[1], rel=0.06)
        seen = pixels[height // 2, 48 * place + width // 2].astype(int)
        assert np.abs(seen - image[:, 0, 0].numpy()).max() < 12


def test_a_file_that_cannot_be_read_leaves_its_place_on_the_sheet_empty(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "good.png")
    images = FileImages((str(tmp_path / "broken.png"), str(tmp_path / "good.png")), None, None)
    assert sheet(images, [0, 1])["sizes"] == [[0, 0], [48, 48]]


def test_the_pixels_of_a_very_small_image_stay_sharp() -> None:
    pixels = torch.zeros(1, 1, 8, 4, dtype=torch.uint8)
    pixels[0, 0, ::2] = 255
    made = sheet(ArrayImages(pixels, None, None, ("a",)), [0])
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(made["image"].split(",")[1]))).convert("L"))
    assert made["sizes"] == [[24, 48]]
    np.testing.assert_allclose(shown[3:48:6, 12], [255, 0] * 4, atol=25)


def test_a_photo_is_decoded_reduced_and_stands_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = Image.new("RGB", (1600, 1200), "blue")
    photo.paste("red", (0, 0, 800, 1200))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what is left in the file is above
    photo.save(tmp_path / "photo.jpg", exif=exif)
    decoded = []

    def seen(image: Image.Image, channels: int) -> np.ndarray:
        decoded.append(image.size)
        return pixels_of(image, channels)

    monkeypatch.setattr(thumbnails, "pixels_of", seen)
    made = sheet(FileImages((str(tmp_path / "photo.jpg"),), None, None), [0])
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(made["image"].split(",")[1]))).convert("RGB")).astype(int)
    assert made["sizes"] == [[36, 48]] and decoded == [(150, 200)]
    assert shown[8, 18, 0] > 200 > 60 > shown[8, 18, 2] and shown[40, 18, 2] > 200 > 60 > shown[40, 18, 0]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_small_image_is_served_as_it_is_and_a_large_one_shrunk(channels: int) -> None:
    pixels = torch.randint(0, 256, (1, channels, 12, 30), dtype=torch.uint8)
    kind, body = large(ArrayImages(pixels, None, None, ("a",)), 0)
    shown = np.asarray(Image.open(io.BytesIO(body)))
    assert kind == "image/png"
    np.testing.assert_array_equal(shown, pixels[0].expand(3, -1, -1).permute(1, 2, 0).numpy())
    kind, body = large(ArrayImages(torch.zeros(1, channels, 10, 3000, dtype=torch.uint8), None, None, ("a",)), 0)
    assert kind == "image/jpeg" and Image.open(io.BytesIO(body)).size == (1024, 3)


def test_the_server_gives_the_page_the_map_and_each_image(server: Server, atlas: Atlas) -> None:
    page = ask(server, "/")
    assert page.status == 200 and page.body.startswith(b"<!doctype html>")
    data = json.loads(ask(server, "/data.json").body)
    assert [data["root"] + name for name in data["names"]] == list(atlas.embeddings.paths)
    np.testing.assert_allclose(unpacked(data["xy"]).reshape(-1, 2) / 65535, atlas.layout.xy, atol=1e-5)
    np.testing.assert_array_equal(unpacked(data["labels"]), atlas.embeddings.labels)
    for row in (0, 39):
        shown = np.asarray(Image.open(io.BytesIO(ask(server, f"/image/{row}").body)))
        np.testing.assert_array_equal(shown, atlas.images.decode(row).permute(1, 2, 0).numpy())
    assert len(json.loads(ask(server, "/sheet/0").body)["sizes"]) == 40


def test_an_image_is_read_once_and_sent_once_to_whoever_keeps_it(
    atlas: Atlas, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ask(server, "/sheet/0")
    monkeypatch.setattr(Atlas, "sheet", None)
    assert ask(server, "/sheet/0").body == first.body
    assert first.headers["Cache-Control"] == "private, no-cache"
    again = ask(server, "/sheet/0", headers={"If-None-Match": first.headers["ETag"]})
    assert again.status == 304 and again.body == b""
    assert ask(server, "/nothing", headers={"If-None-Match": first.headers["ETag"]}).status == 404
    with serve(atlas) as other:  # where the same row may be of another image
        assert other.session != server.session
    assert ask(server, "/nothing").headers["Cache-Control"] == "no-store"


def test_neighbours_are_those_of_the_cosine_and_of_search(server: Server, atlas: Atlas) -> None:
    for row in (0, 7, 39):
        answer = json.loads(ask(server, f"/neighbours/{row}").body)
        order, likeness = cosine_ranking(atlas.embeddings.vectors, atlas.embeddings.vectors[row], own=row)
        assert answer["rows"] == order[:12].tolist()
        np.testing.assert_allclose(answer["similarity"], likeness[:12], atol=1e-6)


@pytest.mark.parametrize(
    "path",
    [
        *("/../../etc/passwd", "/image/../../../etc/passwd", "/etc/passwd", "//etc/passwd", "/image//etc/passwd"),
        *("/%2e%2e/%2e%2e/etc/passwd", "/image/%2fetc%2fpasswd", "/image/..%2f..%2fapp.py", "/server.py", "/page.py"),
        *(
            "/image/40",
            "/image/-1",
            "/image/007",
            "/image/1.png",
            "/image/",
            "/image/%31",
            "/sheet/1",
            "/neighbours/40",
        ),
        *("/index.html", "/page/page.js", "/page.css/", "/data.json/..", "/image/99999999999999999999", "/search"),
        *("file:///etc/passwd", "*", "/image/0/", "/image/0;", "/sheet/0/.."),
    ],
)
def test_nothing_that_was_not_given_is_served(server: Server, path: str) -> None:
    reply = ask(server, path)
    assert reply.status == 404 and reply.body == b"Not found."


def test_a_symlink_or_file_that_is_no_image_is_not_served(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("password")
    (tmp_path / "link.png").symlink_to(tmp_path / "secret")
    images = FileImages((str(tmp_path / "link.png"), str(tmp_path / "gone.png")), None, None)
    emb = moco.Embeddings(np.eye(2, dtype=np.float32), images.paths, None, None)
    atlas = open_atlas(emb, images=images)
    assert all(respond(atlas, f"/image/{row}") is None for row in (0, 1))


@pytest.mark.parametrize("path", ["/", "/data.json", "/image/0", "/nothing"])
def test_every_answer_forbids_scripts_and_addresses_from_elsewhere(server: Server, path: str) -> None:
    headers = ask(server, path).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "connect-src 'self'" in policy
    assert "unsafe" not in policy and "*" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in headers


def test_a_page_of_somebody_else_cannot_ask(server: Server) -> None:
    port = server.server_address[1]
    assert ask(server, "/data.json", headers={"Host": f"evil.example:{port}"}).status == 403
    assert ask(server, "/data.json", headers={"Host": f"127.0.0.1.evil.example:{port}"}).status == 403
    assert ask(server, "/data.json", headers={"Origin": "http://evil.example"}).status == 403
    assert ask(server, "/search", method="POST", body=b"x", headers={"Origin": "null"}).status == 403
    assert ask(server, "/data.json", headers={"Host": f"localhost:{port}"}).status == 200


def test_beyond_loopback_a_token_is_asked_for(atlas: Atlas) -> None:
    with serve(atlas, host="0.0.0.0") as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        token, port = server.url.rpartition("?token=")[2], server.server_address[1]
        assert len(token) >= 24
        for path in ("/", "/data.json", "/image/0", "/?token=", "/?token=wrong", f"/data.json?token={token}"):
            assert ask(server, path).status == 403, path
        assert ask(server, "/search", method="POST", body=b"x").status == 403
        assert ask(server, "/", headers={"Cookie": f"moco-{port}=wrong"}).status == 403
        entry = ask(server, f"/?token={token}")
        assert entry.status == 303 and entry.headers["Location"] == "./"
        cookie, *attributes = entry.headers["Set-Cookie"].split("; ")
        assert {"HttpOnly", "SameSite=Strict"} <= set(attributes)
        assert ask(server, "/data.json", headers={"Cookie": f"other=1; {cookie}"}).status == 200
        server.shutdown()


def test_on_loopback_the_address_is_plain(server: Server) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", server.url)


def test_an_image_that_is_sent_is_searched_by(server: Server, atlas: Atlas, folder: Path) -> None:
    answer = json.loads(ask(server, "/search", method="POST", body=(folder / "1" / "02.png").read_bytes()).body)
    row = atlas.embeddings.paths.index(str(folder / "1" / "02.png"))
    order, likeness = cosine_ranking(atlas.embeddings.vectors, atlas.embeddings.vectors[row])
    assert answer["rows"] == order[:12].tolist() and answer["rows"][0] == row
    np.testing.assert_allclose(answer["similarity"], likeness[:12], atol=1e-5)


def test_what_is_no_image_is_refused_with_the_reason(server: Server) -> None:
    reply = ask(server, "/search", method="POST", body=b"GIF89a no image")
    assert reply.status == 400 and reply.body.startswith(b"This cannot be read as an image: ")
    assert b"/" not in reply.body  # nothing about where it was put
    assert ask(server, "/search/../image/0", method="POST", body=b"x").status == 404


def test_a_file_that_is_too_large_is_not_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moco.explore.server.LARGEST_UPLOAD", 2**20)
    reply = ask(server, "/search", method="POST", body=bytes(2**20 + 1))
    assert reply.status == 413 and b"1 MiB" in reply.body
    assert ask(server, "/search", method="POST", body=b"", headers={"Content-Length": "-1"}).status == 411


def test_without_the_encoder_there_is_no_search_by_image(atlas: Atlas) -> None:
    blind = replace(atlas, encoder=None)
    assert not page_data(blind, whole=False)["search"] and page_data(atlas, whole=False)["search"]
    assert search_upload(blind, b"").status == 404


def test_a_port_that_is_taken_is_an_error_of_one_line(server: Server, atlas: Atlas) -> None:
    with pytest.raises(ValueError, match=r"cannot listen on 127.0.0.1 port \d+ .*--port"):
        serve(atlas, port=server.server_address[1])
    with pytest.raises(ValueError, match="port is 70000"):
        serve(atlas, port=70_000)


def test_the_saved_page_is_whole_and_no_name_can_break_out_of_it(atlas: Atlas, folder: Path, tmp_path: Path) -> None:
    save_page(atlas, tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text(encoding="utf-8")
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text)
    assert "<" not in text and {f"{number % 2}/{name}" for number, name in enumerate(HOSTILE)} <= set(data["names"])
    assert (
        page.count("<script") == 1 + len(SCRIPTS)
        and not re.search(r"(src|href)=\"(?!data:)", page)
        and "://" not in page
    )
    assert str(folder) not in page and data["root"] == ""
    assert "script-src 'sha256-" in page and "unsafe" not in page
    near = unpacked(data["near"]["rows"]).reshape(40, 12)
    likeness = unpacked(data["near"]["similarity"]).reshape(40, 12) / 10_000 - 1
    for row in range(40):
        order, expected = cosine_ranking(atlas.embeddings.vectors, atlas.embeddings.vectors[row], own=row)
        assert near[row].tolist() == order[:12].tolist()
        np.testing.assert_allclose(likeness[row], expected[:12], atol=1e-4)
    assert [len(each["sizes"]) for each in data["sheets"]] == [40]


def test_a_run_is_opened_with_images_evenly_spaced(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", parse_config(TINY))
    backbone = build_backbone("resnet-tiny", channels=1)
    encoder = ImageEncoder(
        backbone, name="resnet-tiny", stem="imagenet", channels=1, mean=(0.5,), std=(0.5,), input_size=8
    )
    save_encoder(run.path, encoder)
    atlas = open_atlas(run.path, most=30)
    assert atlas.title == "run" and atlas.about == "30 of 1,442 images, embedded by resnet-tiny"
    assert atlas.embeddings.paths[0] == "digits/train/0" and atlas.embeddings.paths[-1] == "digits/train/1441"
    assert len(atlas.neighbours(29).rows) == 12


def test_a_run_is_embedded_and_laid_out_again_only_if_it_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = Run.create(tmp_path / "run", parse_config(TINY)), []

    def train() -> None:
        backbone = build_backbone("resnet-tiny", channels=1)
        encoder = ImageEncoder(
            backbone, name="resnet-tiny", stem="imagenet", channels=1, mean=(0.5,), std=(0.5,), input_size=8
        )
        save_encoder(run.path, encoder)

    def counted(vectors: np.ndarray, *, method: Method) -> Layout:
        calls.append("laid out")
        return lay_out(vectors, method=method)

    def opened() -> Atlas:
        calls.clear()
        return open_atlas(run.path, most=9, on_progress=lambda what, done, total: calls.append(what))

    monkeypatch.setattr(cached, "lay_out", counted)
    train()
    first = opened()
    assert "embedding" in calls and "laid out" in calls
    second = opened()
    assert "embedding" not in calls and "laid out" not in calls
    np.testing.assert_array_equal(second.embeddings.vectors, first.embeddings.vectors)
    for name in ("xy", "clusters", "outlier", "order", "notes"):
        np.testing.assert_array_equal(getattr(second.layout, name), getattr(first.layout, name))
    train()
    third = opened()
    assert "embedding" in calls and "laid out" in calls
    assert not np.array_equal(third.embeddings.vectors, first.embeddings.vectors)
    (third.embeddings.folder or tmp_path).joinpath(cached.LAYOUT).write_bytes(b"cut off")
    opened()
    assert "embedding" not in calls and "laid out" in calls


def test_a_run_that_nothing_can_be_written_to_is_opened_all_the_same(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", parse_config(TINY))
    backbone = build_backbone("resnet-tiny", channels=1)
    save_encoder(
        run.path,
        ImageEncoder(backbone, name="resnet-tiny", stem="imagenet", channels=1, mean=(0.5,), std=(0.5,), input_size=8),
    )
    (run.path / cached.FOLDER).write_text("in the way")
    assert len(open_atlas(run.path, most=9)) == 9


def test_a_folder_of_embeddings_is_opened_with_its_images_and_its_encoder(folder: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", parse_config(TINY))
    backbone = build_backbone("resnet-tiny", channels=3)
    half = (0.5, 0.5, 0.5)
    save_encoder(
        run.path,
        ImageEncoder(backbone, name="resnet-tiny", stem="imagenet", channels=3, mean=half, std=half, input_size=8),
    )
    embed_to(tmp_path / "emb", run.path, folder)
    atlas = open_atlas(tmp_path / "emb", most=20)
    assert len(atlas) == 20 and atlas.encoder is not None
    assert atlas.about == "20 of 40 images, embedded by resnet-tiny"
    for row in (0, 19):
        with Image.open(atlas.embeddings.paths[row]) as image:
            np.testing.assert_array_equal(np.asarray(image), atlas.images.decode(row).permute(1, 2, 0).numpy())
    (run.path / "encoder.safetensors").unlink()
    assert open_atlas(tmp_path / "emb", most=20).encoder is None


def test_a_folder_with_neither_run_nor_embeddings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a run nor embeddings"):
        open_atlas(tmp_path)


def test_embeddings_whose_images_are_gone_are_refused() -> None:
    emb = moco.Embeddings(np.eye(3, dtype=np.float32), ("x/1.png", "x/2.png", "x/3.png"), None, None)
    with pytest.raises(ValueError, match=r"were not found \(the first is 'x/1.png'\)"):
        open_atlas(emb)
