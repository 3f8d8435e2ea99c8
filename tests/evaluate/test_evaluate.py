"""What holds for every protocol, and what is written of each."""

import copy
import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import moco
from moco.cli.console import report_evaluation
from moco.config import DataConfig, EvaluateConfig, parse_config
from moco.data import Splits, load_data
from moco.evaluate import EVALUATIONS, Evaluation, Outcome, Protocol, Task, evaluate
from moco.evaluate.contract import COMMON
from moco.evaluate.record import name_of
from moco.method.backbones import build_backbone
from moco.method.encoder import ImageEncoder
from moco.storage.encoder_files import save_encoder
from small import TINY

FAST: dict[str, dict[str, Any]] = {"linear": {"epochs": 2}, "finetune": {"epochs": 1}}


def digits() -> Splits:
    train, test = load_data(DataConfig(source="digits", channels=1))
    assert test is not None
    return Splits(train.select(range(150)), test.select(range(40)))


def encoder() -> ImageEncoder:
    torch.manual_seed(0)
    backbone = build_backbone("resnet-tiny", stem="small", channels=1)
    half, about = (0.5, 0.5, 0.5), {"name": "resnet-tiny", "stem": "small"}
    whole = ImageEncoder(backbone, channels=1, mean=half, std=half, input_size=8, **about)
    return whole.eval().requires_grad_(False)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_protocol_gives_figures_again_and_again_and_leaves_the_encoder_alone(name: str) -> None:
    protocol, source = EVALUATIONS[name], encoder()
    assert protocol.takes <= EvaluateConfig.model_fields.keys() and not protocol.takes & COMMON
    given = {"accelerator": "cpu", "precision": "fp32", "k": 5, "temperature": 0.1} | FAST.get(name, {})
    settings = EvaluateConfig.model_validate(given)
    before, state = copy.deepcopy(source.state_dict()), torch.get_rng_state()
    told: list[tuple[str, int, int]] = []
    first, again = (
        protocol.measure(Task(source, None, digits(), settings, lambda *said: told.append(said))) for _ in range(2)
    )
    assert isinstance(first, Outcome) and first.figures == again.figures and told
    assert (first.scores is None) == (name == "health")
    if first.scores is not None and again.scores is not None and first.labels is not None:
        assert torch.equal(first.scores, again.scores) and first.scores.shape == (40, 10) and len(first.labels) == 40
    else:
        assert first.figures
    for key, tensor in source.state_dict().items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), before[key].reshape(-1).view(torch.uint8))
    assert torch.equal(torch.get_rng_state(), state) and not source.training
    assert not any(parameter.requires_grad for parameter in source.parameters())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> moco.Run:
    """With an untrained encoder."""
    made = moco.Run.create(tmp_path_factory.mktemp("runs") / "first", parse_config(TINY))
    save_encoder(made.path, encoder())
    return made


@pytest.mark.parametrize(
    ("protocol", "settings", "message"),
    [
        ("knn", {"epochs": 5}, "--protocol knn does not use --epochs; it takes --features, --k, "
         "--temperature, --labels, --seed, --accelerator and --precision"),
        ("linear", {"form": "official", "features": "projection"}, "--protocol linear does not use --features"),
        ("linear", {"k": 3}, "--protocol linear does not use --k; it takes --form, --labels, --epochs"),
        ("finetune", {"temperature": 0.1}, "--protocol finetune does not use --temperature"),
        ("health", {"labels": 0.1}, "--protocol health does not use --labels; it takes --seed, "
         "--accelerator and --precision"),
    ],
)  # fmt: skip
def test_a_setting_that_would_change_nothing_is_refused(
    protocol: str, settings: dict[str, Any], message: str, run: moco.Run
) -> None:
    with pytest.raises(ValueError) as caught:
        evaluate(run.path, protocol, settings=settings)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_what_changes_nothing_because_it_is_so_anyway_is_not_refused() -> None:
    given = EvaluateConfig.model_validate({"features": "features", "labels": 1.0, "k": None, "seed": 3})
    EVALUATIONS["health"].refuse_others("health", given)


