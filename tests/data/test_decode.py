import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco.data import BadImage, FileImages
from moco.data.decode import check_header, decode_shrunk, quiet_pillow

ROWS, COLUMNS = np.mgrid[0:30, 0:40]
SMOOTH = np.stack([COLUMNS * 6, ROWS * 8, np.full((30, 40), 80)], axis=-1).astype(np.uint8)  # 30 40 3


def decode(path: Path, channels: int = 3) -> torch.Tensor:
    return FileImages((str(path),), labels=None, classes=None, channels=channels).decode(0)


def read_back(tmp_path: Path, image: Image.Image, name: str, channels: int = 3, **options) -> np.ndarray:
    image.save(tmp_path / name, **options)
    return decode(tmp_path / name, channels).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "TIFF", "webp", "gif", "jpg"])
def test_every_format_gives_its_colours(suffix, tmp_path):
    options = {"webp": {"lossless": True}, "jpg": {"quality": 95}}.get(suffix, {})
    got = read_back(tmp_path, Image.fromarray(SMOOTH), f"x.{suffix}", **options)
    assert got.shape == SMOOTH.shape
    assert np.abs(got.astype(int) - SMOOTH).max() <= {"gif": 40, "jpg": 8}.get(suffix, 0)


def test_cmyk_jpeg_is_read_as_colour(tmp_path):
    got = read_back(tmp_path, Image.fromarray(SMOOTH).convert("CMYK"), "x.jpg", quality=95)
    assert np.abs(got.astype(int) - SMOOTH).mean() < 4


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits_is_scaled_to_8(suffix, tmp_path):
    wide = np.linspace(0, 65535, 24 * 10).round().astype(np.uint16).reshape(10, 24)
    for channels in (1, 3):
        got = read_back(tmp_path, Image.fromarray(wide), f"x.{suffix}", channels)
        assert got.shape == (10, 24, channels)
        assert np.abs(got - wide[..., None] / 257).max() <= 0.5


def test_wide_and_floating_point_pixels_without_a_known_range_are_refused(tmp_path):
    for name, dtype in (("float.tif", np.float32), ("int.tif", np.int32)):
        Image.fromarray(np.full((9, 9), 70000, dtype)).save(tmp_path / name)
        with pytest.raises(BadImage, match="expected 8 or 16 bits"):
            decode(tmp_path / name)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode, tmp_path):
    image = Image.new("RGBA", (10, 10), (20, 20, 20, 255))
    image.paste((200, 0, 0, 0), (0, 0, 5, 10))
    options = {}
    if mode == "P":
        image = image.quantize(8)
        assert image.mode == "P"
    else:
        image = image.convert(mode)
    got = read_back(tmp_path, image, "x.png", **options)
    assert (got[:, :5] == 255).all() and (np.abs(got[:, 5:].astype(int) - 20) <= 1).all()
    grey = decode(tmp_path / "x.png", channels=1)
    assert (grey[0, :, :5] == 255).all() and (grey[0, :, 5:] < 22).all()


