"""A run that was killed and continued ends with the same bits as one that was left alone: checked on real processes."""

import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from conftest import Command
from doubles import wait_for_step
from moco.cli import main
from moco.storage.run import Run
from moco.training.metrics import TIMES

SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "steps": 33,  # of 44: the end, too, is in the middle of an epoch
    "batch_size": 64,
    "data": {"source": "digits", "channels": 1},
    "views": {"recipe": "digits", "size": 8},
    "model": {"backbone": "resnet-tiny", "stem": "small", "dim": 16, "queue_size": 256, "momentum": 0.9},
    "monitor": {"knn_k": 20, "log_every": 5, "save_every": 0.05},
    "engine": {"accelerator": "cpu", "precision": "fp32", "threads": 1},
}
BF16_V3: dict[str, Any] = {
    "steps": 20,
    "model": SETTINGS["model"]
    | {"variant": "v3", "queue_size": 0, "hidden_dim": 32, "momentum_schedule": "cosine", "temperature": 1.0},
    "optim": {"name": "adamw", "base_lr": 1e-3, "warmup_epochs": 1},
    "engine": {"accelerator": "cpu", "precision": "bf16", "threads": 1},
}


def recipe(folder: Path, changed: dict[str, Any]) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | changed))
    return path


def flat(value: object, name: str = "") -> dict[str, object]:
    """All leaves of a checkpoint by their path in it."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    else:
        return {name: value}
    return {leaf: each for key, inner in pairs for leaf, each in flat(inner, f"{name}/{key}").items()}


def assert_equal_checkpoints(one: Path, other: Path, *, but_for: str | None = None) -> None:
    left, right = (torch.load(path, weights_only=True) for path in (one, other))
    for state in (left, right):
        del state["clock"], state["config"]["monitor"]["save_every"], state["config"]["data"]["workers"]
        state["random"].pop(but_for, None)
    left, right = flat(left), flat(right)
    assert left.keys() == right.keys()
    parts = {name.split("/")[1] for name in left}
    assert {"model", "optimizer", "random", "meter", "step", "best"} <= parts
    for name, value in left.items():
        if isinstance(value, Tensor):
            other_value = right[name]
            assert isinstance(other_value, Tensor) and value.dtype == other_value.dtype
            assert torch.equal(value, other_value), name
        else:
            assert value == right[name], name


def assert_equal_runs(one: Path, other: Path, *, but_for: str | None = None) -> None:
    """To the last bit, but for the times, and this random generator if one is named."""
    for name in ("last.ckpt", "best.ckpt"):
        assert_equal_checkpoints(one / "checkpoints" / name, other / "checkpoints" / name, but_for=but_for)
    left, right = (table_without_times(run) for run in (one, other))
    assert left == right and len(left) >= 5
    for name in ("encoder.safetensors", "config.json", "results.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert not list(other.rglob("*.partial"))


def table_without_times(run: Path) -> list[list[str]]:
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    kept = [index for index, name in enumerate(rows[0]) if name not in TIMES]
    assert len(kept) == len(rows[0]) - len(TIMES)
    return [[row[index] for index in kept] for row in rows]


def kill_and_continue(
    start: Callable[..., None],
    kill: Callable[[], int],
    run: Path,
    first: tuple[str | Path, ...],
    steps: list[int],
    *changed: str,
) -> None:
    """Kills the command a moment after each of these steps, continues it, and leaves it when it is past them."""
    arguments, chance = first, random.Random(0)
    for step in steps:
        start(*arguments)
        wait_for_step(run, step)
        time.sleep(chance.uniform(0, 0.2))
        assert kill() == -signal.SIGKILL
        arguments = ("pretrain", "--resume", run, *changed)
    start(*arguments)


@pytest.fixture(scope="module")
def undisturbed(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    command.start("pretrain", recipe(folder, {}), "--out", folder / "run")
    assert command.wait() == 0, command.stderr
    return folder / "run"


def killed(command: Command, folder: Path, changed: dict[str, Any], steps: list[int]) -> Path:
    def kill() -> int:
        command.signal(signal.SIGKILL)
        return command.wait()

    run = folder / "killed"
    kill_and_continue(command.start, kill, run, ("pretrain", recipe(folder, changed), "--out", run), steps)
    assert command.wait() == 0, command.stderr
    return run


def test_a_run_killed_at_any_moment_ends_with_the_same_bits(
    command: Command, undisturbed: Path, tmp_path: Path
) -> None:
    steps = sorted(random.Random(1).sample(range(3, 22), 3))
    assert_equal_runs(undisturbed, killed(command, tmp_path, {}, steps))


@pytest.mark.slow
def test_so_does_one_of_v3_in_bf16(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command.start("pretrain", recipe(tmp_path, BF16_V3), "--out", run)
    assert command.wait() == 0, command.stderr
    assert_equal_runs(run, killed(command, tmp_path, BF16_V3, [random.Random(2).randrange(4, 14)]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_so_does_one_of_files_that_workers_read_started_as_people_do(
    kind: str, moco_data: Path, tmp_path: Path
) -> None:
    source = moco_data / "photos" / "test"
    if kind == "shards":
        assert main(["pack", str(source), str(tmp_path / "packed"), "--shard_size", "2"]) == 0
        source = tmp_path / "packed"
        assert len(list(source.rglob("*.tar"))) > 2
    changed = {
        "data": {"source": str(source), "memory": 1e-6, "workers": 2},
        "views": {"recipe": "v2", "size": 32},
        "batch_size": 32,
        "model": SETTINGS["model"] | {"symmetric": True},
        "epochs": 3,
        "monitor": SETTINGS["monitor"] | {"every": 0},
    }
    process: subprocess.Popen[bytes] | None = None

    def start(*arguments: str | Path) -> None:
        nonlocal process
        process = subprocess.Popen([sys.executable, "-m", "moco.cli", *map(str, arguments)])

    def kill() -> int:
        assert process
        process.kill()
        return process.wait()

    for name, steps in (("run", []), ("killed", [7])):
        first = ("pretrain", recipe(tmp_path, changed), "--out", tmp_path / name)
        kill_and_continue(start, kill, tmp_path / name, first, steps, "--data.workers", "3")
        assert process and process.wait() == 0
    assert_equal_runs(tmp_path / "run", tmp_path / "killed")


def test_sigterm_and_ctrl_c_save_first_and_say_how_to_go_on(
    command: Command, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "my run"
    arguments = ["pretrain", str(recipe(tmp_path, {})), "--out", str(run)]
    for signum, step in ((signal.SIGTERM, 6), (signal.SIGINT, 24)):
        # No other checkpoints than those of the signals.
        command.start(*arguments, "--monitor.save_every", "3600")
        wait_for_step(run, step)
        command.signal(signum)
        assert command.wait() == 128 + signum
        assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["step"] >= step
        before, _, after = command.stderr.strip().splitlines()[-1].partition("moco pretrain ")
        assert before == f"moco: stopped by {signum.name}; saved; continue with: "
        arguments = ["pretrain", *shlex.split(after)]
    command.start(*arguments)
    assert command.wait() == 0
    assert_equal_runs(undisturbed, run)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was told to stop while it measured kNN."""
    from moco.training.monitor import Monitor

    knn, folder = Monitor.knn, tmp_path_factory.mktemp("stopped")

    def interrupted(monitor: Monitor) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return knn(monitor)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Monitor, "knn", interrupted)
        assert main(["pretrain", str(recipe(folder, {})), "--out", str(folder / "run")]) == 128 + signal.SIGTERM
    return folder / "run"