def test_two_evaluations_are_two_files_that_say_what_was_in_force(run: moco.Run) -> None:
    folder, few = run.path / "evaluations", {"labels": 0.1, "epochs": 1}
    found = [
        evaluate(run.path, settings={"k": 3}),
        evaluate(run.path, settings={"k": 20, "temperature": 0.07}),
        evaluate(run.path, "linear", settings=few),
        evaluate(run.path, "linear", settings=few | {"form": "official", "lr": 10.0}),
    ]
    assert [each.name for each in found] == [
        "knn-k3", "knn-k20-temperature0.07", "linear-labels10-epochs1", "linear-official-labels10-epochs1-lr10",
    ]  # fmt: skip
    for each in found:
        assert json.loads((folder / f"{each.name}.json").read_text()) == each.record()
    fast, official = (each.record()["settings"] for each in found[2:])
    assert (fast["form"], fast["epochs"], fast["batch_size"]) == ("fast", 1, 1024) and fast["lr"] and fast["k"] is None
    assert (official["form"], official["lr"], official["batch_size"], official["weight_decay"]) == (
        "official", 10.0, 256, 0.0,
    )  # fmt: skip
    assert official["precision"] == "fp32" and found[1].record()["settings"]["temperature"] == 0.07


def name(protocol: str = "knn", *, data: str | None = None, own: str | None = "digits", **given: Any) -> str:
    settings = EvaluateConfig.model_validate(given)
    default = {"linear": "fast", "finetune": "resnet"}.get(protocol)
    return name_of(protocol, settings, default_form=default, data=data, own=own)


def test_the_name_is_as_short_as_it_can_be_and_no_two_evaluations_share_one(tmp_path: Path) -> None:
    assert name() == name(data="digits") == name(k=None, features="features", labels=1) == "knn"
    assert name("linear", form="fast") == name("linear") == "linear" and name("finetune", form="resnet") == "finetune"
    assert name("linear", form="v3", seed=2, labels=0.01) == "linear-v3-labels1-seed2"
    assert name("finetune", from_scratch=True, precision="fp32") == "finetune-scratch-fp32"
    assert name("health", accelerator="cpu") == "health" and name(features="projection") == "knn-projection"
    assert name(data="cifar10") == "knn-cifar10" and name(data="digits", own=None) == "knn-digits"
    assert name("pack.age:function") == "pack.age.function"
    assert name(temperature=0.1234567) == "knn-temperature0.1234567"
    here, there = tmp_path / "a" / "my phötos" / "x", tmp_path / "b" / "my phötos" / "x"
    words = {name(data=str(each)) for each in (here, there, here.parent, tmp_path / ("long" * 40))}
    assert len(words) == 4 and all(word.isascii() and "/" not in word and len(word) < 40 for word in words)
    assert name(data=str(here / ".." / "x"), own=str(here)) != "knn" == name(data=str(here), own=str(here))


def found(classes: int, folder: Path | None) -> Evaluation:
    counts = np.zeros((classes, classes), dtype=np.int64)
    counts[0, :3], counts[2, :3] = (5, 0, 7), (9, 1, 2)
    return Evaluation(
        name="knn", data="x", figures={"top1": 50.0, "rank": float("nan")}, per_class={}, confusion=counts,
        classes=tuple(f"class {i}" for i in range(classes)), settings=EvaluateConfig(), notes=(), folder=folder,
    )  # fmt: skip


def test_the_most_frequent_mix_ups_are_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    few = found(3, None)
    assert few.mixups() == [("class 2", "class 0", 9), ("class 0", "class 2", 7), ("class 2", "class 1", 1)]
    assert few.mixups(1) == few.mixups()[:1] and replace(few, confusion=None).mixups() == []
    report_evaluation("t", few.figures, few.per_class, few.notes, None, few.mixups())
    out = capsys.readouterr().out
    assert "Most frequent confusions: class 2 as class 0 9 times" in out and "class 2 as class 1 1 time." in out


