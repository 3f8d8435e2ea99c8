"""The loop, on data so small that a run takes a moment."""

import importlib
import logging
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moco
from moco.config import PretrainConfig, merge, parse_config, to_yaml
from moco.data import Splits, as_images
from moco.method import backbones
from moco.method.optim import key_momentum, learning_rate
from moco.method.variants import loss_range
from moco.parallel import collectives
from moco.parallel.signals import Stopped
from moco.storage import checkpoint
from moco.storage.run import Run
from moco.training import loop
from moco.training.monitor import Monitor
from moco.training.settings import choose_settings
from moco.training.step import Training
from small import SmallBackbone

BATCH, QUEUE = 16, 40
IMAGES = torch.randint(0, 256, (64, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Pixels(nn.Module):
    """A backbone without batch norm, whose gradient is the mean over images of each one's."""

    num_features = 12

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, self.num_features)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1)).relu()


class Killed(BaseException):
    """No error that anybody handles."""


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(autouse=True)
def pixels_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backbones.BACKBONES, "pixels", lambda in_channels: Pixels())


def settings(changed: dict[str, dict[str, Any]] | None = None, **top: Any) -> PretrainConfig:
    """v1 on a linear backbone in float64, with these settings in place of some."""
    sections: dict[str, dict[str, Any]] = {
        "views": {"recipe": "cifar", "size": 8},
        "model": {"variant": "v1", "backbone": "pixels", "dim": 8, "queue_size": QUEUE, "batchnorm": "plain"},
        "optim": {"base_lr": 1.0, "weight_decay": 1e-4},
        "monitor": {"log_every": 1},
        "engine": {"accelerator": "cpu", "precision": "fp64", "threads": 1},
    }
    for name, section in (changed or {}).items():
        sections[name] = sections.get(name, {}) | section
    return parse_config({"epochs": 3, "batch_size": BATCH} | sections | top)


def state_after(folder: Path, steps: int, changed: dict[str, dict[str, Any]] | None = None, **top: Any) -> Any:
    """The checkpoint of a run of some steps on 64 random images."""
    run = moco.pretrain(settings(changed, steps=steps, **top), out=folder, data=IMAGES)
    return torch.load(run.last, weights_only=True)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_step_in_parts_is_the_same_step(symmetric: bool, tmp_path: Path) -> None:
    changed = {"model": {"symmetric": symmetric}}
    whole = state_after(tmp_path / "whole", 5, changed)["model"]
    parts = state_after(tmp_path / "parts", 5, changed | {"optim": {"accumulate": 2}})["model"]
    assert whole["queue.pointer"] == 5 * BATCH * (1 + symmetric) % QUEUE
    for name, value in whole.items():
        if value.is_floating_point():
            assert value.dtype == torch.float64
            torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-12, msg=name)
        else:
            assert torch.equal(parts[name], value), name
    assert (whole["queue.ids"] >= 0).all()


