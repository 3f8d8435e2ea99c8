import json
import os
import pickle
import random
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import moco
from doubles import official
from moco.cli import main
from moco.config import PretrainConfig, merge, parse_config
from moco.method import variants
from moco.method.backbones import build_backbone
from moco.method.encoder import ImageEncoder
from moco.storage import checkpoint, encoder_files
from moco.storage.run import Run
from moco.training import step

SETTINGS: dict[str, Any] = {
    "batch_size": 32,
    "data": {"source": "digits", "channels": 1},
    "views": {"recipe": "digits", "size": 8},
    "model": {"backbone": "resnet-tiny", "stem": "small", "dim": 8, "queue_size": 64},
    "engine": {"accelerator": "cpu", "precision": "fp32", "threads": 1},
}


class Hostile:
    """Unpickled, it would run a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", parse_config(SETTINGS))


def refusal(run: Run, capsys: pytest.CaptureFixture[str]) -> str:
    """What `--resume` answers in its one line."""
    before = sorted(run.path.rglob("*"))
    assert main(["pretrain", "--resume", str(run.path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moco: ") and error.count("\n") == 1, error
    assert sorted(run.path.rglob("*")) == before
    return error.removeprefix("moco: ").strip()


# Training's checkpoints


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    state = {"step": 3, "model": {"weight": torch.randn(3, 2, dtype=torch.float64)}, "best": -1.0, "list": [1, None]}
    checkpoint.save(tmp_path / "last.ckpt", state)
    loaded = checkpoint.load(tmp_path / "last.ckpt")
    assert loaded.pop("format") == checkpoint.FORMAT
    assert torch.equal(loaded["model"].pop("weight"), state["model"].pop("weight"))
    assert loaded == state


def test_a_checkpoint_that_would_run_a_command_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    trace = run.path.parent / "trace"
    for save in (
        lambda: torch.save({"format": 1, "step": Hostile(f"touch {trace}")}, run.last),
        lambda: run.last.write_bytes(pickle.dumps(Hostile(f"touch {trace}"))),
    ):
        save()
        assert f"{run.last} is damaged, or not a moco checkpoint" in refusal(run, capsys)
        assert not trace.exists()


def test_a_damaged_checkpoint_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(run.last, {"step": 1, "model": {"weight": torch.randn(100)}})
    whole, chance = run.last.read_bytes(), random.Random(0)
    damaged = [whole[: len(whole) // 2], whole[:-1], b"", b"\x80", b"PK\x03\x04", bytes(500), b"epochs: 3\n"]
    damaged += [chance.randbytes(chance.randrange(1, 300)) for _ in range(200)]
    for content in damaged:
        run.last.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged, or not a moco checkpoint") as caught:
            checkpoint.load(run.last)
        assert "\n" not in str(caught.value)
    assert "is damaged" in refusal(run, capsys)


def test_a_pickle_gone_wrong_anywhere_is_no_traceback(tmp_path: Path) -> None:
    path, chance = tmp_path / "last.ckpt", random.Random(0)
    checkpoint.save(path, {"step": 1, "model": {"weight": torch.randn(3)}, "more": [1.0, "two", (3, None)]})
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in parts if name.endswith("data.pkl"))
    for _ in range(300):
        broken = bytearray(parts[name])
        for _ in range(chance.randrange(1, 4)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        with zipfile.ZipFile(path, "w") as archive:
            for each, content in (parts | {name: bytes(broken)}).items():
                archive.writestr(each, content)
        try:
            checkpoint.load(path)
        except ValueError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"state_dict": {}, "epoch": 200}, "is not a moco checkpoint; give one that `moco pretrain` wrote"),
        ({"format": "1"}, "is not a moco checkpoint"),
        ([1, 2], "is not a moco checkpoint"),
        (torch.zeros(2), "is not a moco checkpoint"),
        ({"format": checkpoint.FORMAT + 1}, f"this version reads formats up to {checkpoint.FORMAT}; update moco"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(
    state: Any, words: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(state, run.last)
    assert words in refusal(run, capsys)


def test_a_checkpoint_of_another_architecture_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    model = moco.create_model("v2", backbone="resnet18", stem="small", dim=8, queue_size=64, channels=1)
    state = {"step": 1, "model": model.state_dict(), "optimizer": {}, "meter": {}, "clock": {}, "best": 0.0}
    checkpoint.save(run.last, state | {"random": {}, "config": {}})
    line = refusal(run, capsys)
    assert f"{run.last} has another architecture: it lacks " in line
    assert line.endswith("; use the settings it was trained with")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("1.bias"), "it lacks 1 of 4 tensors, first '1.bias'"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "it has unknown 1 of 4 tensors, first 'extra'"),
        (
            lambda weights: weights.update({"0.weight": torch.zeros(2, 3)}),
            r"it has other shapes for 1 of 4 tensors, first '0.weight' \(\(2, 3\), expected \(4, 3\)\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, words: str) -> None:
    weights = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict()
    change(weights)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=f"^x.ckpt has another architecture: {words}"):
        checkpoint.load_weights(module, weights, Path("x.ckpt"))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_all_generators_go_on_where_they_were() -> None:
    def draw() -> list[Any]:
        return [torch.rand(3).tolist(), random.random(), random.gauss(), np.random.rand(), np.random.randn()]

    step.seed_everything(7)
    first = draw()
    state = step.random_state()
    expected = draw()
    step.restore_random_state(state)
    assert draw() == expected
    step.seed_everything(7)
    assert draw() == first
    step.seed_everything(-7)
    assert draw() != first


# Encoders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One with an encoder in it."""
    backbone = build_backbone("resnet-tiny", stem="small", channels=1)
    about: dict[str, Any] = {"name": "resnet-tiny", "stem": "small", "channels": 1, "input_size": 8}
    encoder_files.save_encoder(tmp_path, ImageEncoder(backbone, mean=(0.5,), std=(0.5,), **about))
    return tmp_path


def answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `load_encoder` says, and `moco evaluate` in its one line."""
    Run(folder, parse_config(SETTINGS)).write_text("config.yaml", "data: {source: digits}\n")
    modules = set(sys.modules)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        moco.load_encoder(folder)
    assert main(["evaluate", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moco: ") and error.count("\n") == 1, error
    assert not {"antigravity", "this"} & (set(sys.modules) - modules)
    assert str(caught.value) in error
    return str(caught.value)


def test_an_encoder_comes_back_as_it_was(folder: Path) -> None:
    torch.manual_seed(0)
    encoder, again = moco.load_encoder(folder), moco.load_encoder(str(folder))
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(encoder(images), again(images))
    assert encoder.describe() == again.describe()


@pytest.mark.parametrize(
    "name", ["antigravity:fly", "os:system", "no-such-net", "hf-hub:someone/model", "hf_hub:x", "local-dir:/tmp", ""]
)
def test_an_encoder_is_built_from_known_names_only(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"backbone": name}))
    assert answer(folder, capsys).startswith(f"unknown backbone {name!r}")


@pytest.mark.parametrize(
    "changed",
    [
        {"backbone": None},
        {"backbone": 5},
        {"backbone": ["resnet18"]},
        {"channels": "many"},
        {"channels": -1},
        {"channels": 2**40},
        {"mean": None},
        {"mean": "abc"},
        {"std": [1, "x"]},
        {"input_size": "large"},
        {"input_size": 0},
        {"stem": 7},
        {"mean": [0.5, 0.5]},
    ],
)
def test_a_config_with_nonsense_in_it_is_refused(
    changed: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | changed))
    assert "config.json does not describe a moco encoder" in answer(folder, capsys)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"{}", b"[" * 100_000])
def test_a_config_that_is_none_is_refused(content: bytes, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_bytes(content)
    assert "config.json does not describe a moco encoder" in answer(folder, capsys)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"stem": "smal"}, "unknown stem 'smal'"),
        ({"num_heads": 12}, "says 12 attention heads, but resnet-tiny has None"),
    ],
)
def test_a_config_of_another_network_is_refused(
    changed: dict[str, Any], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | changed))
    assert words in answer(folder, capsys)


def test_damaged_weights_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "encoder.safetensors"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4], b"", pickle.dumps(Hostile("exit 1")), bytes(100)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged, or not a safetensors file"):
            moco.load_encoder(folder)
    assert "encoder.safetensors is damaged, or not a safetensors file" in answer(folder, capsys)


def test_weights_of_another_network_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"backbone": "resnet-mini"}))
    assert "encoder.safetensors has another architecture" in answer(folder, capsys)


@pytest.mark.parametrize("name", ["config.json", "encoder.safetensors"])
def test_a_folder_without_an_encoder_says_so(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).unlink()
    assert answer(folder, capsys).startswith(f"{folder} has no {name}; expected a run that has finished")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; expected the folder of a run"):
        moco.load_encoder(folder / "nowhere")


# Starting from weights, and going on with the official code's training


def tiny(**changed: Any) -> PretrainConfig:
    """Three steps an epoch on images without labels, in float64."""
    config = parse_config(
        {
            "epochs": 3,
            "batch_size": 32,
            "data": {"channels": 1},
            "views": {"recipe": "digits", "size": 8},
            "model": SETTINGS["model"] | {"mask_own": False, "momentum": 0.9, "bn_splits": 4},
            "monitor": {"log_every": 1},
            "engine": {"accelerator": "cpu", "precision": "fp64", "threads": 1},
        }
    )
    return merge(config, changed)


V3: dict[str, Any] = {
    "model": {"variant": "v3", "queue_size": 0, "hidden_dim": 16, "momentum_schedule": "cosine"},
    "optim": {"name": "lars", "base_lr": 0.3, "warmup_epochs": 1, "weight_decay": 1e-6},
}
ADAMW: dict[str, Any] = {"optim": {"name": "adamw", "base_lr": 1e-2}}


@pytest.fixture
def images(no_pictures: None) -> torch.Tensor:
    return torch.randint(0, 256, (100, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def losses(run: Run) -> list[float]:
    return [row["loss"] for row in run.metrics]


@pytest.mark.parametrize("changed", [{}, ADAMW, V3], ids=["v2", "v2 with AdamW", "v3"])
def test_a_checkpoint_of_the_official_code_goes_on_as_our_own(
    changed: dict[str, Any], images: torch.Tensor, tmp_path: Path
) -> None:
    """Two of three epochs, then the third, once from our own checkpoint and once from theirs: the same losses."""
    config = tiny(**changed)
    first = moco.pretrain(merge(config, {"steps": 6}), data=images, out=tmp_path / "first")
    torch.save(official(first, epoch=2), tmp_path / "checkpoint_0001.pth.tar")
    theirs = moco.pretrain(config, data=images, resume=tmp_path / "checkpoint_0001.pth.tar", out=tmp_path / "theirs")
    ours = moco.pretrain(merge(config, {"steps": None}), data=images, resume=first.path)  # not given, it stays at 6
    assert [row["step"] for row in theirs.metrics] == [7, 8, 9]
    np.testing.assert_allclose(losses(theirs), losses(ours)[6:], rtol=0, atol=1e-6)
    end, other = (checkpoint.load(each.last)["model"] for each in (theirs, ours))
    for name in other:
        if not name.endswith("ids"):
            torch.testing.assert_close(end[name], other[name], rtol=0, atol=1e-6)
    assert "continues at step 6 from" in (theirs.path / "log.txt").read_text()


def test_what_lacks_optimizer_or_queue_cannot_be_gone_on_from(images: torch.Tensor, tmp_path: Path) -> None:
    config, path = tiny(), tmp_path / "released.pth.tar"
    run = moco.pretrain(merge(config, {"steps": 3}), data=images, out=tmp_path / "first")
    whole = official(run, epoch=1)

    def refusal(changed: dict[str, Any], **settings: Any) -> str:
        torch.save(whole | changed, path)
        with pytest.raises(ValueError) as caught:
            moco.pretrain(merge(config, settings), data=images, resume=path, out=tmp_path / "new")
        assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()
        return str(caught.value)

    released = {name: each for name, each in whole["state_dict"].items() if "encoder_q." in name}
    line = refusal({"state_dict": released, "optimizer": None})
    assert "holds no optimizer and no key encoder and no queue, so training cannot be resumed from it" in line
    assert line.endswith(f"start from its weights with --init_from {path}")
    assert "is already at epoch 3 of 3; raise --epochs" in refusal({"epoch": 3})
    assert "other shapes for 1 of" in refusal({}, model={"queue_size": 96})
    assert "the state of another optimizer: expected step and exp_avg and exp_avg_sq of" in refusal({}, **ADAMW)
    with pytest.raises(ValueError, match="does not hold the settings it was trained with; give a recipe, too"):
        moco.pretrain(data=images, resume=path)
    with pytest.raises(ValueError, match=f"give the run's folder: --resume {run.path}$"):
        moco.pretrain(config, resume=run.last)


def test_a_run_starts_from_the_weights_of_a_file(images: torch.Tensor, tmp_path: Path) -> None:
    config = tiny(steps=1)
    first = moco.pretrain(config, data=images, out=tmp_path / "first")
    torch.save(official(first, epoch=1), tmp_path / "theirs.pth.tar")
    expected = checkpoint.load(first.last)["model"]
    for number, path in enumerate((tmp_path / "theirs.pth.tar", first.last, first.path)):
        model = variants.build_model(config.model, channels=1)
        told = encoder_files.initialise(model, merge(config, {"init_from": str(path)}))
        has_head = path != first.path
        assert told.endswith("; head taken too" if has_head else "; new head")
        state = model.state_dict()
        for name, each in expected.items():
            if name.startswith("query_encoder.backbone.") or (has_head and name.startswith("query_encoder.")):
                assert torch.equal(state[name], each.to(state[name].dtype)), (number, name)
        for name, each in model.query_encoder.state_dict().items():
            assert torch.equal(each, model.key_encoder.state_dict()[name])


def test_a_continued_run_does_not_need_the_file_it_started_from(images: torch.Tensor, tmp_path: Path) -> None:
    first = moco.pretrain(tiny(steps=1), data=images, out=tmp_path / "first")
    start = first.path / "encoder.safetensors"
    config = tiny(init_from=str(start), steps=2)
    run = moco.pretrain(config, data=images, out=tmp_path / "run")
    assert "starts from" in (run.path / "log.txt").read_text() and "encoder at the start" in run.results
    start.unlink()
    assert len(moco.pretrain(merge(config, {"steps": 3}), data=images, resume=run.path).metrics) == 3
    with pytest.raises(FileNotFoundError):
        moco.pretrain(config, data=images, out=tmp_path / "again")


def test_a_run_does_not_start_from_another_network(tmp_path: Path) -> None:
    backbone = build_backbone("resnet18", stem="small")
    torch.save(backbone.state_dict(), tmp_path / "theirs.pth")
    for model, words in (
        ({"backbone": "resnet34", "stem": "small"}, "is not a resnet34: it lacks .*; it looks like resnet18$"),
        (
            {"backbone": "resnet18", "stem": "imagenet"},
            "small stem for 3 channels; the settings .*: give --model.stem small, or",
        ),
    ):
        config = parse_config({"init_from": str(tmp_path / "theirs.pth"), "model": model})
        with pytest.raises(ValueError, match=words):
            encoder_files.initialise(variants.build_model(config.model), config)
