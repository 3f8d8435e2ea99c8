import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as tv

from moco.config import DataConfig, EvaluateConfig
from moco.data import ArrayImages, FileImages, Splits, epoch_order, load_data
from moco.embeddings.features import features
from moco.evaluate import Outcome, Task
from moco.evaluate.contract import accuracies
from moco.evaluate.linear import evaluate
from moco.evaluate.linear_fast import DECAYS
from moco.evaluate.linear_published import (
    FORMS,
    build_classifier,
    build_optimizer,
    check_frozen,
    in_force,
    learning_rate,
    tensors_of,
)
from moco.evaluate.reading import read
from moco.method.encoder import ImageEncoder
from moco.views.specs import CIFAR10, VIEWS, ViewSpec
from moco.views.two_views import OneView
from small import SmallBackbone

CLASSES = 10


def encoder(*, size: int = 16, vit: bool = False) -> ImageEncoder:
    torch.manual_seed(0)
    mean, std = CIFAR10
    backbone = SmallBackbone(vit=vit)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):  # else the running statistics would tell nothing
            module.running_mean = 0.1 * torch.randn(module.num_features)
    whole = ImageEncoder(backbone, name="small", stem="imagenet", channels=3, mean=mean, std=std, input_size=size)
    return whole.eval().requires_grad_(False)


def digits(*, train: int = 150, test: int = 60) -> Splits:
    splits = load_data(DataConfig(source="digits"))
    assert splits.test is not None
    return Splits(splits.train.select(range(train)), splits.test.select(range(test)))


def task(
    splits: Splits | None = None, *, whole: ImageEncoder | None = None, report: Any = None, **settings: Any
) -> Task:
    chosen = EvaluateConfig.model_validate({"accelerator": "cpu", "precision": "fp32", **settings})
    return Task(whole or encoder(), None, splits or digits(), chosen, report or (lambda *_: None))


def top1(outcome: Outcome, of: Task) -> float:
    assert outcome.scores is not None
    return accuracies(outcome.scores, of.labelled().test_labels)["top1"]


def rates(form: str, *, is_vit: bool = False, **settings: Any) -> list[float]:
    given = EvaluateConfig.model_validate(settings)
    epochs = given.epochs or FORMS[form].epochs
    return [learning_rate(FORMS[form], given, epoch, is_vit=is_vit) for epoch in range(epochs)]


def test_the_learning_rate_of_every_epoch_is_the_published_one():
    assert rates("official") == pytest.approx([30] * 60 + [3] * 20 + [0.3] * 20)
    cosine = [(1 + math.cos(math.pi * epoch / 90)) / 2 for epoch in range(90)]
    assert rates("v3") == pytest.approx([0.1 * 1024 / 256 * each for each in cosine])
    assert rates("v3", is_vit=True) == pytest.approx([3 * 1024 / 256 * each for each in cosine])
    assert (rates("v3")[0], rates("v3")[45]) == pytest.approx((0.4, 0.2))
    assert rates("leftthomas") == [1e-3] * 100


def test_the_rate_follows_the_batch_the_milestones_follow_the_epochs_and_a_given_rate_is_per_256_images():
    assert rates("official", batch_size=64, epochs=10) == pytest.approx([7.5] * 6 + [0.75] * 2 + [0.075] * 2)
    assert rates("official", lr=2.0, batch_size=512, epochs=1) == pytest.approx([4.0])
    assert rates("v3", lr=2.0, is_vit=True)[0] == pytest.approx(8.0)


def test_adams_rate_does_not_follow_the_batch_as_in_the_published_code():
    assert rates("leftthomas", batch_size=64, epochs=3) == [1e-3] * 3
    assert rates("leftthomas", lr=0.2, batch_size=1024, epochs=1) == [0.2]


def test_what_was_in_force_is_told():
    wanted: dict[str, Any] = {
        "form": "v3",
        "epochs": 90,
        "batch_size": 1024,
        "lr": 3.0,
        "weight_decay": 0.0,
        "precision": "fp32",
    }
    of_form = in_force("v3", task(whole=encoder(vit=True), precision="auto")).model_dump(include=set(wanted))
    assert of_form == wanted
    given: dict[str, Any] = {
        "form": "official",
        "epochs": 1,
        "batch_size": 7,
        "lr": 0.5,
        "weight_decay": 0.1,
        "precision": "fp64",
    }
    told = evaluate(task(**given))
    assert told.settings is not None and told.settings.model_dump(include=set(given)) == given
    assert "official, 1 epochs in fp64" in told.notes[0]
    fast = evaluate(task(epochs=3, lr=0.3)).settings
    assert fast is not None and (fast.form, fast.epochs, fast.lr, fast.batch_size) == ("fast", 3, 0.3, 1024)
    assert fast.weight_decay in DECAYS