def test_parts_with_groups_are_the_whole_with_as_many_groups_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images i, i + 2, ... of a batch in one part: two groups of each are four of the whole, if keys stay in theirs."""
    monkeypatch.setitem(backbones.BACKBONES, "small", lambda in_channels: SmallBackbone())

    def state(name: str, splits: int, parts: int) -> Any:
        model = {"backbone": "small", "batchnorm": "split", "bn_splits": splits}
        changed = {"model": model, "optim": {"accumulate": parts}}
        return state_after(tmp_path / name, 4, changed)["model"]

    parts = state("parts", 2, 2)

    def orders_of_parts(n: int, device: torch.device, generator: torch.Generator) -> Tensor:
        halves = [torch.randperm(n // 2, generator=generator) for _ in range(2)]
        return torch.stack([2 * half + number for number, half in enumerate(halves)], dim=1).flatten()

    monkeypatch.setattr(collectives, "permutation", orders_of_parts)
    whole = state("whole", 4, 1)
    for name, value in whole.items():
        if value.is_floating_point() and "running" not in name:  # those move once a part
            torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-10, msg=name)


def test_one_call_starts_a_run_and_goes_on_with_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("killed before its first checkpoint")
    for steps in (2, 3, 3):
        found = moco.pretrain(settings(steps=steps), out=run, resume=run, data=IMAGES)
        assert [row["step"] for row in found.metrics] == list(range(1, steps + 1))
    for changed in ({"optim": {"base_lr": 0.5}}, {"engine": {"precision": "fp32"}}):
        (section, inner), *_ = changed.items()
        (name, value), *_ = inner.items()
        with pytest.raises(ValueError, match=rf"was begun with --{section}.{name} .*, now it is {value}; resume with"):
            moco.pretrain(settings(changed), out=run, resume=run, data=IMAGES)
        with pytest.raises(ValueError, match=rf"was begun with --{section}.{name} .*, now it is {value}; resume with"):
            moco.pretrain(settings(changed), resume=run, data=IMAGES)
    with pytest.raises(ValueError, match="^out is .*elsewhere and resume .*run; a run continues in its own folder"):
        moco.pretrain(settings(), out=tmp_path / "elsewhere", resume=run, data=IMAGES)
    assert moco.pretrain(settings(steps=4), resume=run, data=IMAGES).metrics[-1]["step"] == 4
    begun = Run.open(run)
    loose = {"monitor": {"log_every": 1, "save_every": 5.0}, "data": {"max_bad": 0.5}}  # with defaults that are choices
    (run / "config.yaml").write_text(to_yaml(merge(begun.config, loose)))
    again = choose_settings(settings(), None, Run.open(run))
    assert (again.monitor.save_every, again.data.max_bad) == (5.0, 0.5)
    assert choose_settings(settings({"data": {"max_bad": 0.1}}), IMAGES, Run.open(run)).data.max_bad == 0.1
    assert choose_settings(settings(), None, begun).steps == 2  # not given: as it was begun
    assert choose_settings(merge(begun.config, {"steps": None}), None, begun).steps is None  # given as none
    (run / "config.yaml").write_text(to_yaml(merge(begun.config, {"engine": {"devices": 1}})))
    begun = Run.open(run)
    for data in (None, IMAGES):  # nor is anything given by naming the images
        again = choose_settings(settings(), data, begun)
        assert (again.steps, again.engine.devices) == (2, 1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError):
        moco.pretrain(settings(), out=tmp_path / "other", resume=tmp_path / "other", data=IMAGES)


def test_killed_while_knn_is_taken_a_run_comes_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, undisturbed, look = tmp_path / "run", tmp_path / "undisturbed", Monitor.knn_and_health
    config = settings({"monitor": {"log_every": 1, "every": 1, "save_every": 1e-6}})
    looks: list[int] = []

    def killed(monitor: Monitor) -> dict[str, float]:
        looks.append(1)
        if len(looks) == 2:
            raise Killed
        return look(monitor)

    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "knn_and_health", killed)
        with pytest.raises(Killed):
            moco.pretrain(config, out=run, data=IMAGES)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["step"] == 7
    assert Run.open(run).metrics[-1]["step"] == 7
    found, wanted = moco.pretrain(config, resume=run, data=IMAGES), moco.pretrain(config, out=undisturbed, data=IMAGES)
    timed = ("images_per_second", "data_wait", "train_seconds", "cpu_seconds")
    rows, others = (
        [{n: v for n, v in row.items() if n not in timed} for row in each.metrics] for each in (found, wanted)
    )
    assert rows == others
    end, other = (torch.load(each.last, weights_only=True)["model"] for each in (found, wanted))
    assert all(torch.equal(end[name], other[name]) for name in other)


@pytest.mark.parametrize("at_end", [False, True])
def test_a_checkpoint_that_earlier_code_saved_before_knn_is_continued_with_that_row(
    at_end: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings({"monitor": {"log_every": 3, "every": 1}}, **({"steps": 4} if at_end else {}))
    report = loop.report_row

    def saved_before(training: Training, run: Run, *rest: Any, evaluates: bool) -> None:
        if evaluates:
            checkpoint.save(run.last, training.state() | {"unlogged": True})
            raise Killed
        report(training, run, *rest, evaluates=evaluates)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "report_row", saved_before)
        with pytest.raises(Killed):
            moco.pretrain(config, out=tmp_path / "run", data=IMAGES)
    found = moco.pretrain(config, resume=tmp_path / "run", data=IMAGES)
    wanted = moco.pretrain(config, out=tmp_path / "undisturbed", data=IMAGES)
    timed = ("images_per_second", "data_wait", "train_seconds", "cpu_seconds")
    rows, others = (
        [{n: v for n, v in row.items() if n not in timed} for row in each.metrics] for each in (found, wanted)
    )
    assert rows == others and "trained encoder" in found.results
    assert "unlogged" not in torch.load(found.last, weights_only=True)


@pytest.mark.parametrize("told", [False, True])
def test_a_finished_run_made_longer_and_killed_at_its_last_knn_takes_it_again(
    told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, look = tmp_path / "run", Monitor.knn_and_health
    moco.pretrain(settings(steps=2), out=run, data=IMAGES)

    def stopped(monitor: Monitor) -> dict[str, float]:
        if not told:
            raise Killed
        signal.raise_signal(signal.SIGTERM)
        return look(monitor)

    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "knn_and_health", lambda monitor: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            moco.pretrain(settings(steps=4), resume=run, data=IMAGES)
        patched.setattr(Monitor, "knn_and_health", stopped)
        with pytest.raises(Stopped if told else Killed):  # and once more, when only that is left to do
            moco.pretrain(settings(steps=4), resume=run, data=IMAGES)
    (run / "results.json").write_text((run / "results.json").read_text().replace("trained encoder", "of two steps"))
    found = moco.pretrain(settings(steps=4), resume=run, data=IMAGES)
    assert [row["step"] for row in found.metrics] == [1, 2, 3, 4] and "trained encoder" in found.results


def test_stopped_at_the_last_knn_or_while_it_concludes_a_run_goes_on_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, run = Monitor.knn_and_health, tmp_path / "run"

    def told(monitor: Monitor) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return look(monitor)

    def full(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "knn_and_health", told)
        with pytest.raises(Stopped):
            moco.pretrain(settings(steps=3), out=run, data=IMAGES)
    with monkeypatch.context() as patched:
        patched.setattr(importlib.import_module("moco.training.pretrain"), "draw_results", full)
        with pytest.raises(OSError, match="no space left"):
            moco.pretrain(settings(steps=3), resume=run, data=IMAGES)
    found = moco.pretrain(settings(steps=3), resume=run, data=IMAGES)
    assert "trained encoder" in found.results and [row["step"] for row in found.metrics] == [1, 2, 3]


@pytest.mark.parametrize("when", ["images are loaded", "it is measured", "it concludes"])
def test_a_job_told_that_its_time_is_over_is_queued_again_when_it_does_not_train(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def told(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGUSR1)

    def loads(*_: Any) -> Splits:
        told()
        return Splits(as_images(IMAGES), None)

    module = importlib.import_module("moco.training.pretrain")
    name = {"images are loaded": "_images", "it is measured": "draw_start", "it concludes": "draw_results"}[when]
    monkeypatch.setattr(module, name, loads if name == "_images" else told)
    run = moco.pretrain(settings(steps=1), out=tmp_path / "run", data=IMAGES)  # SLURM would end it here
    assert (tmp_path / "told").read_text() == "requeue 7\n" and "trained encoder" in run.results


def test_the_key_encoder_follows_by_one_momentum_step(tmp_path: Path) -> None:
    start = state_after(tmp_path / "start", 1, {"optim": {"base_lr": 0.0}})["model"]
    after = state_after(tmp_path / "after", 1, {"model": {"momentum": 0.75}})["model"]
    for name, value in after.items():
        if name.startswith("key_encoder"):
            query = name.replace("key_encoder", "query_encoder")
            assert not torch.equal(after[query], start[query])
            torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * after[query], rtol=0, atol=1e-15)


def test_a_clipped_gradient_moves_the_weights_so_far(tmp_path: Path) -> None:
    start = state_after(tmp_path / "start", 1, {"optim": {"base_lr": 0.0}})["model"]
    for accumulate in (1, 2):
        clipped = {"base_lr": 2.0, "weight_decay": 0.0, "momentum": 0.0, "clip_norm": 1e-3, "accumulate": accumulate}
        after = state_after(tmp_path / f"{accumulate}", 1, {"optim": clipped})["model"]
        moved = [(after[name] - start[name]).square().sum() for name in start if name.startswith("query_encoder")]
        lr = 2.0 * BATCH / 256
        assert math.sqrt(torch.stack(moved).sum()) == pytest.approx(lr * 1e-3, rel=1e-4)


def test_float64_is_float64_throughout(tmp_path: Path) -> None:
    state = state_after(tmp_path / "run", 3)
    tensors = {name: value for name, value in state["model"].items() if value.is_floating_point()}
    assert {value.dtype for value in tensors.values()} == {torch.float64}
    keys = tensors["queue.keys"]
    assert not torch.equal(keys, keys.float().double())
    assert torch.allclose(keys.norm(dim=1), torch.ones(QUEUE, dtype=torch.float64), atol=1e-14)
    assert moco.load_encoder(tmp_path / "run")(torch.zeros(2, 3, 8, 8)).dtype == torch.float32


def test_steps_end_a_run_early_on_the_schedules_of_the_whole(tmp_path: Path) -> None:
    changed = {"model": {"momentum_schedule": "cosine", "momentum": 0.9}}
    config = settings(changed, steps=5)
    run = moco.pretrain(config, out=tmp_path / "run", data=IMAGES)
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4, 5]
    for row in run.metrics:
        step = int(row["step"])
        # Those that the step itself was taken with: steps count from 0, rows from 1.
        lr = learning_rate(config.optim, step - 1, steps_per_epoch=4, epochs=3, batch_size=BATCH)
        assert row["lr"] == lr > 0
        assert row["key_momentum"] == key_momentum(0.9, "cosine", step, total_steps=12)
    assert run.metrics[-1]["epoch"] == 1.25


def test_the_images_of_an_epoch_are_all_seen_once(tmp_path: Path) -> None:
    changed = {"model": {"queue_size": 64, "mask_own": True}}
    for steps in (4, 8):
        ids = state_after(tmp_path / f"{steps}", steps, changed)["model"]["queue.ids"]
        assert sorted(ids.tolist()) == list(range(64))


@pytest.mark.parametrize(
    ("size", "given", "masked"), [(16, None, True), (16, False, False), (6, None, False), (6, True, True)]
)
def test_own_keys_are_masked_when_the_queue_is_a_large_part_of_the_images(
    size: int, given: bool | None, masked: bool, tmp_path: Path
) -> None:
    changed = {"model": {"queue_size": size, "mask_own": given}}
    ids = state_after(tmp_path / "run", 1, changed, batch_size=4)["model"]["queue.ids"]
    assert bool((ids >= 0).any()) == masked


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_loss_starts_at_chance(symmetric: bool, tmp_path: Path) -> None:
    changed = {"model": {"temperature": 5.0, "symmetric": symmetric}, "optim": {"base_lr": 0.0}}
    config = settings(changed, steps=2)
    rows = moco.pretrain(config, out=tmp_path / "run", data=IMAGES).metrics
    assert rows[0]["loss"] == pytest.approx(loss_range(config.model, BATCH)[0], rel=0.05)
    assert [row["queue_fill"] for row in rows] == ([80, 100] if symmetric else [40, 80])


def test_v3_trains_on_digits_and_is_measured(tmp_path: Path) -> None:
    model = {"variant": "v3", "backbone": "resnet-tiny", "stem": "small", "dim": 16, "hidden_dim": 32, "queue_size": 0}
    changed = {
        "data": {"source": "digits", "channels": 1},
        "views": {"recipe": "digits"},
        "model": model | {"batchnorm": "auto", "temperature": 1.0, "momentum_schedule": "cosine"},
        "optim": {"name": "lars", "base_lr": 0.3, "weight_decay": 1e-6},
        "engine": {"precision": "fp32"},
    }
    seen: list[Any] = []
    config = settings(changed, steps=4, batch_size=64)
    run = moco.pretrain(config, out=tmp_path / "run", on_progress=seen.append)
    assert [progress.step for progress in seen] == [1, 2, 3, 4]
    assert all(progress.total_steps == 4 and progress.epoch == 0 for progress in seen)
    assert seen[-1].metrics["loss"] == run.metrics[-1]["loss"] < loss_range(config.model, 64)[0] * 1.1
    assert "queue_fill" not in run.metrics[-1]
    assert 50 < run.metrics[-1]["knn_top1"] <= 100
    assert run.results.keys() == {"raw pixels", "untrained encoder", "trained encoder"}
    state = torch.load(run.last, weights_only=True)["model"]
    assert not any(name.startswith("queue") for name in state)
    assert any(name.startswith("predictor") for name in state)


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_checkpoint(tmp_path: Path) -> None:
    changed = {"optim": {"base_lr": 1e300}, "monitor": {"save_every": 1e-6, "log_every": 3}}
    with pytest.raises(RuntimeError, match=r"^the loss became NaN or infinite by step 2; lower --optim.base_lr"):
        moco.pretrain(settings(changed), out=tmp_path / "run", data=IMAGES)
    run = Run.open(tmp_path / "run")
    assert run.metrics == []
    kept = torch.load(run.last, weights_only=True)
    assert kept["step"] < 2
    rare = changed | {"monitor": {"save_every": 3600, "log_every": 3}}
    with pytest.raises(RuntimeError, match=r"^the loss is nan at step 3; lower --optim.base_lr"):
        moco.pretrain(settings(rare), out=tmp_path / "rare", data=IMAGES)
    assert torch.load(Run.open(tmp_path / "rare").last, weights_only=True)["step"] == 0


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    first, again, other = (
        state_after(tmp_path / name, 2, seed=seed)["model"]["query_encoder.backbone.linear.weight"]
        for name, seed in (("first", 1), ("again", 1), ("other", -1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_runs_without_a_place_get_free_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [moco.pretrain(settings(steps=1, recipe="mine"), data=IMAGES) for _ in range(2)]
    assert [run.path for run in runs] == [Path("runs/mine"), Path("runs/mine-2")]


def test_what_matters_is_said_before_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="moco"):
        moco.pretrain(settings(steps=1), out=tmp_path / "run", data=IMAGES)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert said[0] == "images: 64; steps per epoch: 4; epochs: 3"
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1 and warned[0].startswith("plain batch norm with a queue")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert all(line in log for line in said + warned)


@pytest.mark.parametrize("kind", ["array", "grey", "pictures", "labelled"])
def test_images_can_be_handed_over(kind: str, tmp_path: Path) -> None:
    from PIL import Image

    given: Any = {
        "array": IMAGES.movedim(1, 3).numpy(),
        "grey": IMAGES[:, 0],
        "pictures": [Image.fromarray(each) for each in IMAGES.movedim(1, 3).numpy()],
        "labelled": [(each, number % 2) for number, each in enumerate(IMAGES)],
    }[kind]
    run = moco.pretrain(settings(steps=1), out=tmp_path / "run", data=given)
    assert ("knn_top1" in run.metrics[-1]) == (kind == "labelled")
    assert run.best.exists() == (kind == "labelled")