def test_a_signal_during_knn_lets_it_end_and_saves(stopped: Path) -> None:
    row = Run.open(stopped).metrics[-1]
    assert row["step"] == 22 and row["knn_top1"] > 50
    assert torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)["step"] == 22


def test_rows_past_the_checkpoint_and_half_a_row_are_cut(stopped: Path, undisturbed: Path) -> None:
    with (stopped / "metrics.csv").open("a") as file:
        file.write("25,1.1,1,1,1,1,1,1,1,1,,,1,1,1,1\n30,1.3,7.25")
    (stopped / "checkpoints" / ".last.ckpt.x.partial").write_text("begun by a process that was killed")
    assert main(["pretrain", "--resume", str(stopped)]) == 0
    # The check of types in this process picks at random which items of a list it looks at.
    assert_equal_runs(undisturbed, stopped, but_for="python")


def test_told_to_stop_in_the_step_before_knn_it_measures_saves_and_goes_on_to_the_same_end(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moco.training.step import Training

    step, run = Training.step, tmp_path / "run"

    def signalled(training: Training, *batch: Any) -> None:
        if training.done == 21:
            signal.raise_signal(signal.SIGTERM)
        step(training, *batch)

    settings = recipe(tmp_path, {"monitor": SETTINGS["monitor"] | {"save_every": 3600}})
    with monkeypatch.context() as patched:
        patched.setattr(Training, "step", signalled)
        assert main(["pretrain", str(settings), "--out", str(run)]) == 128 + signal.SIGTERM
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["step"] == 22
    last = Run.open(run).metrics[-1]
    assert last["step"] == 22 and "knn_top1" in last
    assert main(["pretrain", "--resume", str(run)]) == 0
    assert_equal_runs(undisturbed, run, but_for="python")


def test_a_second_ctrl_c_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moco.training.monitor import Monitor

    def impatient(monitor: Monitor) -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr(Monitor, "knn", impatient)
    run, before = tmp_path / "run", signal.getsignal(signal.SIGINT)
    arguments = ["pretrain", str(recipe(tmp_path, {"monitor": {"save_every": 3600}})), "--out", str(run)]
    assert main([*arguments, "--steps", "1"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err.splitlines()[-1] == "moco: stopped by SIGINT"
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["step"] == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_continued_stays_as_it_is(undisturbed: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.name != "log.txt" and path.is_file()}
    assert main(["pretrain", "--resume", str(undisturbed)]) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_was_killed_before_its_first_checkpoint_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from moco.recipes import load_recipe

    run = Run.create(tmp_path / "run", load_recipe(str(recipe(tmp_path, {}))))
    assert main(["pretrain", "--resume", str(run.path)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"moco: {run.last} does not exist; the run was stopped before its first checkpoint")
    assert line.count("\n") == 1