def test_classifiers_begin_as_published():
    torch.manual_seed(0)
    for form in ("official", "v3"):
        small = build_classifier(FORMS[form], 512, 1000)
        assert small.weight.std().item() == pytest.approx(0.01, rel=0.01) and small.weight.abs().max() > 0.03
        assert not small.bias.any()
    default = build_classifier(FORMS["leftthomas"], 400, 1000)
    for tensor in (default.weight, default.bias):  # uniform within 1 / sqrt(features)
        assert 0.045 < tensor.abs().max() <= 0.05
        assert tensor.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.05)


def test_optimizers_are_the_published_ones_over_two_tensors_and_no_more():
    whole, classifier = encoder(), nn.Linear(6, CLASSES)
    params, settings = [*whole.parameters(), *classifier.parameters()], EvaluateConfig()
    for form in ("official", "v3"):
        sgd = build_optimizer(FORMS[form], settings, params)
        assert isinstance(sgd, torch.optim.SGD) and len(sgd.param_groups[0]["params"]) == 2
        assert (sgd.defaults["momentum"], sgd.defaults["weight_decay"], sgd.defaults["nesterov"]) == (0.9, 0.0, False)
    adam = build_optimizer(FORMS["leftthomas"], settings, params)
    assert isinstance(adam, torch.optim.Adam) and adam.defaults["weight_decay"] == 1e-6
    given = build_optimizer(FORMS["official"], EvaluateConfig(weight_decay=0.1), params)
    assert given.defaults["weight_decay"] == 0.1
    whole.requires_grad_(True)
    with pytest.raises(AssertionError, match="trainable tensors; expected the classifier's weight and bias alone"):
        build_optimizer(FORMS["official"], settings, params)


def test_one_bit_of_one_frozen_tensor_does_not_pass():
    whole = encoder()
    before = tensors_of(whole)
    check_frozen(whole, before)
    for name, tensor in [*whole.named_parameters(), *whole.named_buffers()]:
        kept = tensor.detach().clone()
        flat = tensor.detach().reshape(-1)
        flat[-1] = flat[-1] + 1 if flat.dtype == torch.int64 else torch.nextafter(flat[-1], torch.tensor(math.inf))
        with pytest.raises(RuntimeError, match=f"^{name} of the frozen encoder changed"):
            check_frozen(whole, before)
        tensor.detach().copy_(kept)
    assert sum("num_batches_tracked" in name for name in before) == 2
    check_frozen(whole, before)


def published(form: str, whole: ImageEncoder, splits: Splits, *, epochs: int, batch: int, peak: float) -> torch.Tensor:
    """Scores of the test images by the protocol, step by step in float64."""
    train, test = splits
    assert isinstance(train, ArrayImages) and train.labels is not None and test is not None
    drifting, num_classes = form == "leftthomas", len(train.classes or ())
    net = whole.double().train(drifting)
    torch.manual_seed(0)
    layer = nn.Linear(6, num_classes)
    if not drifting:
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
    params = [layer.weight.detach().double().requires_grad_(), layer.bias.detach().double().requires_grad_()]
    first, second = ([torch.zeros_like(each) for each in params] for _ in range(2))
    mean, std = CIFAR10
    crop_and_flip = ViewSpec(crop_scale=(0.08, 1.0), jitter_p=0, grey_p=0, mean=mean, std=std)
    view, step = OneView(VIEWS["cifar"]()[0] if drifting else crop_and_flip, whole.input_size, 0), 0
    for epoch in range(epochs):
        lr = peak
        if form == "official":
            lr = peak * (1, 0.1, 0.01)[(epoch >= 0.6 * epochs) + (epoch >= 0.8 * epochs)]
        if form == "v3":
            lr = peak / 2 * (1 + math.cos(math.pi * epoch / epochs))
        for ids in epoch_order(len(train), seed=0, epoch=epoch).split(batch):
            step += 1
            scores = net(view(train.images[ids], ids, epoch=epoch).double()) @ params[0].T + params[1]
            loss = F.cross_entropy(scores, train.labels[ids])
            for i, slope in enumerate(torch.autograd.grad(loss, params)):
                with torch.no_grad():
                    if drifting:  # Adam with the L2 penalty in the gradient
                        slope = slope + 1e-6 * params[i]
                        first[i] = 0.9 * first[i] + 0.1 * slope
                        second[i] = 0.999 * second[i] + 0.001 * slope**2
                        spread = (second[i] / (1 - 0.999**step)).sqrt() + 1e-8
                        params[i] -= lr * first[i] / (1 - 0.9**step) / spread
                    else:
                        first[i] = 0.9 * first[i] + slope
                        params[i] -= lr * first[i]
    vectors = features(whole, test, precision="fp64").double()
    return vectors @ params[0].detach().T + params[1].detach()


