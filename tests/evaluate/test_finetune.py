import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from moco.config import DataConfig, EvaluateConfig
from moco.data import ArrayImages, Splits, load_data
from moco.evaluate import finetune
from moco.evaluate.contract import Outcome, Task, accuracies, held_out
from moco.evaluate.finetune import FINETUNE, layers, make_plan, parameter_groups, trainable
from moco.method.backbones import build_backbone
from moco.method.encoder import ImageEncoder
from small import SmallBackbone

DIGITS = load_data(DataConfig(source="digits", channels=1))
FEW: dict[str, Any] = {"epochs": 1, "labels": 0.1}


def encoder(name: str = "resnet-tiny", *, channels: int = 1, seed: int = 0) -> ImageEncoder:
    torch.manual_seed(seed)
    backbone = build_backbone(name, stem="small" if name == "resnet-tiny" else "imagenet", channels=channels)
    about: dict[str, Any] = {"name": name, "stem": "small" if name == "resnet-tiny" else "imagenet"}
    half = (0.5, 0.5, 0.5)
    found = ImageEncoder(backbone, channels=channels, mean=half, std=half, input_size=8, **about)
    return found.eval().requires_grad_(False)


def task(source: ImageEncoder | None = None, splits: Splits = DIGITS, **settings: Any) -> Task:
    chosen = EvaluateConfig.model_validate({"accelerator": "cpu", "precision": "fp32"} | settings)
    return Task(source or encoder(), None, splits, chosen, lambda what, done, total: None)


def top1(outcome: Outcome, splits: Splits = DIGITS) -> float:
    assert outcome.scores is not None
    return accuracies(outcome.scores, held_out(splits).test_labels)["top1"]


# Layers and their rates


def names_by_layer(backbone: nn.Module) -> list[set[str]]:
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    found = [[names[id(parameter)] for parameter in layer] for layer in layers(backbone)]
    assert sorted(name for layer in found for name in layer) == sorted(names.values())  # each once
    return [set(layer) for layer in found]


@pytest.mark.parametrize(
    ("name", "count", "member"),
    [
        ("resnet-tiny", 5, {0: "conv1.weight", 1: "stages.0.conv1.weight", 3: "stages.2.downsample.1.bias"}),
        ("resnet18", 10, {0: "bn1.weight", 1: "layer1.0.conv1.weight", 3: "layer2.0.downsample.0.weight"}),
        ("vit-small-v3", 14, {0: "patch_embed.proj.weight", 1: "blocks.0.attn.qkv.weight", 13: "norm.bias"}),
        ("vit_tiny_patch16_224", 14, {0: "pos_embed", 12: "blocks.11.mlp.fc2.bias", 13: "norm.weight"}),
    ],
)
def test_layers_go_from_the_stem_over_the_blocks_to_what_follows(name: str, count: int, member: dict[int, str]) -> None:
    found = names_by_layer(build_backbone(name))
    assert len(found) == count
    for place, parameter in member.items():
        assert parameter in found[place]


def test_a_network_without_blocks_has_a_layer_for_each_of_its_parts() -> None:
    assert names_by_layer(SmallBackbone()) == [
        {"0.weight"}, {"1.weight", "1.bias"}, {"3.weight"}, {"4.weight", "4.bias"}, set(),
    ]  # fmt: skip


def test_each_layer_learns_at_a_fixed_share_of_the_rate_of_the_next() -> None:
    backbone, classifier = build_backbone("resnet-tiny"), nn.Linear(128, 10)
    groups = parameter_groups(backbone, classifier, form=FINETUNE["resnet"], decay=0.5)
    rate = {id(parameter): group["rate"] for group in groups for parameter in group["params"]}
    named = {name: rate.pop(id(parameter)) for name, parameter in backbone.named_parameters()}
    assert named["conv1.weight"] == named["bn1.bias"] == 0.5**4
    assert [named[f"stages.{block}.conv2.weight"] for block in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert set(rate.values()) == {10.0} and len(rate) == 2  # the classifier's


def test_without_decay_all_layers_learn_alike_and_biases_and_norms_do_not_decay() -> None:
    backbone, classifier = build_backbone("vit-small-v3"), nn.Linear(384, 10)
    groups = parameter_groups(backbone, classifier, form=FINETUNE["vit"], decay=1.0)
    assert {group["rate"] for group in groups} == {1.0}
    for group in groups:
        assert all((parameter.ndim > 1) == ("weight_decay" not in group) for parameter in group["params"])


def test_all_of_a_v3_transformer_learns_but_its_computed_positions() -> None:
    source = encoder("vit-small-v3", channels=3)
    network = trainable(source, from_scratch=False)
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["pos_embed"]
    assert not any(parameter.requires_grad for parameter in source.parameters())
    own = dict(source.backbone.named_parameters())
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, own[name]) and parameter is not own[name]
    learned = trainable(encoder("vit_tiny_patch16_224", channels=3), from_scratch=True)
    assert all(parameter.requires_grad for parameter in learned.parameters())