def test_one_bit_and_palette_images_are_read(tmp_path):
    bits = Image.fromarray(SMOOTH[..., 0] > 128)
    assert np.array_equal(read_back(tmp_path, bits, "bits.png")[..., 2], (SMOOTH[..., 0] > 128) * 255)
    palette = Image.fromarray(SMOOTH).quantize(64)
    assert np.array_equal(read_back(tmp_path, palette, "palette.png"), np.asarray(palette.convert("RGB")))


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    got = read_back(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:])
    assert (got == [255, 0, 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_images_stand_upright_by_their_exif_orientation(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {1: (), 2: (0,), 3: (3,), 4: (1,), 5: (5,), 6: (2,), 7: (6,), 8: (4,)}[orientation]
    stored = Image.fromarray(SMOOTH)
    for operation in turned:
        stored = stored.transpose(Image.Transpose(operation))
    got = read_back(tmp_path, stored, f"x.{suffix}", exif=exif)
    assert got.shape == SMOOTH.shape and np.abs(got.astype(int) - SMOOTH).max() <= 16


def test_an_orientation_in_xmp_counts_too(tmp_path):
    stored = Image.fromarray(SMOOTH).transpose(Image.Transpose.ROTATE_90)
    got = read_back(tmp_path, stored, "x.jpg", xmp=b'<rdf:Description tiff:Orientation="6"/>')
    assert got.shape == SMOOTH.shape and np.abs(got.astype(int) - SMOOTH).max() <= 16


def test_a_file_is_read_by_its_content_not_its_suffix(tmp_path):
    Image.fromarray(SMOOTH).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")
    assert np.array_equal(decode(tmp_path / "x.jpg").permute(1, 2, 0).numpy(), SMOOTH)


def test_grey_of_colour_is_luma_and_colour_of_grey_is_repeated(tmp_path):
    for suffix in ("png", "jpg"):
        grey = read_back(tmp_path, Image.fromarray(SMOOTH), f"x.{suffix}", channels=1)
        luma = SMOOTH @ np.array([0.299, 0.587, 0.114])
        assert grey.shape == (30, 40, 1) and np.abs(grey[..., 0] - luma).max() <= (1 if suffix == "png" else 5)
        colour = read_back(tmp_path, Image.fromarray(SMOOTH).convert("L"), f"y.{suffix}")
        assert (colour[..., 0] == colour[..., 2]).all() and colour.shape == (30, 40, 3)


def test_decoded_pixels_may_be_written_to(tmp_path):
    for mode in ("L", "RGB"):
        Image.new(mode, (5, 5)).save(tmp_path / "x.png")
        image = decode(tmp_path / "x.png", channels=1)
        image.add_(7)
        assert (image == 7).all()


# Odd and hostile files


@pytest.mark.parametrize("content", [b"<html><body>404</body></html>", b"Lorem ipsum dolor", b"", b"\xff\xd8\xff"])
def test_what_is_no_image_is_named_in_one_line(content, tmp_path):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(BadImage, match=r"x\.jpg.*cannot be read as an image") as caught:
        decode(tmp_path / "x.jpg")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shrink", [1, 2])
@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_a_photo_cut_in_half_is_bad_however_it_is_decoded(mode, shrink, tmp_path):
    Image.effect_noise((400, 300), 60).convert(mode).save(tmp_path / "x.jpg", quality=90)
    whole = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(whole[: len(whole) // 2])
    with quiet_pillow(), pytest.raises(BadImage, match=r"x\.jpg"):
        decode_shrunk(str(tmp_path / "x.jpg"), 3, lambda height, width: shrink)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_an_image_30000_pixels_wide_is_read(suffix, tmp_path):
    wide = Image.linear_gradient("L").resize((30_000, 12)).convert("RGB")
    assert read_back(tmp_path, wide, f"x.{suffix}").shape == (12, 30_000, 3)


def bomb(path: Path) -> Path:
    """A few bytes that claim to be 16,000 x 16,000 pixels: 768 MB."""
    kind = path.suffix[1:]
    if kind == "webp":
        frame = b"VP8X" + (10).to_bytes(4, "little") + bytes(4) + (15_999).to_bytes(3, "little") * 2
        path.write_bytes(b"RIFF" + (len(frame) + 4).to_bytes(4, "little") + b"WEBP" + frame)
    else:
        Image.new("RGB", (16, 16)).save(path)
        content, side = bytearray(path.read_bytes()), 16_000
        if kind == "png":
            content[16:24] = side.to_bytes(4, "big") * 2
            content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        elif kind == "gif":
            content[6:10] = side.to_bytes(2, "little") * 2
        elif kind == "bmp":
            content[18:26] = side.to_bytes(4, "little") * 2
        elif kind == "jpg":
            start = content.index(b"\xff\xc0") + 5
            content[start : start + 4] = side.to_bytes(2, "big") * 2
        else:
            for at in (10, 22):  # of the first two entries of the directory, width and height
                content[at + 2 : at + 12] = (
                    (4).to_bytes(2, "little") + (1).to_bytes(4, "little") + side.to_bytes(4, "little")
                )
        path.write_bytes(content)
    return path


BOMBS = ("png", "gif", "bmp", "tif", "webp", "jpg")


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_for_its_size(kind, tmp_path):
    with pytest.raises(BadImage, match="89 million pixels") as caught:
        decode(bomb(tmp_path / f"x.{kind}"))
    assert "\n" not in str(caught.value)


LITTLE_ROOM = """
import pathlib, resource, sys
from moco.data.unreadable import BadImage
from moco.data.decode import decode, quiet_pillow

used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000,) * 2)
for path in sys.argv[1:]:
    try:
        with quiet_pillow():
            decode(path, 3)
    except BadImage as bad:
        print(bad.reason)
try:
    bytes(100_000_000)
except MemoryError:
    print("the room ends")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux, which says and limits what is used")
def test_for_a_bomb_nothing_is_allocated(tmp_path):
    """Not by the peak of this process: earlier tests may have raised that further than a bomb would."""
    paths = [bomb(tmp_path / f"x.{kind}") for kind in BOMBS]
    done = subprocess.run([sys.executable, "-c", LITTLE_ROOM, *paths], capture_output=True, text=True, check=True)
    *reasons, end = done.stdout.splitlines()
    assert len(reasons) == len(BOMBS) and {reason[:27] for reason in reasons} == {"more than 89 million pixels"}
    assert end == "the room ends"


def test_a_file_that_may_not_be_read_says_so():
    # Not in pytest's own folder, into which others than its owner may not look: there every file is refused.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for file, mode in (("x.png", 0), ("open.png", 0o644)):
            Image.fromarray(SMOOTH).save(folder / file)
            (folder / file).chmod(mode)
        everything = os.geteuid() == 0
        if everything:  # who may read everything becomes somebody who may not
            os.seteuid(65534)
        try:
            assert decode(folder / "open.png").shape == (3, 30, 40)
            with pytest.raises(BadImage, match=r"x\.png.*[Pp]ermission denied"):
                decode(folder / "x.png")
        finally:
            if everything:
                os.seteuid(0)


def test_links_that_lead_nowhere_or_in_a_circle_say_so(tmp_path):
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    for name, reason in (("gone.jpg", "No such file"), ("self.jpg", "[Tt]oo many")):
        with pytest.raises(BadImage, match=f"{name}.*{reason}"):
            decode(tmp_path / name)


@pytest.mark.parametrize("suffix", ["webp", "png"])
def test_of_an_animated_webp_or_png_the_first_frame_is_read(suffix, tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    options = {"lossless": True} if suffix == "webp" else {}
    got = read_back(tmp_path, frames[0], f"x.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert (got == [250, 0, 0]).all()


def test_a_cameras_second_picture_in_the_same_file_is_left_alone(tmp_path):
    first, second = Image.fromarray(SMOOTH), Image.new("RGB", (40, 30))
    first.save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[second], quality=95)
    assert np.abs(decode(tmp_path / "x.jpg").permute(1, 2, 0).numpy().astype(int) - SMOOTH).max() <= 8


# Fewer pixels


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_jpeg_is_decoded_at_a_fraction_of_its_size(factor, mode, tmp_path):
    size = (403, 301)
    Image.fromarray(SMOOTH).resize(size, Image.Resampling.BICUBIC).convert(mode).save(tmp_path / "x.jpg", quality=95)
    asked = []
    with quiet_pillow():
        got = decode_shrunk(str(tmp_path / "x.jpg"), 3, lambda *sides: (asked.append(sides), factor)[1])
    assert asked == [(301, 403)] and (got.height, got.width, got.shrink) == (301, 403, factor)
    assert got.pixels.shape == (3, -(-301 // factor), -(-403 // factor))
    with Image.open(tmp_path / "x.jpg") as image:
        whole = image.convert("RGB").crop((0, 0, 403 // factor * factor, 301 // factor * factor)).reduce(factor)
    inner = got.pixels[:, : 301 // factor, : 403 // factor].transpose(1, 2, 0).astype(int)
    assert np.abs(inner - np.asarray(whole)).mean() < 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_shrunk_photo_stands_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(SMOOTH).resize((400, 300)).save(tmp_path / "x.jpg", exif=exif)
    asked = []
    with quiet_pillow():
        got = decode_shrunk(str(tmp_path / "x.jpg"), 3, lambda *sides: (asked.append(sides), 4)[1])
        whole = decode_shrunk(str(tmp_path / "x.jpg"), 3, lambda *sides: 1).pixels
    assert asked == [whole.shape[1:]] == [(got.height, got.width)]
    small = torch.nn.functional.avg_pool2d(torch.from_numpy(whole).float(), 4)
    assert (small - torch.from_numpy(got.pixels)).abs().mean() < 2


def test_other_formats_than_jpeg_come_whole_and_nobody_is_asked(tmp_path):
    Image.fromarray(SMOOTH).save(tmp_path / "x.png")
    with quiet_pillow():
        got = decode_shrunk(str(tmp_path / "x.png"), 3, lambda *sides: pytest.fail("asked"))
        assert check_header(str(tmp_path / "x.png")) == (30, 40)
    assert got.shrink == 1 and got.pixels.shape == (3, 30, 40) == (3, got.height, got.width)


def test_pillow_alone_gives_what_torchcodec_gives(tmp_path, monkeypatch):
    Image.effect_noise((200, 150), 60).convert("RGB").save(tmp_path / "x.jpg", quality=90)
    ours = decode(tmp_path / "x.jpg")
    monkeypatch.setattr("moco.data.decode.decode_jpeg", None)
    assert (decode(tmp_path / "x.jpg").int() - ours.int()).abs().max() <= 1