def test_the_confusion_of_many_classes_is_a_file_of_its_own(tmp_path: Path) -> None:
    many, few = found(101, tmp_path), found(100, None)
    many.write()
    record = json.loads((tmp_path / "knn.json").read_text())
    assert record["confusion"] == "knn.confusion.npy" and record["figures"] == {"top1": 50.0, "rank": None}
    assert many.confusion is not None and few.confusion is not None
    assert np.array_equal(np.load(tmp_path / "knn.confusion.npy"), many.confusion)
    assert few.record()["confusion"] == few.confusion.tolist()
    assert replace(many, folder=None).record()["confusion"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["knn.confusion.npy", "knn.json", "knn.png"]


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, object], None]:
    module = types.ModuleType("a_stranger")
    monkeypatch.setitem(sys.modules, "a_stranger", module)
    return lambda name, value: setattr(module, name, value)


def test_a_protocol_of_ones_own_is_named_by_its_place(run: moco.Run, own: Callable[[str, object], None]) -> None:
    seen: list[Task] = []
    own("measure", lambda task: (seen.append(task), Outcome({"answer": 42.0}))[1])
    mine = evaluate(run.path, "a_stranger:measure", settings={"k": 7})
    assert mine.figures == {"answer": 42.0} and mine.name == "a_stranger.measure-k7" and seen[0].settings.k == 7
    assert (run.path / "evaluations" / "a_stranger.measure-k7.json").is_file()
    own("whole", Protocol(lambda task: Outcome({"answer": 1.0}), frozenset({"labels"})))
    assert evaluate(run.path, "a_stranger:whole").figures == {"answer": 1.0}
    with pytest.raises(ValueError, match="^--protocol a_stranger:whole does not use --k; it takes --labels"):
        evaluate(run.path, "a_stranger:whole", settings={"k": 7})


def test_what_is_no_protocol_is_refused_in_one_line(run: moco.Run, own: Callable[[str, object], None]) -> None:
    own("number", 3)
    own("odd", lambda task: 3)
    for named, message in {
        "a_stranger:nothing": "^protocol 'a_stranger:nothing' cannot be imported .*expected package.module:function",
        "nowhere.at.all:f": "^protocol 'nowhere.at.all:f' cannot be imported",
        "a_stranger:number": "^protocol 'a_stranger:number' is 3; expected a function",
        "a_stranger:odd": "^protocol 'a_stranger:odd' returns 3; expected a moco.evaluate.Outcome$",
        "linaer": "^unknown protocol 'linaer': expected one of knn.*; did you mean linear",
    }.items():
        with pytest.raises(ValueError, match=message):
            evaluate(run.path, named)


def test_the_unreadable_are_dropped_with_their_labels_from_both_parts(tmp_path: Path, run: moco.Run) -> None:
    for number in range(60):
        folder = tmp_path / "set" / ("train" if number < 40 else "test") / ("bright" if number % 2 else "dark")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (70 + number, 72), 200 + number % 5 if number % 2 else 10).save(folder / f"{number}.jpg")
    for spoilt in (tmp_path / "set/train/dark/20.jpg", tmp_path / "set/test/bright/45.jpg"):
        spoilt.write_bytes(spoilt.read_bytes()[:-60])
    source = str(tmp_path / "set")
    with pytest.raises(ValueError, match=r"^1 of 40 training images cannot be read, expected at most 1.00% in an eval"):
        evaluate(run.path, data=source)
    config = parse_config(TINY | {"data": {"source": source, "channels": 1, "max_bad": 0.1}})
    tolerant = moco.Run.create(tmp_path / "run", config)
    save_encoder(tolerant.path, encoder())
    got = evaluate(tolerant.path)
    assert got.confusion is not None and got.confusion.sum() == 19 and got.figures["top1"] == 100
    assert got.notes == (
        "1 of 40 training images could not be read and were left out.",
        "1 of 20 test images could not be read and were left out.",
    )
