import math
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import moco
from moco.config import DataConfig, PretrainConfig, merge, parse_config
from moco.data import ArrayImages, Splits, load_data
from moco.evaluate import held_out
from moco.evaluate.health import rank_me
from moco.method.encoder import Encoder, ImageEncoder
from moco.method.model import Output
from moco.method.optim import resolved_lr
from moco.method.variants import loss_range
from moco.recipes import load_recipe
from moco.report.pictures import draw_neighbours
from moco.storage.run import Run
from moco.training.briefing import briefing, cautions, environment
from moco.training.metrics import COLUMNS, TIMES, Clock, Meter, spread
from moco.training.monitor import FIXED_EPOCH, HEALTH, Monitor, build_monitor
from moco.views.specs import view_specs
from moco.views.two_views import TwoViews

CPU = torch.device("cpu")


def images(number: int, *, num_classes: int = 2, labelled: bool = True) -> ArrayImages:
    pixels = torch.randint(0, 256, (number, 3, 8, 8), generator=torch.Generator().manual_seed(number)).byte()
    labels = torch.arange(number) % num_classes if labelled else None
    classes = tuple(str(label) for label in range(num_classes)) if labelled else None
    return ArrayImages(pixels, labels, classes, tuple(map(str, range(number))))


# Numbers of the step


def output(loss: float) -> Output:
    zero = torch.zeros(())
    return Output(torch.tensor(loss, requires_grad=True), torch.zeros(2, 3), None, zero + 0.5, zero - 0.25, zero + 0.75)


def test_a_meter_gives_means_since_it_was_read() -> None:
    meter = Meter(CPU)
    for losses in ([1.0, 2.0, 6.0], [4.0]):
        for loss in losses:
            meter.add(output(loss), torch.tensor(loss / 10))
        row = meter.read()
        assert row["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-12)
        assert row["spread"] == pytest.approx(row["loss"] / 10, rel=1e-6)
        assert (row["positive"], row["negative"], row["pretext_accuracy"]) == (0.5, -0.25, 75.0)
    assert set(row) < set(COLUMNS)


def test_a_meter_goes_on_where_another_was() -> None:
    first, second = Meter(CPU), Meter(CPU)
    for loss in (1.0, 2.0):
        first.add(output(loss), torch.tensor(0.5))
    second.restore(first.state())
    for meter in (first, second):
        meter.add(output(6.0), torch.tensor(0.5))
    assert first.read() == second.read()


def test_a_clock_counts_training_alone_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    fake = types.SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0] / 2)
    monkeypatch.setattr("moco.training.metrics.time", fake)
    clock = Clock()
    now[0] += 50  # something else, with a checkpoint in the middle of it
    assert clock.state() == {"train_seconds": 0, "cpu_seconds": 0}
    now[0] += 50
    clock.start()
    now[0] += 2
    first = clock.read(10, 32, 0.5)
    assert first == {"train_seconds": 2, "cpu_seconds": 1, "data_wait": 25}  # no speed: since when?
    now[0] += 4
    second = clock.read(12, 32, 9.0)
    assert second == {"train_seconds": 6, "cpu_seconds": 3, "data_wait": 100, "images_per_second": 16}
    assert set(second) == set(TIMES)
    resumed = Clock()
    resumed.restore(clock.state())
    now[0] += 50
    resumed.start()
    now[0] += 2
    assert resumed.state() == {"train_seconds": 8, "cpu_seconds": 4}


