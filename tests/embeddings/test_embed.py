import copy
import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.datasets import FakeData

import moco
from moco.config import DataConfig
from moco.data import FileImages, as_images, load_data, resized
from moco.embeddings.embed import embed_to, fingerprint
from moco.embeddings.features import features, pixels, read_features
from moco.method.encoder import ImageEncoder


class Backbone(nn.Sequential):
    """Small, but with batch norm, so that the mode shows, and with nothing that takes the order out."""

    num_features = 10

    def __init__(self, channels: int = 3):
        super().__init__(
            nn.Conv2d(channels, 6, 3, stride=2, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 10, 3),
            nn.BatchNorm2d(10),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


def make_encoder(channels: int = 3, size: int = 16) -> ImageEncoder:
    torch.manual_seed(0)
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    encoder = ImageEncoder(
        Backbone(channels), name="own", stem="small", channels=channels, mean=mean, std=std, input_size=size
    )
    encoder(torch.randn(64, channels, 16, 16))  # running statistics other than 0 and 1
    return encoder.eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def as_pictures(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(each.movedim(0, -1).numpy()) for each in images]


def reference(encoder: ImageEncoder, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([encoder(encoder.preprocess(each[None])) for each in images])


def embed(encoder: ImageEncoder, images: Any, **settings: Any) -> moco.Embeddings:
    settings = {"precision": "fp32"} | settings
    return moco.embed(encoder, images, **settings)


def labels_of(emb: moco.Embeddings) -> list[int]:
    assert emb.labels is not None
    return emb.labels.tolist()


@pytest.mark.parametrize("size", [(16, 16), (20, 33)])
def test_vectors_are_the_encoders_features_of_preprocessed_images_in_order(size):
    encoder, images = make_encoder(), noise(23, 3, *size)
    emb = embed(encoder, images, batch_size=5)
    assert emb.vectors.dtype == np.float32 and emb.vectors.shape == (23, 10) and len(emb) == 23
    assert emb.labels is None and emb.classes is None
    assert emb.paths == tuple(map(str, range(23)))
    torch.testing.assert_close(torch.from_numpy(emb.vectors), reference(encoder, images), rtol=1e-4, atol=1e-5)
    assert np.abs(np.diff(emb.vectors, axis=0)).max(axis=1).min() > 1e-3  # no two are alike


def test_the_batch_size_changes_nothing():
    encoder, images = make_encoder(), noise(23, 3, 16, 16)
    whole = embed(encoder, images).vectors
    for batch_size in (1, 7, 23, 1000):
        np.testing.assert_allclose(embed(encoder, images, batch_size=batch_size).vectors, whole, rtol=1e-4, atol=1e-5)


def test_bf16_is_near_fp32():
    encoder, images = make_encoder(), noise(50, 3, 16, 16)
    exact, rounded = (torch.from_numpy(embed(encoder, images, precision=kind).vectors) for kind in ("fp32", "bf16"))
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).norm() < 0.02 * exact.norm()
    kinds = [torch.from_numpy(embed(encoder, images, precision="auto").vectors)]
    assert any(torch.equal(kind, each) for kind in kinds for each in (exact, rounded))


def test_a_float64_encoder_is_fed_float64():
    encoder, images = make_encoder(), noise(8, 3, 16, 16)
    before = embed(encoder, images).vectors
    np.testing.assert_allclose(embed(encoder.double(), images).vectors, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_encoder_stays_in_its_mode_and_as_it_is(training):
    encoder = make_encoder().train(training)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    emb = embed(encoder, noise(9, 3, 16, 16), batch_size=3)
    assert all(module.training == training for module in encoder.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    np.testing.assert_allclose(
        emb.vectors, reference(encoder.eval(), noise(9, 3, 16, 16)).numpy(), rtol=1e-4, atol=1e-5
    )


def test_the_mode_comes_back_after_an_error():
    encoder = make_encoder().train()
    with pytest.raises(RuntimeError, match="stop"):
        embed(encoder, noise(9, 3, 16, 16), on_progress=lambda done, total: (_ for _ in ()).throw(RuntimeError("stop")))
    assert encoder.training


def test_progress_counts_images():
    told = []
    embed(make_encoder(), noise(9, 3, 16, 16), batch_size=4, on_progress=lambda *numbers: told.append(numbers))
    assert told == [(4, 9), (8, 9), (9, 9)]


def test_tensors_arrays_and_pictures_give_the_same():
    encoder, images = make_encoder(), noise(6, 3, 16, 16)
    want = embed(encoder, images).vectors
    array = images.movedim(1, -1).numpy()
    readonly = array.copy()
    readonly.flags.writeable = False
    reversed_colours = np.ascontiguousarray(array[..., ::-1])[..., ::-1]  # as OpenCV's images are turned to RGB
    for same in (array, readonly, reversed_colours, as_pictures(images), list(images)):
        np.testing.assert_array_equal(embed(encoder, same).vectors, want)


def test_grey_images_are_taken_as_they_come():
    grey = noise(6, 1, 16, 16)
    want = embed(make_encoder(), grey.repeat(1, 3, 1, 1)).vectors
    pictures = [Image.fromarray(each[0].numpy()) for each in grey]
    for same in (
        grey,
        grey[:, 0],
        grey[:, 0].numpy(),
        pictures,
        [pictures[0], *(p.convert("RGB") for p in pictures[1:])],
    ):
        np.testing.assert_array_equal(embed(make_encoder(), same).vectors, want)
    one = make_encoder(channels=1)
    colour = noise(6, 3, 16, 16)
    want = embed(one, colour).vectors
    luma = torch.stack([torch.from_numpy(np.array(p.convert("L"))) for p in as_pictures(colour)])
    for same in (as_pictures(colour), luma):
        np.testing.assert_array_equal(embed(one, same).vectors, want)


def test_a_dataset_gives_its_labels():
    data = FakeData(size=12, image_size=(3, 16, 16), num_classes=3)
    emb = embed(make_encoder(), data)
    wanted = [data[index][1] for index in range(12)]
    assert labels_of(emb) == wanted and emb.classes == ("0", "1", "2")
    np.testing.assert_array_equal(emb.vectors, embed(make_encoder(), [data[index][0] for index in range(12)]).vectors)


@pytest.mark.parametrize("label", [None, -1])
def test_a_dataset_that_does_not_know_its_labels_has_none(label):
    data = [(picture, label) for picture in as_pictures(noise(4, 3, 16, 16))]
    assert embed(make_encoder(), data).labels is None


def test_a_folder_gives_paths_and_labels(tmp_path):
    images = noise(8, 3, 90, 70)
    for index, picture in enumerate(as_pictures(images)):
        path = tmp_path / ("cats" if index < 5 else "dogs") / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
    encoder = make_encoder()
    for source in (tmp_path, str(tmp_path)):
        emb = embed(encoder, source)
        assert labels_of(emb) == [0] * 5 + [1] * 3 and emb.classes == ("cats", "dogs")
        assert emb.paths == tuple(str(tmp_path / ("cats" if i < 5 else "dogs") / f"{i}.png") for i in range(8))
        np.testing.assert_allclose(emb.vectors, embed(encoder, images).vectors, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        embed(make_encoder(channels=1), tmp_path).vectors,
        embed(make_encoder(channels=1), images).vectors,
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_name_gives_the_training_part():
    emb, train = embed(make_encoder(size=8), "digits"), load_data(DataConfig(source="digits")).train
    assert emb.paths == train.paths and train.labels is not None and labels_of(emb) == train.labels.tolist()


def test_features_are_the_vectors_as_a_tensor():
    encoder, images = make_encoder(), as_images(noise(7, 3, 20, 16))
    got = features(encoder, images, precision="fp32")
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), embed(encoder, images).vectors)


@pytest.mark.parametrize("size", [16, 8])
def test_pixels_as_features_are_the_resized_images_between_0_and_1(size):
    images = as_images(noise(7, 3, 16, 16))
    want = resized(images, range(7), size=size).reshape(7, -1).float() / 255
    torch.testing.assert_close(pixels(images, size=size), want)


@pytest.mark.parametrize(
    "given, message",
    [
        (torch.rand(2, 3, 8, 8), r"torch.float32 of shape \(2, 3, 8, 8\); expected uint8"),
        (np.zeros((2, 8, 8, 3)), r"float64 of shape \(2, 8, 8, 3\); expected uint8"),
        (np.array([None, "x"]), r"object of shape \(2,\); expected uint8"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "expected uint8 .* n > 0"),
        (noise(3, 8), r"shape \(3, 8\); expected uint8"),
        (noise(2, 8, 8, 8), "8 channels; expected 3: see --data.channels"),
        (as_images(noise(2, 1, 8, 8), channels=1), "1 channels; expected 3: load them with --data.channels 3"),
        ([], "no images in the list"),
        (["a.png"], "image 0 is a str; expected a PIL image or a uint8 tensor"),
        ([noise(3, 8, 8), noise(3, 8, 9)], r"image 1 is \(3, 8, 9\), the first \(3, 8, 8\); expected one size"),
        ([7], "image 0 is a int; expected"),
    ],
)
def test_what_is_not_images_is_refused_in_one_line(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        embed(make_encoder(), given)
    assert "\n" not in str(caught.value)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision is 'fp16'; expected fp32, bf16, fp64 or auto"):
        embed(make_encoder(), noise(2, 3, 16, 16), precision="fp16")


@pytest.mark.parametrize("batch_size", [None, 5])
def test_into_a_folder_go_the_rows_that_are_given_in_memory(batch_size, tmp_path):
    encoder = make_encoder()
    for index, picture in enumerate(as_pictures(noise(23, 3, 30, 21))):
        path = tmp_path / "photos" / ("cats" if index < 9 else "dogs") / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    whole = embed(encoder, tmp_path / "photos", batch_size=batch_size or 256)
    emb = embed_to(tmp_path / "emb", encoder, tmp_path / "photos", batch_size=batch_size, precision="fp32")
    np.testing.assert_array_equal(emb.vectors, whole.vectors)
    assert emb.paths == whole.paths and labels_of(emb) == labels_of(whole) and emb.classes == whole.classes
    assert emb.encoder is encoder and emb.folder == tmp_path / "emb"


@pytest.mark.parametrize("given", ["array", "tensor", "pictures"])
def test_into_a_folder_goes_what_a_program_hands_over(given, tmp_path):
    encoder, images = make_encoder(), noise(6, 3, 16, 16)
    same = {"array": images.movedim(1, -1).numpy(), "tensor": images, "pictures": as_pictures(images)}[given]
    emb = embed_to(tmp_path / "emb", encoder, same, precision="fp32")
    np.testing.assert_array_equal(emb.vectors, embed(encoder, images).vectors)
    assert emb.paths == tuple(map(str, range(6)))


def test_into_a_folder_progress_counts_images_and_the_mode_comes_back(tmp_path):
    encoder, told = make_encoder().train(), []
    embed_to(tmp_path / "a", encoder, noise(9, 3, 16, 16), batch_size=4, on_progress=lambda *both: told.append(both))
    assert told == [(4, 9), (8, 9), (9, 9)] and encoder.training
    with pytest.raises(RuntimeError, match="stop"):
        embed_to(
            tmp_path / "b",
            encoder,
            noise(9, 3, 16, 16),
            on_progress=lambda done, total: (_ for _ in ()).throw(RuntimeError("stop")),
        )
    assert encoder.training


def test_of_images_with_two_parts_either_can_be_embedded(tmp_path):
    for part, count in (("train", 4), ("test", 3)):
        for index, picture in enumerate(as_pictures(noise(count, 3, 20, 20))):
            (tmp_path / "photos" / part).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / "photos" / part / f"{index}.png")
    for part, count in (("train", 4), ("test", 3)):
        assert len(embed_to(tmp_path / part, make_encoder(), tmp_path / "photos", part=part)) == count
    with pytest.raises(ValueError, match="part is 'val'; expected train or test"):
        embed_to(tmp_path / "val", make_encoder(), tmp_path / "photos", part="val")
    with pytest.raises(ValueError, match="has no test images; expected a folder with train/ and test/, or leave out"):
        embed_to(tmp_path / "none", make_encoder(), tmp_path / "photos" / "test", part="test")


def test_the_next_files_are_read_while_a_batch_is_worked_on_and_not_many_more(tmp_path, monkeypatch):
    for index, picture in enumerate(as_pictures(noise(40, 3, 20, 20))):
        picture.save(tmp_path / f"{index:02}.png")
    module, read, seen = sys.modules[features.__module__], [], []
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda path, channels: (read.append(path), decode(path, channels))[1])

    def look(done: int, total: int) -> None:
        time.sleep(0.05)
        seen.append(len(read))

    embed_to(tmp_path / "emb", make_encoder(), tmp_path, batch_size=4, on_progress=look)
    assert seen[0] == 12 and seen[-1] == 40  # two batches more than are done


def test_files_are_read_ahead_in_memory_too_and_give_the_same_rows(tmp_path, monkeypatch):
    for index, picture in enumerate(as_pictures(noise(40, 3, 20, 20))):
        picture.save(tmp_path / f"{index:02}.png")
    module, started, seen = sys.modules[features.__module__], [], []
    images = FileImages(tuple(sorted(map(str, tmp_path.iterdir()))), None, None)
    whole = features(make_encoder(), images, precision="fp32")
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda path, channels: (started.append(path), decode(path, channels))[1])

    def look(done: int, total: int) -> None:
        time.sleep(0.05)
        seen.append(len(started))

    got = features(make_encoder(), images, batch_size=4, precision="fp32", on_progress=look)
    assert seen[0] == 12 and seen[-1] == 40  # two batches more than are done
    torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-5)