# What is going to be done


def test_settings_follow_from_the_architecture_and_give_way_to_the_users() -> None:
    plan = make_plan(task(), 50_000)
    assert plan.form is FINETUNE["resnet"] and (plan.batch_size, plan.epochs, plan.steps_per_epoch) == (128, 30, 390)
    assert plan.lr(0) == 0.05 * 128 / 256 and plan.optim.weight_decay == 0
    transformer = make_plan(task(encoder("vit-small-v3", channels=3)), 50_000)
    assert transformer.form is FINETUNE["vit"] and transformer.batch_size == 256
    assert transformer.lr(0) == 0 and transformer.lr(5 * transformer.steps_per_epoch) == pytest.approx(2.5e-4)
    given: dict[str, Any] = {"epochs": 3, "lr": 0.7, "weight_decay": 0.1, "layer_decay": 0.6, "batch_size": 64}
    mine = make_plan(task(**given), 1_000)
    assert (mine.epochs, mine.batch_size, mine.layer_decay, mine.optim.weight_decay) == (3, 64, 0.6, 0.1)
    assert mine.lr(0) == pytest.approx(0.7 * 64 / 256)
    assert make_plan(task(form="vit"), 1_000).form is FINETUNE["vit"]
    with pytest.raises(ValueError, match="^unknown form 'resnt' of finetune: expected one of .*did you mean resnet"):
        make_plan(task(form="resnt"), 1_000)


def test_few_images_are_gone_through_more_often() -> None:
    ten_percent, one_percent = make_plan(task(), 5_000), make_plan(task(), 500)
    assert ten_percent.epochs == math.ceil(2000 / 39) and one_percent.epochs == math.ceil(2000 / 3)
    assert min(ten_percent.steps, one_percent.steps) >= 2000
    handful = make_plan(task(), 14)
    assert (handful.batch_size, handful.steps) == (14, 2000)


def test_the_rate_falls_to_nothing_along_a_cosine() -> None:
    plan = make_plan(task(epochs=4), 1_000)
    assert plan.steps == 28
    rates = [plan.lr(step) for step in range(28)]
    assert rates == sorted(rates, reverse=True) and rates[14] == pytest.approx(rates[0] / 2)
    assert rates[-1] < 0.01 * rates[0]


# The protocol


@pytest.fixture(scope="module")
def tuned() -> tuple[Outcome, ImageEncoder, dict[str, Tensor], Tensor, Tensor]:
    source = encoder()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    state = torch.random.get_rng_state()
    outcome = finetune.evaluate(task(source, epochs=5, labels=0.5, batch_size=32, lr=0.4))
    return outcome, source, before, state, torch.random.get_rng_state()


def test_the_network_learns_and_the_encoder_stays_as_it_was(
    tuned: tuple[Outcome, ImageEncoder, dict[str, Tensor], Tensor, Tensor],
) -> None:
    outcome, source, before, state, after = tuned
    assert top1(outcome) > 35  # 10 by chance
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert not source.training and not any(parameter.requires_grad for parameter in source.parameters())
    assert torch.equal(state, after)
    assert outcome.scores is not None and outcome.scores.shape == (len(held_out(DIGITS).test), 10)
    assert outcome.notes[0].startswith("From the pre-trained weights: 720 labelled images, 5 epochs of batches of 32")


def test_the_same_seed_gives_the_same_scores_whatever_ran_before() -> None:
    first = finetune.evaluate(task(**FEW))
    torch.rand(3)
    again, other = finetune.evaluate(task(**FEW)), finetune.evaluate(task(**FEW, seed=1))
    assert first.scores is not None and again.scores is not None and other.scores is not None
    assert torch.equal(first.scores, again.scores) and not torch.equal(first.scores, other.scores)


def test_from_scratch_owes_nothing_to_the_encoder_but_its_architecture() -> None:
    first, second = (finetune.evaluate(task(encoder(seed=seed), from_scratch=True, **FEW)) for seed in (1, 2))
    told = finetune.evaluate(task(encoder(seed=1), **FEW))
    assert first.scores is not None and second.scores is not None and told.scores is not None
    assert torch.equal(first.scores, second.scores) and not torch.equal(first.scores, told.scores)
    assert first.notes[0].startswith("From random weights")


def test_batch_norm_learns_with_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    networks: list[nn.Module] = []

    def kept(source: ImageEncoder, *, from_scratch: bool) -> nn.Module:
        networks.append(trainable(source, from_scratch=from_scratch))
        return networks[-1]

    monkeypatch.setattr(finetune, "trainable", kept)
    source = encoder()
    finetune.evaluate(task(source, epochs=1, labels=0.3))
    moved, own = networks[0].state_dict(), source.backbone.state_dict()
    assert int(moved["bn1.num_batches_tracked"]) == 3
    assert all(not torch.equal(moved[name], own[name]) for name in moved)


