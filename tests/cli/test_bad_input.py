"""What people get wrong, through the real command: one line that helps, exit code 2, and nothing written."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import moco
from moco.cli import main
from moco.config import merge
from moco.recipes import load_recipe
from moco.storage.checkpoint import save as save_checkpoint
from moco.storage.run import Run

CPU = ("--engine.accelerator", "cpu", "--engine.precision", "bf16")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a few that hold images beside it."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refusal(capfd: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 2) -> str:
    """What the command answers."""
    before = contents(Path.cwd())
    assert main([str(each) for each in arguments]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("moco: ") and err.count("\n") == 1, err
    assert contents(Path.cwd()) == before
    return err.removeprefix("moco: ").strip()


def save_images(folder: Path, number: int) -> Path:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (number, 12, 12, 3), np.uint8)
    for index, each in enumerate(pixels):
        Image.fromarray(each).save(folder / f"{index:03}.png")
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cifar"], ["no recipe 'cifar'; did you mean cifar10?", "digits"]),
        (["mine.yaml"], ["no file mine.yaml"]),
        (["--optim.lr", "1"], ["--optim.lr is not a setting; did you mean --optim.base_lr?"]),
        (["--epochs", "many"], ['--epochs: unable to convert "many" into int']),
        (["--views.size", "0"], ["views.size is 0; expected greater than 0"]),
        (["--steps", "0"], ["steps is 0; expected greater than 0"]),
        (
            ["--data", "nowhere"],
            ["data source 'nowhere' does not exist; expected one of digits", "or a folder of images"],
        ),
        (["digits", "--data", "digit"], ["data source 'digit' does not exist", "did you mean digits?"]),
        (
            ["digits", "--batch_size", "2048", "--model.queue_size", "4096"],
            ["batch_size is 2048, expected at most the number of images, 1442"],
        ),
        (
            ["digits", "--model.queue_size", "100"],
            ["model.queue_size is 100; expected at least the 128 keys of one step"],
        ),
        (["digits", "--engine.accelerator", "npu"], ["engine.accelerator is 'npu'; expected one of cpu, cuda"]),
        (["digits", *CPU, "--model.backbone", "resnet81"], ["unknown backbone 'resnet81'", "the closest are resnet"]),
        (["digits", *CPU, "--model.variant", "v4"], ["unknown variant 'v4': expected one of v1, v2, v3"]),
        (["digits", *CPU, "--model.backbone", "vit_tiny_patch16_224"], ["no ResNet stem", "--model.stem imagenet"]),
        (["digits", *CPU, "--views.recipe", "cifr"], ["unknown views.recipe 'cifr'", "did you mean cifar?"]),
        (["digits", *CPU, "--views.recipe", "no_such.module:views"], ["views.recipe", "no_such"]),
        (["digits", *CPU, "--views.recipe", "math:no_such"], ["views.recipe", "no_such"]),
        (["digits", *CPU, "--views.recipe", "math:nan"], ["views.recipe", "math:nan"]),
        (["digits", *CPU, "--seed", "99999999999999999999"], ["seed"]),
        (["--resume", "runs/none"], ["runs/none is not a run: it has no config.yaml"]),
        (["digits", "--resume", "runs/none"], ["--resume was given with digits"]),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    arguments: list[str], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capfd, "pretrain", *arguments)
    assert all(word in line for word in words), line


def test_no_accelerator_is_no_accelerator(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refusal(capfd, "pretrain", "digits", "--engine.accelerator", "cuda")
    assert line == "engine.accelerator is 'cuda', but torch sees no CUDA device; use --engine.accelerator cpu"


def test_a_logger_that_is_not_installed_is_named(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning_fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    line = refusal(capfd, "pretrain", "digits", *CPU, "--monitor.loggers", "tensorboard", code=1)
    assert "tensorboard" in line


def test_a_folder_without_images_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    (empty / "sub").mkdir(parents=True)
    for arguments in (["--data", empty], ["digits", "--data", empty]):
        assert f"no images in {str(empty)!r}; expected files ending in" in refusal(capfd, "pretrain", *arguments)
    (empty / "notes.txt").write_text("not an image")
    assert "no images in" in refusal(capfd, "pretrain", "--data", empty)
    assert "is a file" in refusal(capfd, "pretrain", "--data", empty / "notes.txt")


def test_too_few_images_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save_images(tmp_path / "photos", 15)
    assert refusal(capfd, "pretrain", "--data", folder).startswith("there are 15 images; expected at least 16")
    line = refusal(capfd, "pretrain", "digits", *CPU, "--data", folder)
    assert "batch_size is 128, expected at most the number of images, 15" in line


def test_too_many_unreadable_images_are_listed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save_images(tmp_path / "photos", 40)
    for name in ("007.png", "031.png"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:60])
    for arguments in (["--data", folder], ["digits", *CPU, "--data", folder]):
        assert main(["pretrain", *map(str, arguments)]) == 2
        line = capfd.readouterr().err.splitlines()[-1]
        assert line.startswith("moco: 2 of 40 files cannot be read, expected at most 1.00%; remove them or raise")
        assert "007.png" in line and "031.png" in line
    assert not list(Path.cwd().iterdir())


def test_a_place_that_is_taken_is_left_alone(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "taken").mkdir()
    (here / "taken" / "thesis.txt").write_text("years of work")
    line = refusal(capfd, "pretrain", "digits", "--out", "taken")
    assert line == (
        "taken exists already; continue that run with `moco pretrain --resume taken`, or give another --out"
    )
    assert "exists already" in refusal(capfd, "pretrain", "digits", "--out", "taken/thesis.txt")


def test_a_place_below_a_file_is_no_place(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "file").write_text("")
    arguments = [*CPU, "--model.backbone", "resnet-tiny", "--out", "file/run"]
    assert refusal(capfd, "pretrain", "digits", *arguments, code=1) == "Not a directory: file/run/checkpoints"


def test_the_settings_of_a_run_that_were_spoilt_are_named(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Run.create(here / "run", load_recipe("digits"))
    (run.path / "config.yaml").write_text(yaml.safe_dump({"batch_size": "large"}))
    assert refusal(capfd, "pretrain", "--resume", "run").startswith("batch_size is 'large'; expected a valid integer")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere does not exist; expected the folder of a run"),
        (["run"], "run has no config.json; expected a run that has finished or saved a checkpoint"),
        (["run", "--protocol", "linaer"], "unknown protocol 'linaer': expected one of knn"),
        (["run", "--k", "0"], "k is 0; expected greater than 0"),
        (["run", "--temperature", "0"], "temperature is 0.0; expected greater than 0"),
        (["run", "--temperature", "nan"], "temperature is nan; expected greater than 0"),
        (["run", "--labels", "1.5"], "labels is 1.5; expected less than or equal to 1"),
        (["run", "--temprature", "1"], "Did you mean --temperature?"),
    ],
)
def test_what_cannot_be_evaluated_is_said(
    arguments: list[str], words: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Run.create(here / "run", load_recipe("digits"))
    assert words in refusal(capfd, "evaluate", *arguments)


def test_a_run_is_no_place_for_code_of_others(
    here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile_views.py").write_text(f"import os\n\nos.mkdir({str(tmp_path / 'trace')!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = merge(load_recipe("digits"), {"views": {"recipe": "hostile_views:views"}})
    run = Run.create(here / "run", config)
    save_checkpoint(run.last, {"step": 1})
    line = refusal(capfd, "pretrain", "--resume", "run")
    assert line.startswith("run names code to import, views.recipe 'hostile_views:views', which needs your consent")
    assert line.endswith("add --views.recipe hostile_views:views")
    with pytest.raises(ValueError, match="run names code to import"):
        moco.pretrain(resume="run")
    assert not (tmp_path / "trace").exists()
    # Named by the person, it is imported.
    assert "--views.recipe was given with --resume" in refusal(
        capfd, "pretrain", "--resume", "run", "--views.recipe", "other:views"
    )
    assert "'hostile_views:views' cannot be imported" in refusal(
        capfd, "pretrain", "--resume", "run", "--views.recipe", "hostile_views:views", *CPU[:2]
    )
    assert (tmp_path / "trace").exists()