@pytest.mark.parametrize("dim", [2, 16, 256])
def test_spread_is_one_on_the_sphere_and_none_when_collapsed(dim: int) -> None:
    keys = torch.nn.functional.normalize(torch.randn(4096, dim, generator=torch.Generator().manual_seed(0)), dim=1)
    assert spread(keys) == pytest.approx(1, abs=0.03)
    assert spread(keys[:1].repeat(64, 1)) == pytest.approx(0, abs=1e-6)
    half = keys.clone()
    half[:, dim // 2 :] = 0
    assert 0 < spread(half) < spread(keys)


# What is held out


def test_every_tenth_training_image_is_held_out_always_the_same() -> None:
    train = images(103)
    for splits in (Splits(train, None), Splits(train, images(5))):
        first, again = (held_out(splits, use_test=False) for _ in range(2))
        assert first.test.paths == again.test.paths == train.paths[::10]
        assert sorted(first.train.paths + first.test.paths) == sorted(train.paths)
        assert isinstance(first.test, ArrayImages) and torch.equal(first.test.images, train.images[::10])


def test_a_test_part_is_asked_where_there_is_one() -> None:
    train, test = images(30), images(7)
    assert held_out(Splits(train, test)) == (train, test)


def monitor(splits: Splits, **watch: Any) -> Monitor:
    settings: dict[str, Any] = {"backbone": "resnet-tiny", "stem": "small", "dim": 8, "queue_size": 64}
    config = parse_config(
        {"batch_size": 16, "model": settings, "monitor": watch, "engine": {"precision": "fp32", "accelerator": "cpu"}}
    )
    model = moco.create_model("v2", **settings)
    query = model.query_encoder
    assert isinstance(query, Encoder)
    about: dict[str, Any] = {"name": "resnet-tiny", "stem": "small", "channels": 3, "mean": (0.5,) * 3}
    return build_monitor(
        config, splits, ImageEncoder(query.backbone, std=(0.5,) * 3, input_size=8, **about), query.projector
    )


def test_without_labels_or_with_hardly_an_image_there_is_no_accuracy_but_health() -> None:
    for splits in (Splits(images(40, labelled=False), None), Splits(images(19), None)):
        watcher = monitor(splits)
        assert watcher.knn() == watcher.accuracies() == watcher.accuracies_of_pixels() == {}
        assert watcher.knn_and_health().keys() == set(HEALTH)


@pytest.mark.parametrize(("split", "asked"), [("heldout", 4), ("test", 7)])
def test_best_is_chosen_on_held_out_training_images_unless_the_protocol_says_test(split: str, asked: int) -> None:
    watcher = monitor(Splits(images(40), images(7)), split=split)
    assert watcher.during is not None and watcher.final is not None
    assert len(watcher.during.test) == asked
    assert len(watcher.final.test) == 7
    assert len(watcher.during.train) + (asked if split == "heldout" else 0) == 40


def test_looking_leaves_the_encoder_as_it_was() -> None:
    watcher = monitor(Splits(images(60), images(20)))
    before = {name: value.clone() for name, value in watcher.encoder.state_dict().items()}
    state = torch.random.get_rng_state()
    assert watcher.knn_and_health().keys() == {"knn_top1", "knn_projection_top1", *HEALTH} and set(HEALTH) < set(
        COLUMNS
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert watcher.accuracies().keys() == {"knn_top1", "one_label", "five_labels"}
    assert watcher.encoder.training and watcher.projector.training
    assert all(torch.equal(value, before[name]) for name, value in watcher.encoder.state_dict().items())


def test_health_is_of_two_views_of_the_run_that_never_change() -> None:
    watcher = monitor(Splits(images(40, labelled=False), None), every=3)
    first, again = watcher.health(), watcher.knn_and_health()
    assert first == again
    train = watcher.viewed
    assert isinstance(train, ArrayImages) and len(train) == 40
    pair = TwoViews(view_specs(watcher.config.views), 16, watcher.config.seed)(
        train.images, torch.arange(40), epoch=FIXED_EPOCH
    )
    with torch.no_grad():
        x, y = (watcher.encoder.eval()(view) for view in pair)
    assert first["effective_rank"] == pytest.approx(rank_me(x), rel=1e-3)
    x, y = (torch.nn.functional.normalize(features, dim=1) for features in (x, y))
    assert first["alignment"] == pytest.approx((x - y).square().sum(dim=1).mean().item(), rel=1e-3)
    potentials = torch.exp(-2 * torch.pdist(x).square())
    assert first["uniformity"] == pytest.approx(potentials.mean().log().item(), rel=1e-3)


def test_health_follows_the_encoder_that_is_trained() -> None:
    watcher = monitor(Splits(images(60, labelled=False), None))
    before = watcher.health()
    with torch.no_grad():
        for name, parameter in watcher.encoder.named_parameters():
            parameter.fill_(1.0 if name.endswith("bias") else 0.0)  # the same features for every image
    after = watcher.health()
    assert after["effective_rank"] == pytest.approx(1, abs=0.01) and before["effective_rank"] > 3
    assert after["uniformity"] == pytest.approx(0, abs=1e-3) and before["uniformity"] < -0.01


def test_a_quarter_of_many_images_tells_of_health() -> None:
    for number, seen in ((100, 100), (2000, 500), (5000, 1000)):
        assert len(monitor(Splits(images(number, labelled=False), None)).viewed) == seen


def test_files_are_read_once_for_all_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
    files = load_data(DataConfig(source=str(tmp_path), memory=1e-9)).train
    watcher = monitor(Splits(files, None))
    first = watcher.health()
    for number in range(12):
        (tmp_path / f"{number:02}.png").unlink()
    assert watcher.health() == first
    monkeypatch.setattr("moco.training.monitor.MAX_BYTES", 5 * 2 * 3 * 16 * 16)
    assert len(monitor(Splits(files, None)).viewed) == 5


def test_a_class_with_few_images_is_not_asked_for_five_labels() -> None:
    few = images(20, num_classes=5)
    assert monitor(Splits(few, images(10, num_classes=5))).accuracies().keys() == {"knn_top1", "one_label"}


def test_raw_pixels_are_recognised_by_themselves() -> None:
    same = images(40, num_classes=40)
    assert monitor(Splits(same, same), knn_k=1).accuracies_of_pixels() == {"knn_top1": 100.0, "one_label": 100.0}


# What is said before


def said(config: PretrainConfig, num_images: int, *, mask_own: bool = False) -> str:
    model = moco.create_model("v2", backbone="resnet-tiny", queue_size=8)
    lr = resolved_lr(config.optim, config.batch_size)
    return "\n".join(briefing(config, model, num_images, lr=lr, mask_own=mask_own))


def test_the_briefing_says_what_people_guess_wrong() -> None:
    config = merge(load_recipe("cifar10"), {"batch_size": 256})
    text = said(config, 50_000)
    assert "images: 50,000; steps per epoch: 195; epochs: 200" in text
    assert "learning rate: 0.03 (0.03 x 256 / 256), cosine" in text
    assert "split: statistics over 8 groups of each batch" in text
    assert f"loss: {math.log(4097):.2f} is chance" in text
    assert f"{math.log(1 + 4096 * math.exp(-10)):.2f} the floor" in text
    assert "queue: 4,096 keys, 8% of the images" in text and "own older keys" not in text
    assert "own older keys are excluded" in said(config, 4_000, mask_own=True)


@pytest.mark.parametrize(("kind", "words"), [("plain", "over the whole batch"), ("shuffle", "across devices")])
def test_the_briefing_names_the_batch_norm(kind: str, words: str) -> None:
    assert words in said(merge(load_recipe("digits"), {"model": {"batchnorm": kind}}), 1442)


def test_the_briefing_of_v3_has_no_queue() -> None:
    v3 = {"variant": "v3", "queue_size": 0, "temperature": 1.0}
    config = merge(load_recipe("digits"), {"model": v3, "optim": {"lr_scaling": "none"}, "batch_size": 64})
    text = said(config, 1442)
    assert "queue:" not in text
    assert "(not scaled)" in text and "synchronised" in text
    chance, floor = loss_range(config.model, 64)
    assert f"loss: {chance:.2f} is chance, {floor:.2f}" in text


def masks(config: PretrainConfig, num_images: int) -> bool:
    return config.model.mask_own is not False and config.model.queue_size > 0.1 * num_images


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar10-laptop", "cifar10-symmetric", "cifar10-mindspore"])
def test_shipped_recipes_are_given_no_caution(name: str) -> None:
    config = load_recipe(name)
    number = len(load_data(config.data).train) if name == "digits" else 50_000
    assert cautions(config, number, mask_own=masks(config, number)) == []


def test_what_goes_wrong_is_cautioned_against() -> None:
    config = load_recipe("cifar10")
    plain = cautions(merge(config, {"model": {"batchnorm": "plain"}}), 50_000, mask_own=False)
    assert len(plain) == 1 and "plain batch norm with a queue" in plain[0] and "--model.batchnorm auto" in plain[0]
    large = cautions(config, 10_000, mask_own=False)
    assert len(large) == 1 and "the queue holds 41% of the images" in large[0] and "--model.queue_size" in large[0]
    assert cautions(config, 10_000, mask_own=True) == []
    v3 = {"model": {"variant": "v3", "queue_size": 0, "batchnorm": "plain"}}
    assert cautions(merge(config, v3), 100, mask_own=False) == []
    parts = cautions(merge(config, v3 | {"optim": {"accumulate": 2}}), 100, mask_own=False)
    assert len(parts) == 1 and parts[0].startswith("v3 in 2 parts: an image's negatives")


def test_the_machine_is_described() -> None:
    about = environment(CPU)
    assert about["device"] == "cpu" and about["processors"] >= 1
    assert about["versions"]["torch"] and about["versions"]["timm"]


# Pictures


def test_files_that_break_off_do_not_spoil_the_picture_of_neighbours(tmp_path: Path) -> None:
    for number in range(30):
        path = tmp_path / f"{number:02}.png"
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)).save(path)
        if number % 5 < 4:
            path.write_bytes(path.read_bytes()[:600])
    files = load_data(DataConfig(source=str(tmp_path), memory=1e-6, max_bad=0.9)).train
    watcher = monitor(Splits(files, None))
    draw_neighbours(Run(tmp_path, watcher.config), watcher.encoder, files, files)
    with Image.open(tmp_path / "neighbours.png") as picture:
        picture.load()