def test_many_features_go_into_a_file_that_has_its_room_before_work_starts(monkeypatch):
    encoder, images = make_encoder(), as_images(noise(23, 3, 16, 16))
    whole, room = features(encoder, images, precision="fp32"), sys.modules["moco.files"]
    monkeypatch.setattr(room, "HELD_IN_MEMORY", 100)
    assert torch.equal(features(encoder, images, precision="fp32"), whole)

    def unsupported(*asked: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert torch.equal(features(encoder, images, precision="fp32"), whole)

    def full(handle: int, start: int, size: int) -> None:
        assert size == 4 * 23 * 10
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"23 rows of 10 features take \S+ GiB, for which \S+ has no space; free some"):
        features(encoder, images, on_progress=lambda *done: pytest.fail("worked before there was room"))


def test_a_file_that_cannot_be_read_is_black_and_named(tmp_path, caplog):
    for index, picture in enumerate(as_pictures(noise(5, 3, 20, 20))):
        picture.save(tmp_path / f"{index}.jpg")
    spoilt = tmp_path / "3.jpg"
    images = FileImages(tuple(sorted(map(str, tmp_path.iterdir()))), None, None)
    spoilt.write_bytes(spoilt.read_bytes()[:-100])
    got, bad = read_features(make_encoder(), images, precision="fp32")
    assert list(bad) == [3] and bad[3].path == str(spoilt)
    torch.testing.assert_close(got[3], reference(make_encoder(), torch.zeros(1, 3, 16, 16, dtype=torch.uint8))[0])
    assert torch.equal(features(make_encoder(), images, precision="fp32"), got)
    assert f"1 of 5 images are black: {str(spoilt)!r} cannot be read" in caplog.text


