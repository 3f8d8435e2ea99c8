import itertools
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torchvision.transforms.v2 import functional as tv

from moco.config import DataConfig, ViewsConfig
from moco.data import ArrayImages, FileImages, Loader, epoch_order, load_data, resized
from moco.data.loader import num_workers
from moco.views.crops import Box
from moco.views.specs import view_specs
from moco.views.two_views import TwoViews

CPU = torch.device("cpu")


def arrays(num_images: int) -> ArrayImages:
    images = torch.arange(num_images, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    return ArrayImages(images, labels=None, classes=None, paths=tuple(map(str, range(num_images))))


def files(folder: Path, num_images: int, broken: tuple[int, ...] = ()) -> FileImages:
    """Image i is grey of level i; a broken one is cut off after its header."""
    folder.mkdir(exist_ok=True)
    for i in range(num_images):
        path = folder / f"{i:03}.png"
        Image.new("RGB", (70 + i, 80), (i, i, i)).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:60])
    train = load_data(DataConfig(source=str(folder), max_bad=1.0)).train
    assert isinstance(train, FileImages) and len(train) == num_images
    return train


def crop(image: torch.Tensor, id: int, epoch: int) -> torch.Tensor:
    """Both views hold the image's level; the second is marked with id + epoch, and uses no thread but its own."""
    first = image[:, :5, :5].clone()
    return torch.stack([first, torch.full_like(first, (id + epoch) % 256)])


def loader(images, **settings) -> Loader:
    defaults: dict[str, Any] = {"batch_size": 4, "seed": 0, "device": CPU, "workers": 0, "crop": crop}
    return Loader(images, **defaults | settings)


def test_the_order_is_a_permutation_fixed_by_seed_and_epoch_alone():
    first = epoch_order(100, seed=3, epoch=7)
    torch.rand(5)
    assert torch.equal(first, epoch_order(100, seed=3, epoch=7))
    assert first.sort().values.tolist() == list(range(100))
    others = [epoch_order(100, seed=seed, epoch=epoch) for seed, epoch in ((3, 8), (4, 7), (7, 3), (8, 3))]
    assert not any(torch.equal(first, other) for other in others)


def test_the_order_of_today_is_the_order_of_every_day():
    assert epoch_order(8, seed=0, epoch=0).tolist() == [6, 5, 2, 3, 0, 4, 1, 7]
    assert epoch_order(8, seed=0, epoch=1).tolist() == [1, 6, 5, 2, 7, 4, 3, 0]


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_an_epoch_meets_every_image_once_in_the_order_and_drops_the_rest(kind, tmp_path):
    images = arrays(11) if kind == "memory" else files(tmp_path, 11)
    deal = loader(images)
    batches = list(deal.epoch(2))
    assert deal.steps_per_epoch == len(batches) == 2
    ids = torch.cat([ids for _, ids in batches])
    assert ids.tolist() == epoch_order(11, seed=0, epoch=2)[:8].tolist()
    pixels = torch.cat([batch for batch, _ in batches])
    assert pixels.dtype == torch.uint8
    if kind == "memory":
        assert pixels.shape == (8, 3, 4, 4) and torch.equal(pixels[:, 0, 0, 0].long(), ids)
    else:
        assert pixels.shape == (8, 2, 3, 5, 5) and torch.equal(pixels[:, 0, 0, 0, 0].long(), ids)
        assert torch.equal(pixels[:, 1, 2, 4, 4].long(), ids + 2)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_ranks_interleave_the_global_batch(kind, tmp_path):
    images = arrays(12) if kind == "memory" else files(tmp_path, 12)
    whole = list(loader(images, batch_size=6).epoch(0))
    parts = [list(loader(images, batch_size=6, rank=rank, world_size=3).epoch(0)) for rank in range(3)]
    for step, (batch, ids) in enumerate(whole):
        for rank in range(3):
            assert torch.equal(parts[rank][step][1], ids[rank::3])
            assert torch.equal(parts[rank][step][0], batch[rank::3])


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_an_epoch_starts_exactly_at_a_step_and_reads_nothing_before_it(kind, tmp_path):
    images = arrays(12) if kind == "memory" else files(tmp_path, 12)
    seen = []

    def watched(image, id, epoch):
        seen.append(id)
        return crop(image, id, epoch)

    whole = list(loader(images, batch_size=3).epoch(1))
    rest = list(loader(images, batch_size=3, crop=watched).epoch(1, start=2))
    assert len(rest) == 2
    for (batch, ids), (again, ids_again) in zip(whole[2:], rest, strict=True):
        assert torch.equal(batch, again) and torch.equal(ids, ids_again)
    if kind == "files":
        assert seen == torch.cat([ids for _, ids in rest]).tolist()
    assert list(loader(images, batch_size=3).epoch(1, start=4)) == []