@pytest.mark.parametrize(
    "form, vit, peak",
    [("official", False, 30 / 4), ("v3", False, 0.1 / 4), ("v3", True, 3 / 4), ("leftthomas", False, 1e-3)],
)
def test_training_is_the_published_one_step_by_step_in_float64(form, vit, peak):
    splits, settings = digits(), dict(form=form, epochs=5, batch_size=64, precision="fp64")  # the last batch has 22
    got = evaluate(task(splits, whole=encoder(size=8, vit=vit), **settings))
    want = published(form, encoder(size=8, vit=vit), splits, epochs=5, batch=64, peak=peak)
    # Features of the test images are float32 in both.
    torch.testing.assert_close(got.scores, want, rtol=1e-9, atol=1e-9)


def test_the_encoder_is_left_as_it_was_and_so_is_the_global_generator():
    for form in FORMS:
        whole = encoder(size=8)
        before, state = tensors_of(whole), torch.get_rng_state()
        outcome = evaluate(task(whole=whole, form=form, epochs=1))
        check_frozen(whole, before)
        assert torch.equal(torch.get_rng_state(), state) and not whole.training
        assert not any(parameter.requires_grad for parameter in whole.parameters())
        assert outcome.scores is not None and outcome.scores.shape == (60, CLASSES)


def test_a_frozen_encoder_that_changes_is_found_out(monkeypatch):
    class Forgetful(SmallBackbone):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            self.get_buffer("1.running_mean").add_(1e-3)
            return super().forward(input)

    whole = encoder()
    whole.backbone = Forgetful().eval().requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"^backbone.1.running_mean of the frozen encoder changed"):
        evaluate(task(whole=whole, form="official", epochs=1))


def test_figures_are_of_the_last_epoch_and_the_best_is_told_apart():
    given = task(form="official", epochs=6, lr=3.0)
    outcome = evaluate(given)
    assert outcome.figures["best_top1"] >= top1(outcome, given) > 10
    assert "best_top1 is the best of every epoch on the test images" in outcome.notes[0]
    drifting = evaluate(task(form="leftthomas", epochs=1))
    assert "every 10th epoch and the last" in drifting.notes[0] and "were not, as published" in drifting.notes[1]
    assert drifting.figures.keys() == {"best_top1_of_looks"}


def test_the_same_seed_gives_the_same_and_another_another():
    for form in ("official", "leftthomas", "fast"):
        first, again, other = (evaluate(task(form=form, epochs=2, seed=seed)).scores for seed in (1, 1, 2))
        assert first is not None and again is not None and other is not None
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_fast_is_what_is_done_when_no_form_is_named():
    plain, fast = evaluate(task(epochs=3)), evaluate(task(epochs=3, form="fast"))
    assert plain.figures == fast.figures and plain.figures.keys() == {"validation_top1", "lr", "weight_decay"}
    assert plain.scores is not None and plain.scores.shape == (60, CLASSES)
    assert "test images played no part" in plain.notes[0]


def test_a_tenth_of_the_labels_is_a_tenth_of_the_steps():
    seen: list[tuple[int, int]] = []
    given = task(digits(train=600), form="official", epochs=2, batch_size=10, labels=0.1)
    given = given._replace(report=lambda what, *done: seen.append(done) if what.endswith("steps") else None)
    evaluate(given)
    assert seen == [(step, 12) for step in range(1, 13)]


def test_few_labels_leave_fast_nothing_to_choose_by_and_it_says_so():
    outcome = evaluate(task(epochs=2, labels=0.01))
    assert outcome.figures.keys() == {"lr", "weight_decay"} and "left at the default" in outcome.notes[0]


def test_a_loss_that_is_no_number_ends_it_in_one_line():
    with pytest.raises(RuntimeError, match=r"^the loss became NaN or infinite in epoch \d; lower --lr, now \S+$"):
        evaluate(task(form="official", lr=1e38, epochs=5, batch_size=32))


def test_what_is_unknown_is_answered_with_what_is_known():
    with pytest.raises(ValueError, match="unknown form 'offical' of linear: expected one of .*did you mean official"):
        evaluate(task(form="offical"))


def test_a_last_batch_of_one_image_has_no_batch_statistics_and_is_passed_over():
    outcome = evaluate(task(digits(train=65), whole=encoder(size=8), form="leftthomas", epochs=1, batch_size=32))
    assert outcome.scores is not None and outcome.scores.isfinite().all()


