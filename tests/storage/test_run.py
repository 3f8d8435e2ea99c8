import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import moco
from moco.cli import main
from moco.config import parse_config
from moco.data import load_data
from moco.method.backbones import build_backbone
from moco.recipes import load_recipe
from moco.storage.run import Run
from moco.training.metrics import COLUMNS, MetricsWriter
from small import TINY


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return moco.pretrain(parse_config(TINY), out=tmp_path_factory.mktemp("runs") / "first")


# What is in the folder


def test_a_finished_run_is_complete(run: Run) -> None:
    expected = {
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "results.json",
        "curves.png",
        "neighbours.png",
        "neighbours.svg",
        "pictures.json",
        "views.svg",
        "map.svg",
        "similarities.svg",
        "report.html",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "encoder.safetensors",
        "config.json",
        "log.txt",
    }
    assert {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()} == expected
    for name in ("curves.png", "neighbours.png"):
        with Image.open(run.path / name) as picture:
            picture.load()
            assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(2**24) or ()) > 20
    environment = json.loads((run.path / "environment.json").read_text())
    assert torch.__version__.startswith(environment["versions"]["torch"])
    assert environment["device"] == "cpu"


def test_a_run_read_back_has_its_settings_with_every_choice_made(run: Run) -> None:
    config = Run.open(run.path).config
    assert config == run.config
    assert config.engine.channels_last is False
    assert "auto" not in (config.engine.accelerator, config.engine.precision)


def test_the_table_has_a_row_every_few_steps_and_at_the_end(run: Run) -> None:
    with (run.path / "metrics.csv").open(newline="") as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
    assert [row["step"] for row in run.metrics] == [10, 15]
    first, last = run.metrics
    assert "knn_top1" not in first
    assert last.keys() == set(COLUMNS)
    assert first["epoch"] == pytest.approx(10 / 15) and last["epoch"] == 1
    assert 0 < first["train_seconds"] < last["train_seconds"]
    assert last["images_per_second"] > 0 and last["data_wait"] == 0 and last["queue_fill"] == 100
    for row in run.metrics:
        assert -1 <= row["negative"] < row["positive"] <= 1
        assert 0 <= row["pretext_accuracy"] <= 100 and 0 < row["spread"] < 1.1


def test_the_results_set_the_encoder_beside_what_it_has_to_beat(run: Run) -> None:
    assert run.results.keys() == {"raw pixels", "untrained encoder", "trained encoder"}
    for row in run.results.values():
        assert row.keys() == {"knn_top1", "one_label", "five_labels"}
        assert 20 < row["one_label"] < row["five_labels"] < row["knn_top1"] < 100
    assert run.results["raw pixels"]["knn_top1"] == pytest.approx(94.6, abs=2)


# The encoder that comes out


def test_a_loaded_encoder_is_the_trained_backbone(run: Run) -> None:
    encoder = moco.load_encoder(run.path)
    assert not encoder.training and not any(each.requires_grad for each in encoder.parameters())
    state = torch.load(run.last, weights_only=True)["model"]
    prefix = "query_encoder.backbone."
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    backbone = build_backbone("resnet-tiny", stem="small", channels=1)
    backbone.load_state_dict(weights)
    images = torch.randn(3, 1, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), backbone.eval()(images), rtol=0, atol=1e-5)
    for size in ((8, 8), (9, 31), (64, 64)):
        assert encoder(torch.randn(2, 1, *size)).shape == (2, encoder.num_features)


def test_it_says_how_it_wants_its_images_and_makes_them_so(run: Run) -> None:
    encoder = moco.load_encoder(str(run.path))
    assert (encoder.mean, encoder.std, encoder.input_size) == ((0.5,) * 3, (0.5,) * 3, 12)
    pixels = load_data(run.config.data).train.decode(0)
    ready = encoder.preprocess(pixels[None])
    enlarged = F.interpolate(pixels[None].float(), size=(12, 12), mode="bilinear", antialias=True).round()
    torch.testing.assert_close(ready, (enlarged / 255 - 0.5) / 0.5, rtol=0, atol=2.01 / 255)
    picture = Image.fromarray(pixels[0].numpy())
    assert torch.equal(encoder.preprocess([picture, picture.convert("RGB")]), ready.repeat(2, 1, 1, 1))
    wide = Image.fromarray(np.zeros((20, 50, 3), np.uint8))
    assert encoder.preprocess([wide, picture]).shape == (2, 1, 12, 12)