def test_worker_processes_give_what_this_process_gives_and_use_one_thread(tmp_path):
    images = files(tmp_path, 12, broken=(5,))

    def threads(image, id, epoch):
        return torch.full_like(crop(image, id, epoch), torch.get_num_threads())

    here = list(loader(images, max_bad=0.1).epoch(0))
    there = list(loader(images, workers=2, max_bad=0.1).epoch(0))
    for (batch, ids), (again, ids_again) in zip(here, there, strict=True):
        assert torch.equal(batch, again) and torch.equal(ids, ids_again)
    assert all((batch == 1).all() for batch, _ in loader(images, workers=2, crop=threads, max_bad=0.1).epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_made_in_parts_is_the_batch_made_at_once(workers, tmp_path, monkeypatch):
    images = files(tmp_path, 24, broken=(5, 6))
    views = TwoViews(view_specs(ViewsConfig(recipe="v2", size=16)), 16)
    settings = {"batch_size": 12, "max_bad": 0.2, "crop": views, "world_size": 1}
    whole = list(loader(images, **settings).epoch(1))
    monkeypatch.setattr("moco.data.worker.PART", 4)
    deal = loader(images, workers=workers, **settings)
    for start in (0, 1):
        for (batch, ids), (expected, expected_ids) in zip(deal.epoch(1, start=start), whole[start:], strict=True):
            assert torch.equal(batch, expected) and torch.equal(ids, expected_ids)
            assert batch.stride() == expected.stride()
    assert len(deal.bad) == 2


def test_what_is_read_ahead_does_not_grow_with_the_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("moco.data.worker.PART", 2)
    images, log = files(tmp_path / "images", 96), tmp_path / "read"

    def noted(image, id, epoch):
        with log.open("ab") as file:
            file.write(b".")
        return crop(image, id, epoch)

    batches = loader(images, batch_size=24, workers=2, crop=noted).epoch(0)
    next(batches)
    time.sleep(1)
    assert 2 * 24 <= log.stat().st_size <= 24 + 2 * 2 * 7  # a batch ahead, and a part for each worker
    assert len(list(batches)) == 3 and log.stat().st_size == 96


def test_a_signal_to_all_processes_of_a_group_leaves_the_readers_to_whoever_trains(tmp_path):
    images, batches = files(tmp_path, 40), []
    for batch in loader(images, workers=2).epoch(0):
        if len(batches) == 1:  # each of the two has read one
            readers = multiprocessing.active_children()
            for reader, signum in itertools.product(readers, (signal.SIGINT, signal.SIGTERM)):
                os.kill(reader.pid or 0, signum)
            assert len(readers) == 2
        batches.append(batch)
    assert all(torch.equal(ours[1], each[1]) for ours, each in zip(batches, loader(images).epoch(0), strict=True))
    assert not multiprocessing.active_children()


def test_reading_files_draws_nothing_from_the_global_generator(tmp_path):
    images = files(tmp_path, 8)
    before = torch.get_rng_state()
    list(loader(images, workers=1).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_that_fails_is_replaced_by_the_next_of_the_order_and_named(tmp_path, caplog):
    order = epoch_order(12, seed=0, epoch=0).tolist()
    broken = (order[1], order[2], order[11])
    deal = loader(files(tmp_path, 12, broken), max_bad=0.5)
    with caplog.at_level(logging.WARNING, logger="moco"):
        batches = list(deal.epoch(0))
    ids = torch.cat([ids for _, ids in batches]).tolist()
    assert ids == [order[0], order[3], order[3], *order[3:11], order[0]]
    pixels = torch.cat([batch for batch, _ in batches])
    assert pixels[:, 0, 0, 0, 0].tolist() == ids
    assert sorted(deal.bad) == sorted(str(tmp_path / f"{i:03}.png") for i in broken)
    assert len(caplog.records) == 3
    list(deal.epoch(1))
    assert len(deal.bad) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_failures_stop_the_epoch_in_one_line(workers, tmp_path):
    images = files(tmp_path, 12, broken=tuple(range(6)))
    with pytest.raises(ValueError, match=r"of 12 files could not be read.*at most 20.00%.*\.png") as caught:
        list(loader(images, workers=workers, max_bad=0.2).epoch(0))
    assert "\n" not in str(caught.value)


def test_nothing_but_failures_stops_whatever_is_allowed(tmp_path):
    with pytest.raises(ValueError, match="4 of 4 files"):
        list(loader(files(tmp_path, 4, broken=(0, 1, 2, 3)), max_bad=1.0).epoch(0))


def test_the_wait_for_files_is_measured_between_readings(tmp_path):
    def slow(image, id, epoch):
        time.sleep(0.01)
        return crop(image, id, epoch)

    deal = loader(files(tmp_path, 8), crop=slow)
    list(deal.epoch(0))
    assert deal.wait_seconds >= 0.08
    assert deal.wait_seconds == 0
    memory = loader(arrays(8))
    list(memory.epoch(0))
    assert memory.wait_seconds == 0


def test_impossible_batches_are_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size is 9, expected at most the number of images, 8"):
        loader(arrays(8), batch_size=9)
    with pytest.raises(ValueError, match="batch_size is 4, expected a multiple of the 3 processes"):
        loader(arrays(8), world_size=3)
    with pytest.raises(ValueError, match="crop"):
        loader(files(tmp_path, 8), crop=None)


# Reduced decoding


def camera(path: Path, height: int, width: int, **options) -> torch.Tensor:
    """A JPEG with something to see at every scale; returns its pixels as decoded whole."""
    random = np.random.default_rng(height)
    image = Image.new("RGB", (width, height))
    for side in (8, 40, 200):
        noise = Image.fromarray(random.integers(0, 256, (height // side + 1, width // side + 1, 3), dtype=np.uint8))
        image = Image.blend(image, noise.resize((width, height), Image.Resampling.BICUBIC), 0.6)
    image.save(path, quality=95, **options)
    return FileImages((str(path),), None, None).decode(0)


def one_batch(path: Path, crop) -> torch.Tensor:
    images = FileImages((str(path),) * 2, None, None)
    ((batch, _),) = loader(images, batch_size=2, crop=crop).epoch(0)
    return batch


@pytest.mark.parametrize("height, width, shrunk", [(150, 190, False), (900, 1200, True), (1201, 907, True)])
def test_boxes_give_the_crops_of_the_whole_image_but_for_rounding(height, width, shrunk, tmp_path, monkeypatch):
    pixels, used = camera(tmp_path / "x.jpg", height, width), []
    views, draft = TwoViews(view_specs(ViewsConfig(recipe="v2", size=96)), 96), JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, "draft", lambda *arguments: (used.append(1), draft(*arguments))[1])
    got, want = one_batch(tmp_path / "x.jpg", views), torch.stack([views.crop(pixels, id, 0) for id in (0, 1)])
    assert bool(used) == shrunk
    order = epoch_order(2, seed=0, epoch=0)
    difference = (got.int() - want[order].int()).abs().float()
    # Shrinking by transforms of 4 or 2 instead of 8 rows is no triangle filter, and a crop moves by half a pixel.
    assert difference.mean() < 4 if shrunk else difference.max() == 0
    assert float(got.float().std() / want.float().std()) == pytest.approx(1, rel=0.05)


def test_no_view_is_made_of_fewer_pixels_than_it_has(tmp_path, monkeypatch):
    camera(tmp_path / "x.jpg", 640, 640)
    seen, draft = [], JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, "draft", lambda *arguments: (seen.append(arguments[2]), draft(*arguments))[1])

    class Square:
        size = 100

        def __init__(self, sides):
            self.sides = sides

        def boxes(self, ids, *, epoch):
            return lambda place, height, width: [Box(height - side, 0, side, side) for side in self.sides]

    for sides, shrink in (((640, 640), 4), ((640, 399), 2), ((400, 400), 4), ((640, 199), 1), ((99, 640), 1)):
        seen.clear()
        batch = one_batch(tmp_path / "x.jpg", Square(sides))
        assert batch.shape == (2, 2, 3, 100, 100)
        assert seen == ([] if shrink == 1 else [(640 // shrink, 640 // shrink)] * 2), sides


def test_a_photo_on_its_side_is_cropped_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = camera(tmp_path / "x.jpg", 800, 1200, exif=exif)
    assert pixels.shape == (3, 1200, 800)
    views = TwoViews(view_specs(ViewsConfig(recipe="v2", size=64)), 64)
    got = one_batch(tmp_path / "x.jpg", views)[epoch_order(2, seed=0, epoch=0).argsort()]
    want = torch.stack([views.crop(pixels, id, 0) for id in (0, 1)])
    assert (got.int() - want.int()).abs().float().mean() < 4


def test_an_unreadable_file_among_boxes_is_replaced_with_the_crops_of_the_other(tmp_path):
    images = files(tmp_path, 6, broken=(2,))
    views = TwoViews(view_specs(ViewsConfig(recipe="v2", size=16)), 16)
    for batch, ids in loader(images, batch_size=6, crop=views, max_bad=0.5).epoch(3):
        assert 2 not in ids.tolist() and len(ids) == 6
        for crops, id in zip(batch, ids.tolist(), strict=True):
            assert torch.equal(crops, views.crop(images.decode(id), id, 3))


def test_workers_share_the_cores_with_the_other_ranks_of_the_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(24), raising=False)
    for ranks, workers in ((1, 16), (2, 11), (8, 2), (24, 1)):
        assert num_workers(ranks) == workers


def test_resizing_to_the_size_of_the_images_is_plain_indexing():
    images = arrays(9)
    assert torch.equal(resized(images, [8, 2], size=4), images.images[[8, 2]])
    assert torch.equal(resized(images, torch.tensor([8, 2]), size=4), images.images[[8, 2]])


@pytest.mark.parametrize("shape, size", [((40, 60), 16), ((61, 40), 32), ((8, 8), 16), ((33, 70), 33)])
def test_resizing_is_torchvisions_resize_and_centre_crop(shape, size, tmp_path):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, *shape), dtype=np.uint8))
    for i, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    paths = tuple(str(tmp_path / f"{i}.png") for i in range(3))
    expected = tv.center_crop(tv.resize(pixels, [size], antialias=True), [size, size])[[2, 0]]
    for images in (ArrayImages(pixels, None, None, paths), FileImages(paths, None, None)):
        got = resized(images, [2, 0], size=size)
        assert got.shape == (2, 3, size, size)
        assert (got.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_of_one_row_or_column_is_cropped_as_any_other(workers, tmp_path):
    for name, size in (("wide", (30_000, 1)), ("tall", (1, 30_000)), ("photo", (90, 80)), ("strip", (30_000, 12))):
        Image.linear_gradient("L").resize(size).save(tmp_path / f"{name}.png")
    images = load_data(DataConfig(source=str(tmp_path))).train
    views = TwoViews(view_specs(ViewsConfig(recipe="v2", size=32)), 32)
    for batch, ids in loader(images, workers=workers, crop=views).epoch(0):
        assert batch.shape == (4, 2, 3, 32, 32) and sorted(ids.tolist()) == [0, 1, 2, 3]
        for crops, id in zip(batch, ids.tolist(), strict=True):
            assert torch.equal(crops, views.crop(images.decode(id), id, 0))


@pytest.mark.parametrize("size", [(2_000, 1), (1, 2_000), (2_000, 12), (3, 999)])
def test_strips_are_resized_as_torchvision_would(size, tmp_path):
    Image.effect_noise(size, 90).convert("RGB").save(tmp_path / "a.png")
    files, pixels = FileImages((str(tmp_path / "a.png"),), None, None), np.asarray(Image.open(tmp_path / "a.png"))
    images = torch.from_numpy(pixels.copy()).movedim(-1, 0)[None].contiguous()
    expected = tv.center_crop(tv.resize(images, [16], antialias=True), [16, 16])
    for each in (files, ArrayImages(images, None, None, ("a",))):
        assert (resized(each, [0], size=16).int() - expected.int()).abs().max() <= 1


def test_an_unreadable_file_is_black_and_named_when_resizing(tmp_path, caplog):
    images = files(tmp_path, 3, broken=(1,))
    with caplog.at_level(logging.WARNING, logger="moco"):
        batch = resized(images, [0, 1, 2], size=6)
    assert batch[:, 0, 0, 0].tolist() == [0, 0, 2]
    assert "1 of 3 images" in caplog.text and "001.png" in caplog.text


@pytest.mark.gpu
def test_a_gpu_gets_the_same_batches(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    gpu = torch.device("cuda")
    for (batch, ids), (expected, expected_ids) in zip(
        loader(arrays(12), device=gpu).epoch(0), loader(arrays(12)).epoch(0), strict=True
    ):
        assert batch.device.type == "cuda" and ids.device.type == "cpu"
        assert torch.equal(batch.cpu(), expected) and torch.equal(ids, expected_ids)
    for batch, ids in loader(files(tmp_path, 12), device=gpu, workers=1).epoch(0):
        assert batch.device.type == "cuda" and ids.is_pinned()
    images = ArrayImages(torch.randint(0, 256, (4, 3, 40, 50), dtype=torch.uint8), None, None, tuple("abcd"))
    moved = ArrayImages(images.images.to(gpu), None, None, images.paths)
    difference = resized(moved, [1, 3], size=16).cpu().int() - resized(images, [1, 3], size=16).int()
    assert difference.abs().max() <= 1