def test_a_loss_that_is_no_number_is_said_at_once() -> None:
    with pytest.raises(RuntimeError, match=r"^the loss became NaN or infinite by step \d+ of .*lower --lr"):
        finetune.evaluate(task(epochs=5, lr=1e20))


def test_without_a_labelled_test_part_training_images_are_held_out() -> None:
    train = DIGITS.train.select(range(200))
    outcome = finetune.evaluate(task(splits=Splits(train, None), epochs=1))
    assert outcome.scores is not None and len(outcome.scores) == 20
    assert "180 labelled images" in outcome.notes[0]


def test_images_without_labels_are_refused() -> None:
    assert isinstance(DIGITS.train, ArrayImages)
    nameless = ArrayImages(DIGITS.train.images[:50], None, None, DIGITS.train.paths[:50])
    with pytest.raises(ValueError, match="^these images have no labels, which this protocol needs"):
        finetune.evaluate(task(splits=Splits(nameless, None)))
    alone = ArrayImages(DIGITS.train.images[:40], torch.zeros(40).long(), ("0",), DIGITS.train.paths[:40])
    with pytest.raises(ValueError, match="^one labelled image is too few to learn from; raise --labels$"):
        finetune.evaluate(task(splits=Splits(alone, None), labels=0.001))


def test_files_of_any_size_are_learned_from_too(tmp_path: Path) -> None:
    for number in range(40):
        folder = tmp_path / ("bright" if number % 2 else "dark")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (20 + number, 24), (200, 220, 180) if number % 2 else (30, 40, 20)).save(
            folder / f"{number}.png"
        )
    splits = load_data(DataConfig(source=str(tmp_path), memory=1e-9, channels=1))
    outcome = finetune.evaluate(task(splits=splits, epochs=4, batch_size=6, lr=1.0))
    assert top1(outcome, splits) == 100


def test_files_that_cannot_be_read_are_left_out_of_both_parts(tmp_path: Path) -> None:
    for number in range(40):
        folder = tmp_path / ("train" if number < 30 else "test") / ("bright" if number % 2 else "dark")
        folder.mkdir(parents=True, exist_ok=True)
        colour = (200, 220, 180) if number % 2 else (30, 40, 20)
        Image.new("RGB", (20 + number, 24), colour).save(folder / f"{number}.jpg")
    splits = load_data(DataConfig(source=str(tmp_path), channels=1))
    assert splits.test is not None and splits.test.labels is not None
    for path in (splits.train.paths[3], splits.test.paths[-1]):
        Path(path).write_bytes(Path(path).read_bytes()[:-40])
    work = task(splits=splits, epochs=4, batch_size=6, lr=1.0)
    for memory in (2.0, 1e-9):  # decoded once, or read anew
        outcome = finetune.evaluate(work._replace(data=DataConfig(max_bad=0.2, memory=memory, workers=0)))
        assert outcome.scores is not None and outcome.labels is not None
        assert torch.equal(outcome.labels, splits.test.labels[:-1])
        assert accuracies(outcome.scores, outcome.labels)["top1"] == 100
        assert any(note.startswith("1 of 30 training images could not be read") for note in outcome.notes)
        assert "1 of 10 test images could not be read and were left out." in outcome.notes
    with pytest.raises(ValueError, match=r"^1 of 30 training images cannot be read, expected at most 1.00% in an eval"):
        finetune.evaluate(work)


def test_what_was_in_force_is_told() -> None:
    told = finetune.evaluate(task(**FEW, batch_size=32)).settings
    assert told is not None and (told.form, told.epochs, told.batch_size, told.lr) == ("resnet", 1, 32, 0.05)
    assert (told.weight_decay, told.layer_decay, told.precision, told.labels) == (0.0, 1.0, "fp32", 0.1)


def test_progress_is_reported_to_the_last_step() -> None:
    told: list[tuple[str, int, int]] = []
    work = task(epochs=1, labels=0.2)._replace(report=lambda *said: told.append(said))
    finetune.evaluate(work)
    assert ("training", 2, 2) in told and told[-1][0] == "features of the test images" and told[-1][1] == told[-1][2]


@pytest.mark.parametrize(("precision", "within"), [("bf16", 0.02), ("fp64", 1e-4)])
def test_other_arithmetic_gives_nearly_the_same(precision: str, within: float) -> None:
    exact, other = (finetune.evaluate(task(**FEW, precision=each)).scores for each in ("fp32", precision))
    assert exact is not None and other is not None and not torch.equal(exact, other)
    torch.testing.assert_close(exact, other, rtol=0, atol=within)