def test_evaluating_a_run_gives_the_result_it_ended_with(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run.path), "--protocol", "knn", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["top1"] == run.results["trained encoder"]["knn_top1"]


def test_a_stranger_to_the_protocols_is_told_them(run: Run) -> None:
    with pytest.raises(ValueError, match="^unknown protocol 'kn': expected one of knn.*; did you mean knn"):
        moco.evaluate(run.path, "kn")


# Without labels


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on a flat folder."""
    folder = tmp_path_factory.mktemp("flat")
    digits = load_data(parse_config(TINY).data).train
    (folder / "photos").mkdir()
    for number in range(60):
        Image.fromarray(digits.decode(number)[0].numpy()).save(folder / "photos" / f"{number}.png")
    changed = {"data": TINY["data"] | {"source": str(folder / "photos")}, "batch_size": 32}
    return moco.pretrain(parse_config(TINY | changed), out=folder / "run")


def test_without_labels_there_is_no_best_and_no_accuracy(flat: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert flat.last.is_file() and not flat.best.exists()
    assert flat.results == {"raw pixels": {}, "untrained encoder": {}, "trained encoder": {}}
    assert not any("knn_top1" in row for row in flat.metrics)
    for name in ("curves.png", "neighbours.png"):
        with Image.open(flat.path / name) as picture:
            picture.load()
    assert moco.load_encoder(flat.path).num_features > 0


def test_knn_of_a_run_without_labels_is_refused(flat: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(flat.path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moco: these images have no labels, which this protocol needs") and error.count("\n") == 1


# The table


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    writer = MetricsWriter(path, ("step", "loss"), keep_until=0)
    assert path.read_text() == "step,loss\n"
    writer.write({"step": 1, "loss": 0.1 + 0.2})
    assert path.read_text() == "step,loss\n1,0.30000000000000004\n"
    writer.sync()
    writer.close()
    writer.close()


@pytest.mark.parametrize("half", ["", "6", "6,", "6,0.", "\0\0\0", "6,0.5,7\n", '"6', "\ufffd"])
def test_later_rows_and_broken_ones_are_cut(half: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,knn\n2,0.5,\n4,0.25,90.0\n5,1,1\n" + half)
    writer = MetricsWriter(path, ("step", "loss", "knn"), keep_until=4)
    writer.write({"step": 5, "loss": 2.0})
    writer.close()
    assert path.read_text() == "step,loss,knn\n2,0.5,\n4,0.25,90.0\n5,2.0,\n"


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.csv", ("step",), keep_until=0, active=False)
    writer.write({"step": 1})
    writer.sync()
    writer.close()
    assert not list(tmp_path.iterdir())


# The folder itself


def test_a_run_takes_no_place_that_is_taken(tmp_path: Path) -> None:
    config = load_recipe("digits")
    Run.create(tmp_path / "empty is free", config)
    (tmp_path / "empty is free" / "config.yaml").rename(tmp_path / "file")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(
            FileExistsError, match=r"exists already; continue that run with .*--resume.*or give another"
        ):
            Run.create(taken, config)


def test_no_run_is_found_where_there_is_none(run: Run, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", run.path / "config.yaml"):
        with pytest.raises(FileNotFoundError, match="is not a run: it has no config.yaml"):
            Run.open(path)
    assert Run(tmp_path, run.config).metrics == [] and Run(tmp_path, run.config).results == {}


def test_what_is_said_goes_into_the_log_once_and_leaves_no_trace(tmp_path: Path) -> None:
    run, logger = Run(tmp_path, load_recipe("digits")), logging.getLogger("moco")
    before = logger.handlers[:], logger.level
    with pytest.raises(RuntimeError, match="stop"), run.logged():
        logger.info("loss: %.2f is chance", 4.86)
        raise RuntimeError("stop")
    logger.info("afterwards")
    assert (logger.handlers, logger.level) == before
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 1 and lines[0].endswith(" INFO loss: 4.86 is chance")