def test_a_fingerprint_is_of_weights_and_description(tmp_path):
    encoder = make_encoder()
    assert fingerprint(encoder) == fingerprint(make_encoder()) == fingerprint(copy.deepcopy(encoder))
    others = [copy.deepcopy(encoder) for _ in range(3)]
    others[0].backbone.get_parameter("0.weight").data[0, 0, 0, 0] += 1e-4
    others[1].input_size = 17
    others[2].backbone.get_buffer("1.running_mean")[0] += 1e-4
    assert len({fingerprint(each) for each in (encoder, *others)}) == 4


def test_in_memory_embeddings_carry_their_encoder():
    encoder = make_encoder()
    assert embed(encoder, noise(2, 3, 16, 16)).encoder is encoder


LITTLE_ROOM = """
import pathlib, resource, sys
import torch
from PIL import Image
import moco
from moco.method.encoder import ImageEncoder

class Mean(torch.nn.Module):
    num_features = 3

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.scale * images.mean(dim=(2, 3))

torch.set_num_threads(1)
encoder = ImageEncoder(
    Mean(), name="own", stem="small", channels=3, mean=(0.0,) * 3, std=(1.0,) * 3, input_size=224
).eval()
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
table = moco.embed(encoder, sys.argv[1], precision="fp32")
found = moco.search(table, [Image.open(path) for path in table.paths], k=1, encoder=encoder)
print(*(pathlib.Path(path).stem for (path,) in found.paths))
print(*(round(255 * float(value)) for value in table.vectors[:, 0]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux, which says and limits what is used")
def test_images_30000_pixels_long_are_embedded_and_searched_in_a_gigabyte(tmp_path):
    """Resized as a whole, each would take 4.5."""
    for number, size in enumerate(((30_000, 1), (1, 30_000), (30_000, 3))):
        Image.new("RGB", size, (40 * number, 90, 9)).save(tmp_path / f"{number}.png")
    command = [sys.executable, "-c", LITTLE_ROOM, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["0 1 2", "0 40 80"]