def test_test_images_are_resized_and_cut_as_published():
    whole = encoder(size=28)
    pixels = torch.randint(0, 256, (5, 3, 48, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = ArrayImages(pixels, None, None, tuple("abcde"))
    cut = tv.center_crop(tv.resize(pixels, [32], antialias=True), [28, 28])  # 28 : 32 = 224 : 256
    given = task(whole=whole)
    torch.testing.assert_close(read(given, images, "test", cut=True).vectors, whole(whole.preprocess(cut)))
    as_they_are = replace(images, images=cut)
    torch.testing.assert_close(read(given, as_they_are, "test", cut=True).vectors, whole(whole.preprocess(cut)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Dark and bright pictures of all sizes."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 7), ("test", 4)):
        for name, low in (("dark", 0), ("bright", 150)):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(low, low + 100, (20 + number, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("form, batch_size", [("official", 5), ("official", 32), ("leftthomas", 5), ("fast", None)])
def test_files_are_read_all_of_them_each_epoch(folder, form, batch_size):
    splits, seen = load_data(DataConfig(source=str(folder))), []
    assert isinstance(splits.train, FileImages)
    given = task(splits, form=form, epochs=4, batch_size=batch_size, lr=None if form == "fast" else 0.3)
    outcome = evaluate(given._replace(report=lambda *said: seen.append(said[1:]) if "steps" in said[0] else None))
    if batch_size:
        steps = math.ceil(14 / batch_size)
        assert seen == [(step + 1, 4 * steps) for step in range(4 * steps)]
    if form != "leftthomas":
        assert top1(outcome, given) == 100


def test_decoded_files_are_held_if_they_fit_and_the_steps_are_the_same(folder, monkeypatch):
    splits = load_data(DataConfig(source=str(folder)))
    settings: dict[str, Any] = {"form": "official", "epochs": 2, "batch_size": 5, "lr": 0.3}
    held = evaluate(task(splits, **settings)).scores
    read_anew = evaluate(task(splits, **settings)._replace(data=DataConfig(memory=1e-9, workers=0))).scores
    assert held is not None and read_anew is not None and torch.equal(held, read_anew)
    decoded: list[str] = []
    decode_many = FileImages.decode_many
    monkeypatch.setattr(
        FileImages,
        "decode_many",
        lambda self, indices: (decoded.extend(self.paths[i] for i in indices), decode_many(self, indices))[1],
    )
    evaluate(task(splits, **settings))
    assert sorted(decoded) == sorted(splits.train.paths)  # each once


@pytest.mark.parametrize("form", ["fast", "official", "leftthomas"])
@pytest.mark.parametrize("memory", [2.0, 1e-9])
def test_files_that_cannot_be_read_are_left_out_of_both_parts(folder, form, memory, caplog):
    splits = load_data(DataConfig(source=str(folder)))
    assert splits.test is not None
    cut_off = [splits.train.paths[-1], splits.test.paths[0]]
    for path in cut_off:
        Path(path).write_bytes(Path(path).read_bytes()[:300])
    config = DataConfig(max_bad=0.2, memory=memory, workers=0)
    given = task(splits, form=form, epochs=2, batch_size=8, lr=0.3)
    outcome = evaluate(given._replace(data=config))
    assert outcome.scores is not None and outcome.labels is not None and outcome.scores.isfinite().all()
    assert splits.test.labels is not None and torch.equal(outcome.labels, splits.test.labels[1:])
    assert len(outcome.scores) == 7 and all(repr(path) in caplog.text for path in cut_off)
    assert "1 of 8 test images could not be read and were left out." in outcome.notes
    assert any(note.startswith("1 of 14 training images could not be read") for note in outcome.notes)
    with pytest.raises(ValueError, match=r"cannot be read|could not be read"):
        evaluate(given._replace(data=DataConfig(max_bad=0.1, memory=memory, workers=0)))


def test_of_a_last_batch_few_files_are_decoded_at_a_time(folder, monkeypatch):
    splits, module = load_data(DataConfig(source=str(folder))), sys.modules[read.__module__]
    whole = evaluate(task(splits, form="official", epochs=1, lr=0.3)._replace(data=DataConfig(memory=1e-9))).scores
    monkeypatch.setattr(module, "DECODED_AT_ONCE", 3)
    asked: list[int] = []
    decode_many = FileImages.decode_many
    monkeypatch.setattr(
        FileImages, "decode_many", lambda self, which: (asked.append(len(which)), decode_many(self, which))[1]
    )
    parts = evaluate(task(splits, form="official", epochs=1, lr=0.3)._replace(data=DataConfig(memory=1e-9))).scores
    assert max(asked) == 3 and sum(asked) >= 14
    assert whole is not None and parts is not None and torch.equal(whole, parts)
