"""Every source gives a set of images that fulfils the contract `Images`."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco.config import DataConfig
from moco.data import BadImage, Images, as_images, fingerprint, load_data, with_labels
from moco.data.decode import quiet_pillow
from moco.views.crops import Box, crop_resize
from small import write_stl10

STREAMED = 1e-9
"""GiB of memory in which no images fit."""


def photos(folder: Path, *, side: int) -> Path:
    for number in range(6):
        place = folder / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(6, side)[number]).save(place)
    return folder


def pixels(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def load(source: object, **settings: object) -> Images:
    return load_data(DataConfig.model_validate({"source": str(source)} | settings)).train


def array_rows(folder: Path, memory: float) -> Images:
    np.save(folder / "x.npy", pixels(6, 20))
    return load(folder / "x.npy", memory=memory)


def npz(folder: Path) -> Images:
    np.savez(folder / "x.npz", images=pixels(6, 20), labels=np.arange(6) % 2)
    return load(folder / "x.npz")


def listed(folder: Path) -> Images:
    photos(folder / "photos", side=70)
    rows = [f"photos/{'ab'[number % 2]}/{number}.png,{'ab'[number % 2]}" for number in range(6)]
    (folder / "list.csv").write_text("\n".join(["path,label", *rows]))
    return load(folder / "list.csv")


def shards(folder: Path) -> Images:
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, each in enumerate(pixels(6, 70)):
            file = io.BytesIO()
            Image.fromarray(each).save(file, "png")
            for name, content in ((f"{number}.png", file.getvalue()), (f"{number}.cls", b"%d" % (number % 2))):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return load(folder / "0.tar")


def hugging_face(folder: Path) -> Images:
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"image": [Image.fromarray(each) for each in pixels(6, 70)], "label": [0, 1] * 3}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(columns, features=kinds)).save_to_disk(folder / "saved")
    return load(folder / "saved")


def stl10(folder: Path) -> Images:
    write_stl10(folder / "stl10_binary")
    return load(folder)


SOURCES: dict[str, tuple[Callable[[Path], Images], bool, bool]] = {
    "digits": (lambda _: load("digits"), True, True),
    "npy in memory": (lambda folder: array_rows(folder, 2.0), True, False),
    "npy, mapped": (lambda folder: array_rows(folder, STREAMED), False, False),
    "npz": (npz, True, True),
    "folder, in memory": (lambda folder: load(photos(folder, side=20)), True, True),
    "folder, streamed": (lambda folder: load(photos(folder, side=70)), False, True),
    "folder, cached": (lambda folder: load(photos(folder / "a", side=70), cache=folder / "cache"), False, True),
    "list": (listed, False, True),
    "shards": (shards, False, True),
    "hugging face folder": (hugging_face, False, True),
    "stl10": (stl10, True, False),
    "array": (lambda _: as_images(pixels(6, 20)), True, False),
    "tensor": (lambda _: as_images(torch.from_numpy(pixels(6, 20)).movedim(3, 1)), True, False),
    "list of pictures": (lambda _: as_images([Image.fromarray(each) for each in pixels(6, 20)]), True, False),
}
"""(makes the images, whether they are in memory, whether they are labelled) by source."""


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_fulfils_the_contract(source: str, tmp_path: Path) -> None:
    make, in_memory, labelled = SOURCES[source]
    images = make(tmp_path)
    assert isinstance(images, Images) and images.channels == 3 and images.skipped == ()
    assert len(images) == len(images.paths) == len(set(images.paths)) >= 6

    assert (images.labels is not None) == (images.classes is not None) == labelled
    if images.labels is not None and images.classes is not None:
        assert images.labels.dtype == torch.int64 and images.labels.shape == (len(images),)
        assert 0 <= images.labels.min() <= images.labels.max() < len(images.classes) == len(set(images.classes))
    part = with_labels(images)
    assert part is images if images.labelled is None else part.labels is not None and len(part) < len(images)
    assert set(part.paths) <= set(images.paths) and isinstance(part, Images)

    held = images.in_memory
    assert (held is not None) == in_memory and images.nbytes == (0 if held is None else held.nbytes)
    decoded = [images.decode(index) for index in range(6)]
    assert all(each.dtype == torch.uint8 and each.shape[0] == 3 and each.ndim == 3 for each in decoded)
    assert held is None or (len(held) == len(images) and torch.equal(held[:6], torch.stack(decoded)))
    many = images.decode_many([4, 1])
    assert not any(isinstance(each, BadImage) for each in many)
    assert all(torch.equal(torch.as_tensor(each), decoded[index]) for each, index in zip(many, (4, 1), strict=True))
    with quiet_pillow():
        views = images.crops(3, lambda height, width: [Box(0, 0, height, width), Box(1, 2, 4, 5)], size=4)
    height, width = decoded[3].shape[1:]
    expected = [crop_resize(decoded[3], box, size=4) for box in (Box(0, 0, height, width), Box(1, 2, 4, 5))]
    assert all(map(torch.equal, views, expected))

    some = images.select(torch.tensor([5, 2]))
    assert type(some) is type(images) and some.paths == (images.paths[5], images.paths[2])
    assert some.classes == images.classes and some.channels == 3 and (some.cache is None) == (images.cache is None)
    assert images.labels is None or (some.labels is not None and torch.equal(some.labels, images.labels[[5, 2]]))
    assert torch.equal(some.decode(0), decoded[5]) and some.paths == images.select([5, 2]).paths
    assert fingerprint(some) == fingerprint(images.select([5, 2])) != fingerprint(images)
