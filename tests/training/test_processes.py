"""Runs of several processes: the same as of one, and they start, stop, fail and go on together."""

import functools
import importlib
import io
import json
import math
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

import moco
from distributed import Pair, Payload
from doubles import leave_out_pictures, official, wait_for_step
from moco.cli import main
from moco.config import DataConfig, EvaluateConfig, PretrainConfig, merge, parse_config
from moco.data import ArrayImages, FileImages, Splits, as_images, epoch_order, load_data
from moco.evaluate import Task
from moco.evaluate.reading import Batches, Held, hold, read
from moco.method import backbones
from moco.method.backbones import build_backbone
from moco.method.encoder import ImageEncoder
from moco.parallel import collectives, signals
from moco.parallel.signals import Stopped
from moco.recipes import load_recipe
from moco.storage import checkpoint, encoder_files
from moco.storage.run import Run
from moco.training.agreement import agree_on_unreadable, check_same_step
from moco.training.monitor import AT_ONCE, in_parts
from moco.training.step import Training
from moco.views.specs import view_specs
from moco.views.two_views import OneView
from small import TINY, SmallBackbone

two_processes = pytest.mark.dist
ROOT = Path(__file__).parents[2]
AROUND = importlib.import_module("moco.training.pretrain")  # here, so that two processes need not each import it
BATCH, DIM, QUEUE, STEPS = 32, 8, 96, 12
IMAGES = [
    (image, number % 4)
    for number, image in enumerate(
        torch.randint(0, 256, (160, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    )
]
EXACT: dict[str, Any] = {
    "epochs": 3,
    "batch_size": BATCH,
    "views": {"recipe": "cifar", "size": 8},
    "model": {"backbone": "small", "dim": DIM, "queue_size": QUEUE, "momentum": 0.9},
    "monitor": {"knn_k": 20, "log_every": 4, "every": 0, "save_every": 3600},
    "engine": {"accelerator": "cpu", "precision": "fp64", "threads": 1},
}
V3 = {"variant": "v3", "queue_size": 0, "hidden_dim": 16, "temperature": 1.0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Generator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"), __name__)
    yield pair
    pair.close()


def last_row(run: Path) -> int:
    """The step of the last row of metrics.csv."""
    return int(Run.open(run).metrics[-1]["step"])


def settings(**sections: Any) -> PretrainConfig:
    return merge(parse_config(EXACT), sections)


class Bare(nn.Module):
    """A backbone without batch norm."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, self.num_features)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1)).relu()


def train(
    folder: str,
    sections: dict[str, Any],
    resume: str | None = None,
    count: bool = False,
    images: Any = None,
) -> dict[str, Any]:
    """A run without pictures, and what there is of it in memory at its end."""
    kept, sizes = {}, []
    os.environ |= {"LOCAL_RANK": str(collectives.rank()), "NODE_RANK": "0"} if collectives.world_size() > 1 else {}
    with pytest.MonkeyPatch.context() as patched:
        leave_out_pictures(patched)
        patched.setitem(backbones.BACKBONES, "small", lambda in_channels: SmallBackbone())
        patched.setitem(backbones.BACKBONES, "bare", lambda in_channels: Bare())
        prepare, step, loop, between = AROUND.prepare, Training.step, AROUND.train, Payload()

        def prepared(*arguments: Any, **named: Any) -> Training:
            kept["training"] = prepare(*arguments, **named)
            return kept["training"]

        def counted(training: Training, *arguments: Any) -> None:
            before = len(between.calls)
            step(training, *arguments)
            sizes.append((before, len(between.calls)))

        def whole(*arguments: Any) -> None:
            with between:
                loop(*arguments)

        patched.setattr(AROUND, "prepare", prepared)
        if count:
            patched.setattr(Training, "step", counted)
            patched.setattr(AROUND, "train", whole)
            patched.setattr(signals, "SLOW_STEP", math.inf)  # however busy this machine is
        config = settings(**sections, engine={"devices": collectives.world_size()})
        run = moco.pretrain(config, data=IMAGES if images is None else images, out=folder, resume=resume)
    training = kept["training"]
    queue = training.core.queue
    return {
        "state": training.core.state_dict(),
        "queue": queue.keys if queue is not None else None,
        "rows": run.metrics,
        "results": run.results,
        "steps": [between.calls[start:stop] for start, stop in sizes],
        "between": [between.calls[stop:start] for (_, stop), (start, _) in zip(sizes, sizes[1:], strict=False)],
        "mask_own": training.mask_own,
        "trained": sum(p.requires_grad for p in training.core.parameters()),
        "norms": [
            (name, module.num_features)
            for name, module in training.core.named_modules()
            if type(module).__name__ == "SyncBatchNorm"
        ],
        "log": (run.path / "log.txt").read_text(),
    }


def assert_same_weights(one: dict[str, Any], other: dict[str, Any], within: float = 1e-10) -> None:
    assert one["state"].keys() == other["state"].keys()
    for name, value in one["state"].items():
        if not name.endswith("num_batches_tracked"):  # counted by torch's batch norm alone
            torch.testing.assert_close(value, other["state"][name], rtol=0, atol=within, msg=name)


@functools.cache
def worked_out_payload() -> dict[str, Any]:
    """What docs/many.md's tables are worked out with."""
    return runpy.run_path(str(ROOT / "benchmarks" / "collectives.py"))


def assert_handed_over(found: dict[str, Any], sections: dict[str, Any]) -> None:
    """At every step the bytes that benchmarks/collectives.py works out, each kind in as many messages as it must."""
    config = merge(settings(**sections), {"model": {"mask_own": found["mask_own"]}})
    of, parts = worked_out_payload()["payload"](config, BATCH // 2, backbone=SmallBackbone()), config.optim.accumulate
    v3 = config.model.variant == "v3"
    directions = 2 if v3 or config.model.symmetric else 1
    assert found["mask_own"] == (not v3)  # of v1 and v2, whose keys they are travels as well
    forward = directions * parts * len(found["norms"])
    back = directions * parts * sum(not name.startswith("key_encoder") for name, _ in found["norms"])
    assert of.messages == forward + back and bool(forward) == v3
    expected = {
        "allreduce_": (back + 1, of.gradients + of.sums),  # gradients all in one bucket
        "_allgather_base_": (forward + parts * (directions if v3 else directions + 1), of.keys + of.means),
        "alltoall_base_": (0 if v3 else parts * directions, of.images),
    }
    for number, step in enumerate(found["steps"]):
        sizes: dict[str, list[int]] = {kind: [] for kind in expected}
        for kind, size in step:
            sizes.setdefault(kind, []).append(size)
        # DDP settles its buckets once: 4 bytes for each trained tensor, for their number and for the size of the one.
        settled = sum(sizes.pop("broadcast_", []))
        assert settled <= (4 * (found["trained"] + 2) if number < 2 else 0)
        assert {kind: (len(each), sum(each)) for kind, each in sizes.items()} == expected


V1, SPLIT = {"variant": "v1"}, {"batchnorm": "split", "bn_splits": 2}
WAYS = {
    "v1, images exchanged": ({"steps": STEPS, "model": V1}, {"model": V1 | SPLIT}),
    "v2, images exchanged": ({"steps": STEPS}, {"model": SPLIT}),
    "v3, statistics of the whole batch": ({"steps": STEPS, "model": V3, "optim": {"name": "lars"}}, {}),
}


@two_processes
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one_and_hand_over_no_more_than_they_must(way: str, pair: Pair, tmp_path: Path) -> None:
    sections, of_one = WAYS[way]
    first, second = pair(train, str(tmp_path / "two"), sections, None, True)
    one = train(str(tmp_path / "one"), sections | of_one)
    for each in (first, second):
        assert_same_weights(each, one)
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    for row, alone in zip(first["rows"], one["rows"], strict=True):
        for name in ("loss", "positive", "pretext_accuracy", "lr", "key_momentum"):
            assert row[name] == pytest.approx(alone[name], abs=1e-10), name
    assert first["results"] == one["results"] and len(one["results"]) == 3
    for each in (first, second):
        assert_handed_over(each, sections)
        # Between steps: five sums for each row of metrics.csv; two words at first, every ten steps, at an epoch's end.
        row, word = ("allreduce_", 5 * 8), ("allreduce_", 2 * 8)
        between = {1: [word], 4: [row], 5: [word], 8: [row], 10: [word]}
        assert each["between"] == [between.get(step, []) for step in range(1, STEPS)]


COLUMNS = {
    "v2, ResNet-50, n = 32": ("imagenet-v2", 32),
    "v3, ViT-S, n = 64": ("imagenet-v3-vit-s", 64),
    "v3, ResNet-50, n = 64": ("imagenet-v3-r50-300", 64),
}


def test_the_numbers_of_the_page_on_many_processes_are_those_worked_out() -> None:
    many, worked_out = (ROOT / "docs" / "many.md").read_text(), worked_out_payload()
    loads = {column: worked_out["payload"](load_recipe(recipe), n) for column, (recipe, n) in COLUMNS.items()}
    heading, _, *rows = many.split("in fp32:\n\n")[1].split("\n\n")[0].splitlines()
    assert heading == f"| what | bytes | {' | '.join(COLUMNS)} |"
    cells = [row.strip("| ").split(" | ")[2:] for row in rows]
    assert cells == [list(row) for row in zip(*map(worked_out["in_words"], loads.values()), strict=True)]
    v2, vit, resnet = loads.values()
    for ranks in (8, 64, 512):
        shares = [
            worked_out["efficiency"](v2, ranks, alone=seconds, gathered=gathered)
            for gathered in (True, False)
            for seconds in (0.19, 0.02)
        ]
        assert f"\n| {ranks}{' GPUs' if ranks == 8 else ''} | {' | '.join(shares)} |\n" in many
    for load, alone, where in ((vit, 0.04, "ViT-S"), (resnet, 0.19, "ResNet-50")):
        shares = [worked_out["efficiency"](load, n, alone=alone, gathered=True).strip(" %") for n in (8, 64, 512)]
        said = f"{shares[0]}, {shares[1]} and {shares[2]} % as {where} at t = {alone} s"
        assert said in " ".join(many.split())


BOTH, PARTS = {"symmetric": True, "queue_size": 128}, {"accumulate": 2}
MORE = {
    "v1, symmetric": {"model": V1 | BOTH},
    "v2, symmetric": {"model": BOTH},
    "v2, in parts": {"optim": PARTS},
    "v3, in parts": {"model": V3, "optim": PARTS | {"name": "lars"}},
}


@two_processes
@pytest.mark.parametrize("way", MORE)
def test_two_directions_or_parts_hand_over_no_more_than_they_must(way: str, pair: Pair, tmp_path: Path) -> None:
    sections = MORE[way] | {"steps": 3}
    for each in pair(train, str(tmp_path / "run"), sections, None, True):
        assert len(each["steps"]) == 3
        assert_handed_over(each, sections)


@two_processes
def test_a_run_goes_on_on_one_process_and_on_two_again(pair: Pair, tmp_path: Path) -> None:
    folder = str(tmp_path / "elastic")
    for model, groups in (({}, 2), (V3, 0)):
        whole = pair(train, f"{folder}-whole-{groups}", {"steps": 11, "model": model})
        run = f"{folder}-{groups}"
        pair(train, run, {"steps": 3, "model": model})
        alone = train(run, {"steps": 7, "model": model}, run)
        first, second = pair(train, run, {"steps": 11, "model": model}, run)
        for each in (first, second):
            assert_same_weights(each, whole[0])
            assert "started on 1 process, now 2: batch, image order" in each["log"]
        kept = f"keeps its {groups} groups" if groups else "still covers the whole batch"
        assert "started on 2 processes, now 1: batch, image order, views, learning rate, weights" in alone["log"]
        assert f"batch norm {kept}: exact up to the rounding of sums" in alone["log"]
        losses = [[row["loss"] for row in each["rows"]] for each in (first, whole[0])]
        # A resumed run writes a row at the step it had to stop at, as every run does at its end.
        assert losses[0][-1] == pytest.approx(losses[1][-1], abs=1e-10)


@pytest.fixture
def four(tmp_path_factory: pytest.TempPathFactory) -> Generator[Pair]:
    four = Pair(tmp_path_factory.mktemp("four"), __name__, 4)
    yield four
    four.close()


@two_processes
@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, V3], ids=["v2", "v3"])
def test_a_run_begun_on_two_processes_goes_on_on_four_and_on_two_again(
    model: dict[str, Any], pair: Pair, four: Pair, tmp_path: Path
) -> None:
    run, other = str(tmp_path / "run"), str(tmp_path / "other")
    upto = {steps: {"steps": steps, "model": model} for steps in (3, 7, 11)}
    for folder in (run, other):
        pair(train, folder, upto[3])
    on_four = four(train, run, upto[7], run)
    on_two = pair(train, run, upto[11], run)
    # v3 is the same on any number. v2 has four groups from where it was on four, and keeps them.
    expected = four(train, other, upto[11], other)[0]
    for each in on_two:
        assert_same_weights(each, expected)
    if model is V3:
        assert_same_weights(on_two[0], pair(train, str(tmp_path / "whole"), upto[11])[0])
        changed = kept = "batch norm still covers the whole batch: exact"
    else:
        changed = "but batch norm now covers groups of 8 images instead of 16"
        kept = "batch norm keeps its 4 groups: exact"
    same = "batch, image order, views, learning rate, weights, optimizer and queue continue unchanged"
    assert all(f"started on 2 processes, now 4: {same}; {changed}" in each["log"] for each in on_four)
    assert all(f"started on 4 processes, now 2: {same}; {kept}" in each["log"] for each in on_two)


@two_processes
def test_on_as_many_processes_a_resumed_run_has_the_same_bits(pair: Pair, tmp_path: Path) -> None:
    whole, run = str(tmp_path / "whole"), str(tmp_path / "run")
    left_alone = pair(train, whole, {"steps": 8})[0]
    pair(train, run, {"steps": 3})
    for each in pair(train, run, {"steps": 8}, run):
        for name, value in each["state"].items():
            if "running" in name:  # averaged where it was saved, and so rounded once more
                torch.testing.assert_close(value, left_alone["state"][name], rtol=1e-12, atol=0)
            else:
                assert torch.equal(value, left_alone["state"][name]), name


@two_processes
def test_more_groups_than_processes_are_kept_and_fewer_are_owned_up_to(pair: Pair, tmp_path: Path) -> None:
    four = {"model": {"bn_splits": 4}}
    whole = train(str(tmp_path / "whole"), four | {"steps": 6})
    run = str(tmp_path / "run")
    train(run, four | {"steps": 3})
    for each in pair(train, run, four | {"steps": 6}, run):
        assert_same_weights(each, whole)
    three = {"model": {"bn_splits": 3}}
    train(str(tmp_path / "three"), three | {"steps": 1})
    first, _ = pair(train, str(tmp_path / "three"), three | {"steps": 2}, str(tmp_path / "three"))
    assert "but batch norm now covers groups of 16 images instead of 10" in first["log"]


def refused(folder: str, sections: dict[str, Any], numbers: list[int]) -> str:
    """What is said to a rank that has so many of the images."""
    try:
        train(folder, sections, None, False, IMAGES[: numbers[collectives.rank()]])
    except ValueError as error:
        return str(error)
    return "nothing"


def one_other_picture(folder: str) -> str:
    """The second rank has as many images, one of them inverted."""
    images = list(IMAGES)
    if collectives.rank() == 1:
        images[77] = (255 - images[77][0], images[77][1])
    with pytest.raises(ValueError) as caught:
        train(folder, {}, None, False, images)
    return str(caught.value)


def different_settings(folder: str) -> str:
    return refused(folder, {"seed": collectives.rank(), "steps": 1}, [160, 160])


@two_processes
def test_what_two_processes_cannot_share_is_said_by_both(pair: Pair, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for line in pair(refused, str(folder), {}, [160, 150]):
        assert line.startswith("process 1 has different images from process 0 (150 of sha256 ")
        assert line.endswith("; give every process the same images")
    for line in pair(one_other_picture, str(folder)):
        ours, theirs = re.findall(r"160 of sha256 (\w{8})", line)
        assert line.startswith("process 1 has different images from process 0 (160 of ") and ours != theirs
    for line in pair(different_settings, str(folder)):
        assert line.startswith("process 1 has different settings from process 0 (sha256 ")
    small = {"batch_size": 2, "model": {"queue_size": 8}}
    for line in pair(refused, str(folder), small, [1, 1]):
        assert line == "1 images for 2 processes; start at most as many processes as images"
    for line in pair(refused, str(folder), small, [160, 160]):
        assert line.startswith("batch_size 2 gives each of 2 processes one image, but batch norm needs at least 2")
    assert not folder.exists()


def fails_to_show(folder: str, step: int) -> str:
    """The first rank cannot report a step, and another one the weights to start from."""

    def show(progress: Any) -> None:
        if progress.step == step:
            raise KeyError("no such bar")

    build = importlib.import_module("moco.training.build").build_model

    def built(*arguments: Any, **named: Any) -> Any:
        if collectives.rank() == 1 and step == 0:
            raise RuntimeError("no such weights")
        return build(*arguments, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("moco.training.build.build_model", built)
        leave_out_pictures(patched)
        patched.setitem(backbones.BACKBONES, "small", lambda in_channels: SmallBackbone())
        config = settings(steps=12, monitor={"log_every": 1}, engine={"devices": 2})
        try:
            moco.pretrain(config, data=IMAGES, out=folder, on_progress=show)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


@two_processes
@pytest.mark.parametrize(
    ("step", "first", "second"),
    [
        (0, "ValueError: process 1 stopped: no such weights", "RuntimeError: no such weights"),
        (2, "KeyError: 'no such bar'", "ValueError: process 0 stopped: 'no such bar'"),
        (12, "KeyError: 'no such bar'", "ValueError: process 0 stopped: 'no such bar'"),
    ],
)
def test_what_fails_on_one_process_alone_stops_both(
    step: int, first: str, second: str, pair: Pair, tmp_path: Path
) -> None:
    assert pair(fails_to_show, str(tmp_path / "run"), step) == [first, second]
    assert (tmp_path / "run").exists() == (step > 0)


def from_a_file(folder: str, file: str) -> dict[str, Any]:
    return train(folder, {"steps": 7, "model": {"mask_own": False}}, file)


def told_on_one(folder: str) -> str:
    """The second rank gets SIGTERM in its third step."""
    step = Training.step

    def signalled(training: Training, *arguments: Any) -> None:
        if collectives.rank() == 1 and training.done == 2:
            signal.raise_signal(signal.SIGTERM)
        step(training, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Training, "step", signalled)
        patched.setattr(signals, "SLOW_STEP", math.inf)
        patched.setattr(signals, "PARTING", 0.1)  # who started these two does not leave
        try:
            train(folder, {})
        except Stopped as stopped:
            return f"{stopped}, step {checkpoint.load(Run.open(folder).last)['step']}"
    return "nothing"


@two_processes
def test_sigterm_to_one_of_two_saves_and_stops_both(pair: Pair, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pair(told_on_one, str(run)) == [f"stopped by SIGTERM; {run} is saved, step 5"] * 2


@two_processes
def test_two_processes_go_on_from_a_file_of_the_official_code_as_one_does(pair: Pair, tmp_path: Path) -> None:
    train(str(tmp_path / "start"), {"steps": 5, "model": {"mask_own": False, "bn_splits": 2}})
    file = tmp_path / "checkpoint_0000.pth.tar"
    torch.save(official(Run.open(tmp_path / "start"), epoch=1), file)
    one = train(str(tmp_path / "one"), {"steps": 7, "model": {"mask_own": False, "bn_splits": 2}}, str(file))
    for each in pair(from_a_file, str(tmp_path / "two"), str(file)):
        assert_same_weights(each, one)


@two_processes
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_step_in_parts_on_two_processes_is_the_whole_step_on_one(symmetric: bool, pair: Pair, tmp_path: Path) -> None:
    # Without batch norm, which would see other images together.
    plain = {"steps": 4, "model": {"backbone": "bare", "batchnorm": "plain", "symmetric": symmetric}}
    one = train(str(tmp_path / "one"), plain)
    for each in pair(train, str(tmp_path / "two"), plain | {"optim": {"accumulate": 2}}):
        assert_same_weights(each, one)
        assert torch.equal(each["state"]["queue.ids"], one["state"]["queue.ids"])


def features_of(number: int) -> dict[str, Tensor]:
    """Of random images, of which each rank looks at a share."""
    images = ArrayImages(
        torch.randint(0, 256, (number, 3, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8),
        None,
        None,
        tuple(map(str, range(number))),
    )
    weight = torch.randn(48, 7, generator=torch.Generator().manual_seed(2))
    seen: list[int] = []

    def work(part: Any) -> Tensor:
        seen.append(len(part))
        return torch.cat([batch.flatten(1).float() @ weight for batch in part.images.split(AT_ONCE)])

    return {"features": in_parts(images, work, 7, torch.device("cpu")), "seen": torch.tensor(sum(seen))}


@two_processes
@pytest.mark.parametrize("number", [1, AT_ONCE + 1, 3 * AT_ONCE - 5])
def test_features_are_the_same_bits_on_any_number_of_processes(number: int, pair: Pair) -> None:
    alone = features_of(number)["features"]
    answers = pair(features_of, number)
    for each in answers:
        assert torch.equal(each["features"], alone)
    assert sum(int(each["seen"]) for each in answers) == number
    assert number == 1 or all(each["seen"] for each in answers)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files, two of them cut off behind their headers."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(90):
        content = io.BytesIO()
        pixels = torch.randint(0, 256, (20, 24, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(content, "png")
        cut = len(content.getvalue()) // 2 if number in (7, 40) else None
        (folder / f"{number:02}.png").write_bytes(content.getvalue()[:cut])
    return folder


@two_processes
def test_two_processes_see_the_files_that_one_sees_and_replace_the_same(
    photos: Path, pair: Pair, tmp_path: Path
) -> None:
    files = {"steps": 5, "data": {"memory": 1e-9, "workers": 1, "max_bad": 0.1}}
    alone = files | {"model": {"batchnorm": "split", "bn_splits": 2}}
    one = train(str(tmp_path / "one"), alone, images=str(photos))
    both = pair(train, str(tmp_path / "both"), files, None, False, str(photos))
    for other in both:
        assert_same_weights(one, other)
    assert torch.equal(both[0]["queue"], both[1]["queue"])
    # In the middle of the second epoch, with other workers.
    half = files | {"steps": 3}
    pair(train, str(tmp_path / "half"), half, None, False, str(photos))
    changed = files | {"data": files["data"] | {"workers": 2}}
    for other in pair(train, str(tmp_path / "half"), changed, str(tmp_path / "half"), False, str(photos)):
        assert_same_weights(both[0], other)
        assert torch.equal(both[0]["queue"], other["queue"])
        for name, value in both[0]["state"].items():
            assert "running" in name or torch.equal(value, other["state"][name]), name


def begin(done: int, anew: bool) -> str:
    try:
        check_same_step(done + collectives.rank(), fresh=anew)
    except ValueError as error:
        return str(error)
    return ""


@two_processes
def test_processes_that_read_other_checkpoints_say_so(pair: Pair) -> None:
    assert pair(begin, 5, True) == ["", ""]
    for line in pair(begin, 5, False):
        assert line.startswith("process 1 resumes at step 6, process 0 resumes at step 5; --out and --resume must")


def test_a_run_that_goes_on_with_other_images_says_so(tmp_path: Path) -> None:
    train(str(tmp_path / "run"), {"steps": 2})
    found = train(str(tmp_path / "run"), {"steps": 4}, resume=str(tmp_path / "run"), images=IMAGES[1:])
    assert "the images differ from those of the saved run (160 then, 159 now, or another order)" in found["log"]
    train(str(tmp_path / "same"), {"steps": 2})
    assert "the images differ" not in train(str(tmp_path / "same"), {"steps": 4}, resume=str(tmp_path / "same"))["log"]


def measured(folder: str, protocol: str) -> dict[str, float]:
    name, _, form = protocol.partition(" ")
    settings: dict[str, Any] = {"accelerator": "cpu", "precision": "fp32"}
    if form:  # its batches are the processes' shares, and in fp64 their numbers too
        settings |= {"form": form, "epochs": 2, "lr": 0.5, "precision": "fp64"}
    return dict(moco.evaluate(folder, name, settings=settings).figures)


@two_processes
@pytest.mark.parametrize("protocol", ["knn", "linear", "linear official"])
def test_two_processes_find_what_one_finds_and_the_first_writes_it(protocol: str, pair: Pair, tmp_path: Path) -> None:
    for name in ("alone", "both"):
        run = Run.create(tmp_path / name, parse_config(TINY))
        torch.manual_seed(0)
        backbone, about = build_backbone("resnet-tiny", stem="small", channels=1), {"name": "resnet-tiny"}
        encoder = ImageEncoder(backbone, stem="small", channels=1, mean=(0.5,), std=(0.5,), input_size=8, **about)
        encoder_files.save_encoder(run.path, encoder)
    alone = measured(str(tmp_path / "alone"), protocol)
    assert pair(measured, str(tmp_path / "both"), protocol) == [alone] * 2
    written = [each.read_text() for each in sorted(tmp_path.glob("*/evaluations/*.json"))]
    assert len(written) == 2 and written[0] == written[1] and '"top1"' in written[0]


def seen(kind: str, folder: str, size: int) -> list[tuple[Tensor, Tensor]]:
    """Ids of whole batches, and of each image in them a number that tells its view."""
    data = DataConfig(source=folder, memory={"held": 1.0}.get(kind, 1e-9), workers=2, max_bad=0.1)
    pixels = torch.randint(0, 256, (75, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = as_images(pixels) if kind == "array" else load_data(data).train
    encoder = cast(ImageEncoder, nn.Linear(1, 1))  # says on which device
    task = Task(encoder, None, Splits(images, None), EvaluateConfig(seed=3), lambda *_: None, data=data)
    spec = view_specs(parse_config({"views": {"recipe": "cifar", "size": 8}}).views)[0]
    batches = Batches(task, hold(task, images), OneView(spec, 8, 3), size, whole=True, share=True)
    found = []
    for epoch in range(2):
        for batch in batches(epoch):
            assert batch.shared == (collectives.world_size() > 1 and len(batch.ids) == size // 2)
            rows, ids = batch.whole(batch.views.double().sum((2, 3)))
            found.append((ids, rows))
    assert kind == "array" or batches.notes[0].startswith("1 of 75 training images could not be read")
    return found


def refuses(folder: str) -> str:
    """Each process can read all but one, in its share."""
    try:
        data = DataConfig(source=folder, memory=1e-9, workers=0, max_bad=0.02)
        images = FileImages(tuple(map(str, sorted(Path(folder).glob("*.png")))), None, None)
        task = Task(cast(ImageEncoder, nn.Linear(1, 1)), None, Splits(images, None), EvaluateConfig(), print, data=data)
        spec = view_specs(parse_config({"views": {"recipe": "cifar", "size": 8}}).views)[0]
        for batch in Batches(task, Held(images), OneView(spec, 8, 3), 16, whole=False, share=True)(0):
            batch.whole(batch.views.double().sum((2, 3)))
    except ValueError as error:
        return str(error)
    return "nothing"


@two_processes
def test_too_many_bad_files_of_both_stop_an_evaluation(pair: Pair, tmp_path: Path) -> None:
    order = epoch_order(64, seed=0, epoch=0).tolist()
    for number in range(64):
        Image.new("RGB", (9, 8), (number, 7, 90)).save(tmp_path / f"{number:02}.png")
    for place in (4, 9):  # one of each process's share
        (tmp_path / f"{order[place]:02}.png").write_bytes(b"")
    for line in pair(refuses, str(tmp_path)):
        assert line.startswith(
            "2 of 64 training images cannot be read, expected at most 2.00% in an evaluation: repair"
        )


def makes_all(size: int) -> list[int]:
    pixels = as_images(torch.zeros(20, 3, 8, 8, dtype=torch.uint8))
    task = Task(cast(ImageEncoder, nn.Linear(1, 1)), None, Splits(pixels, None), EvaluateConfig(), print)
    view = OneView(view_specs(parse_config({"views": {"recipe": "cifar", "size": 8}}).views)[0], 8)
    return [len(batch.ids) for batch in Batches(task, Held(pixels), view, size, whole=True, share=True)(0)]


@two_processes
def test_a_batch_that_two_processes_cannot_share_is_made_by_both(pair: Pair) -> None:
    assert pair(makes_all, 8) == [[4, 4, 4]] * 2
    assert pair(makes_all, 7) == [[7, 7, 6]] * 2


@two_processes
@pytest.mark.parametrize("kind", ["array", "held", "files"])
def test_two_processes_share_the_batches_of_one(kind: str, pair: Pair, tmp_path: Path) -> None:
    for number in range(75):
        noise = torch.randint(0, 256, (80, 90, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / f"{number:02}.png")
    broken = (tmp_path / "40.png").read_bytes()
    (tmp_path / "40.png").write_bytes(broken[: len(broken) // 2])
    alone = seen(kind, str(tmp_path), 16)
    assert [len(ids) for ids, _ in alone] == [16, 16, 16, 16, 75 - 64 - (kind == "held")] * 2
    for each in pair(seen, kind, str(tmp_path), 16):
        for (ids, rows), (wanted, views) in zip(each, alone, strict=True):
            assert torch.equal(ids, wanted) and torch.equal(rows, views)


def read_some(paths: list[str], max_bad: float) -> dict[str, Any]:
    backbone = SmallBackbone()
    with torch.no_grad():
        for number, parameter in enumerate(backbone.parameters(), start=1):
            parameter.copy_(torch.linspace(-1, number / 5, parameter.numel()).view_as(parameter))
    half = (0.5, 0.5, 0.5)
    encoder = ImageEncoder(backbone, name="", stem="imagenet", channels=3, mean=half, std=half, input_size=8).eval()
    images = FileImages(tuple(paths), torch.arange(len(paths)), tuple(map(str, range(len(paths)))))
    settings, data = EvaluateConfig(precision="fp32"), DataConfig(max_bad=max_bad)
    task = Task(encoder, None, Splits(images, None), settings, lambda *said: None, data=data)
    try:
        found = read(task, images, "training")
    except ValueError as error:
        return {"error": str(error)}
    return {"vectors": found.vectors, "labels": found.images.labels, "notes": list(found.notes)}


@two_processes
def test_what_no_process_can_read_is_left_out_on_all(pair: Pair, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(300)]
    for number, path in enumerate(paths):
        Image.new("RGB", (9, 8), (number % 256, number % 7, 90)).save(path)
    for number in (3, 290):  # in the share of each
        Path(paths[number]).write_bytes(b"")
    alone = read_some(paths, 0.01)
    assert len(alone["vectors"]) == 298 and alone["vectors"].std() > 0
    for each in pair(read_some, paths, 0.01):
        assert torch.equal(each["vectors"], alone["vectors"]) and torch.equal(each["labels"], alone["labels"])
        assert each["notes"] == alone["notes"]
    for each in pair(read_some, paths, 0.001):
        assert each["error"].startswith("2 of 300 training images cannot be read")


def bad_on_one(max_bad: float) -> str:
    """Each rank meets bad files of its own."""

    names, known = [["a.jpg", "b.jpg"], ["b.jpg", "c.jpg", "d.jpg"]][collectives.rank()], set[str]()
    try:
        agree_on_unreadable(names, known, num_images=100, max_bad=max_bad)
    except ValueError as error:
        return str(error)
    return " ".join(sorted(known))


@two_processes
def test_bad_files_of_all_processes_count_together(pair: Pair) -> None:
    assert pair(bad_on_one, 0.04) == ["a.jpg b.jpg c.jpg d.jpg"] * 2
    for line in pair(bad_on_one, 0.03):
        assert line.startswith("4 of 100 files could not be read so far, expected at most 3.00%; remove them or raise")


def bad_with_odd_names() -> list[str]:
    known = set[str]()
    agree_on_unreadable(["one\nfile.jpg", "\udcff.jpg"][collectives.rank() :][:1], known, num_images=100, max_bad=0.02)
    return sorted(known)


@two_processes
def test_a_bad_file_counts_once_whatever_its_name(pair: Pair) -> None:
    assert pair(bad_with_odd_names) == [["one\nfile.jpg", "\udcff.jpg"]] * 2


# Real processes


def torchrun(folder: Path, *arguments: str | Path) -> subprocess.Popen[bytes]:
    """Two processes; what each says goes into files of `folder`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--log-dir", str(folder)]
    command += ["--redirects", "3", "--standalone", "-m", "moco.cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": str(folder / "error.json")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def rank_of(agent: subprocess.Popen[bytes], rank: int) -> int:
    """The process of a rank."""
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun has no process of rank {rank}")


def said(folder: Path, rank: int, stream: str = "stderr") -> str:
    """What a process of the last start said."""
    return max(folder.rglob(f"{rank}/{stream}.log"), key=lambda path: path.stat().st_mtime).read_text()


@two_processes
@pytest.mark.slow
def test_one_that_is_told_to_stop_stops_both_either_that_dies_ends_both_and_one_process_goes_on(
    tmp_path: Path,
) -> None:
    recipe, run, logs = tmp_path / "tiny.yaml", tmp_path / "run", tmp_path / "logs"
    recipe.write_text(yaml.safe_dump(TINY | {"epochs": 400, "monitor": {"every": 0, "knn_k": 20, "save_every": 1}}))
    line = ("pretrain", recipe, "--out", run, "--resume", run)  # the same for every start
    agent = torchrun(logs, *line)
    wait_for_step(run, 10)
    os.kill(rank_of(agent, 1), signal.SIGTERM)
    assert agent.wait(60) != 0
    step = checkpoint.load(run / "checkpoints" / "last.ckpt")["step"]
    assert step >= 10 and step % 5 == 0
    assert (
        said(logs, 0).strip().endswith(f"moco: stopped by SIGTERM; saved; continue with: moco pretrain --resume {run}")
    )
    assert said(logs, 1) == said(logs, 1, "stdout") == ""

    for dies, left in ((1, 0), (0, 1)):
        step = checkpoint.load(run / "checkpoints" / "last.ckpt")["step"]
        written = last_row(run)
        agent = torchrun(logs, *line)
        wait_for_step(run, written + 20)
        began = time.monotonic()
        os.kill(rank_of(agent, dies), signal.SIGKILL)
        assert agent.wait(60) != 0
        assert time.monotonic() - began < 60
        assert f"continued at step {step} of" in said(logs, 0)
        # torch ends the threads that it still has as it likes, and says so.
        lines = said(logs, left).replace("terminate called without an active exception", "").strip().splitlines()
        assert lines[-1].startswith(
            "moco: another process of the run died or stopped responding (see its own message); resume from the last "
            f"checkpoint with moco pretrain --resume {run}"
        )
        assert left == 0 or len(lines) == 1

    step = checkpoint.load(run / "checkpoints" / "last.ckpt")["step"]
    assert main(["pretrain", "--resume", str(run), "--steps", str(step + 2)]) == 0
    assert [row["step"] for row in Run.open(run).metrics][-1] == step + 2
    assert "started on 2 processes, now 1" in (run / "log.txt").read_text()


@two_processes
@pytest.mark.slow
def test_torchrun_measures_a_run_as_one_process_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run, logs = tmp_path / "tiny.yaml", tmp_path / "run", tmp_path / "logs"
    recipe.write_text(yaml.safe_dump(TINY | {"steps": 20}))
    assert main(["pretrain", str(recipe), "--out", str(run)]) == 0
    capsys.readouterr()
    line = ("evaluate", run, "--protocol", "knn", "--json", "--out")
    assert main([str(each) for each in (*line, tmp_path / "one")]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert torchrun(logs, *line, tmp_path / "two").wait(120) == 0
    shared_out = json.loads(said(logs, 0, "stdout"))
    assert shared_out["figures"] == alone["figures"] and 20 < alone["figures"]["top1"] < 100
    assert said(logs, 1) == said(logs, 1, "stdout") == ""
    [one], [two] = ([*(tmp_path / name).glob("*.json")] for name in ("one", "two"))
    assert one.name == two.name and one.read_text() == two.read_text()


@pytest.mark.slow
def test_srun_trains_and_measures_as_one_process_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the environment that srun gives its tasks; SLURM itself is not to be had here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    given = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "71"}
    given |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NAME": "moco", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}

    def srun(*arguments: Any) -> list[tuple[str, str]]:
        command, pipe = [sys.executable, "-m", "moco.cli", *map(str, arguments)], subprocess.PIPE
        environments = [os.environ | given | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in ("0", "1")]
        tasks = [subprocess.Popen(command, env=each, stdout=pipe, stderr=pipe, text=True) for each in environments]
        printed = [task.communicate(timeout=200) for task in tasks]
        assert [task.returncode for task in tasks] == [0, 0], printed
        return printed

    recipe, run = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(TINY | {"steps": 10}))
    (_, log), *others = srun("pretrain", recipe, "--out", run)
    assert "processes: 2, each with" in log and others == [("", "")]
    assert Run.open(run).metrics[-1]["step"] == 10
    line = ["evaluate", str(run), "--protocol", "knn", "--json", "--out"]
    (figures, _), _ = srun(*line, tmp_path / "two")
    assert main([*line, str(tmp_path / "one")]) == 0
    assert json.loads(figures)["figures"] == json.loads(capsys.readouterr().out)["figures"]


def alive(process: int) -> bool:
    """Neither gone nor waiting for somebody to hear that it has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@two_processes
@pytest.mark.slow
def test_the_first_process_starts_the_others_and_sigterm_to_it_stops_all(tmp_path: Path) -> None:
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(TINY | {"epochs": 400, "monitor": {"every": 0, "knn_k": 20}}))
    command = [sys.executable, "-m", "moco.cli", "pretrain", str(recipe), "--out", str(run), "--engine.devices", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(run, 10)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM
    assert stdout == "" and stderr.count("stopped by SIGTERM") == 1
    assert checkpoint.load(run / "checkpoints" / "last.ckpt")["processes"] == 2

    process = subprocess.Popen([*command[:4], "--resume", str(run)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for_step(run, checkpoint.load(run / "checkpoints" / "last.ckpt")["step"] + 5)
    others = [int(each) for each in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(others[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0 and b"moco: another process of the run died or stopped responding" in stderr

    # Rows of steps that the last one took after its checkpoint are still there until this one has begun.
    step = last_row(run)
    process = subprocess.Popen([*command[:4], "--resume", str(run)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for_step(run, step + 5)
    others = [int(each) for each in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(others) == 1
    process.kill()
    _, stderr = process.communicate(timeout=60)  # until the others have closed it, too
    assert b"moco: another process of the run died or stopped responding" in stderr
    end = time.monotonic() + 60
    while others and time.monotonic() < end:
        others = [each for each in others if alive(each)]
        time.sleep(0.2)
    assert not others
    assert main(["pretrain", "--resume", str(run), "--engine.devices", "1", "--steps", "400"]) == 0


UNREADABLE = """
import sys
from moco.cli import main
from moco.data import Loader
from moco.parallel import collectives
epoch = Loader.epoch

def unreadable_from_step_3(loader, number, *, start=0):
    for step, batch in enumerate(epoch(loader, number, start=start)):
        if collectives.rank() == 1 and step == 3:
            raise ValueError("9 of 160 files could not be read so far")
        yield batch

Loader.epoch = unreadable_from_step_3
sys.exit(main(sys.argv[1:]))
"""


@two_processes
@pytest.mark.slow
def test_too_many_bad_files_on_one_process_end_both_and_spoil_no_checkpoint(tmp_path: Path) -> None:
    recipe, run, script = tmp_path / "tiny.yaml", tmp_path / "run", tmp_path / "script.py"
    recipe.write_text(yaml.safe_dump(TINY | {"epochs": 2, "monitor": {"every": 0, "knn_k": 20, "save_every": 1e-6}}))
    script.write_text(UNREADABLE)
    command = [sys.executable, str(script), "pretrain", str(recipe), "--out", str(run), "--engine.devices", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert ended.returncode != 0
    assert "moco: 9 of 160 files could not be read so far" in ended.stderr
    assert "moco: another process of the run died or stopped responding (see its own message)" in ended.stderr
    assert 0 < checkpoint.load(run / "checkpoints" / "last.ckpt")["step"] <= 3
