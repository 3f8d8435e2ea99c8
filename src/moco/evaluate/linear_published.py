"""The linear classifiers of the papers."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from moco.config import EvaluateConfig
from moco.embeddings.features import encode
from moco.evaluate.contract import Outcome, Task, accuracies, is_vit, labels_of, num_classes
from moco.evaluate.reading import Batches, hold, read
from moco.views.specs import VIEWS, ViewSpec
from moco.views.two_views import OneView

LOOK_EVERY = 10
"""Epochs between tests if the encoder's statistics drift, so that each test costs a pass over the test images."""
BEST = {False: "best_top1", True: "best_top1_of_looks"}
"""The figure that the published code prints, and its substitute if not every epoch is tested."""


@dataclass(frozen=True)
class LinearForm:
    """A published way to train a linear classifier."""

    optimizer: Literal["sgd", "adam"]
    lr: float
    """Learning rate; per 256 images if it is `scaled`."""
    vit_lr: float
    """Learning rate for vision transformers."""
    batch_size: int
    epochs: int
    schedule: Literal["step", "cosine", "constant"]
    """`step`: a tenth of the learning rate after 60 % of the epochs, a hundredth after 80 %."""
    view: ViewSpec
    """Augmentation of training images; they are normalised as the encoder expects."""
    small_init: bool = True
    """Initialise weights from N(0, 0.01) and biases with 0; otherwise as PyTorch's linear layer does."""
    weight_decay: float = 0.0
    scaled: bool = True
    """Multiply the learning rate by the batch size / 256."""
    drifting: bool = False
    """Keep the encoder in training mode: it normalises with batch statistics, while the running ones, used in testing,
    drift."""


_CROP = ViewSpec(crop_scale=(0.08, 1.0), jitter_p=0.0, grey_p=0.0)

FORMS: Mapping[str, LinearForm] = {
    "official": LinearForm("sgd", 30.0, 30.0, 256, 100, "step", _CROP),
    "v3": LinearForm("sgd", 0.1, 3.0, 1024, 90, "cosine", _CROP),
    "leftthomas": LinearForm(
        "adam",
        1e-3,
        1e-3,
        256,
        100,
        "constant",
        VIEWS["cifar"]()[0],
        small_init=False,
        weight_decay=1e-6,
        scaled=False,
        drifting=True,
    ),
}


def evaluate_published(task: Task, name: str) -> Outcome:
    form, held, device = FORMS[name], task.labelled(), task.device
    settings = in_force(name, task)
    epochs, batch_size, precision = settings.epochs, settings.batch_size, settings.precision
    assert epochs and batch_size
    dtype = torch.float64 if precision == "fp64" else torch.float32
    layout = torch.channels_last if precision == "bf16" else torch.contiguous_format
    # A copy, because it may drift, and so that the check below covers what was really used.
    encoder = copy.deepcopy(task.encoder).to(dtype).to(memory_format=layout).train(form.drifting)
    before = tensors_of(encoder)
    source = hold(task, held.train)
    spec = replace(form.view, mean=encoder.mean, std=encoder.std)
    view = OneView(spec, encoder.input_size, settings.seed)
    batches = Batches(task, source, view, batch_size, whole=True, share=not form.drifting)
    labels = labels_of(source.images).to(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        classifier = build_classifier(form, encoder.num_features, num_classes(held)).to(device, dtype)
        optimizer = build_optimizer(form, settings, [*encoder.parameters(), *classifier.parameters()])
        test = read(task, held.test, "test", encoder=encoder, precision=precision, cut=True)
        test_labels, test_notes = labels_of(test.images), test.notes
        best, last, steps = 0.0, torch.empty(0), math.ceil(len(source.images) / batch_size)
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(form, settings, epoch, is_vit=is_vit(encoder))
            total = torch.zeros((), device=device)
            for step, batch in enumerate(batches(epoch)):
                if form.drifting and len(batch.ids) == 1:
                    continue  # one image has no batch statistics
                with torch.no_grad():
                    features = encode(encoder, batch.views, precision).to(dtype)
                inputs, ids = batch.whole(features)  # the encoder is the work: every process trains the classifier
                loss = F.cross_entropy(classifier(inputs), labels[ids.to(device)])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach()
                task.report("linear classifier, steps", epoch * steps + step + 1, epochs * steps)
            if not math.isfinite(total):
                lr = optimizer.param_groups[0]["lr"]
                raise RuntimeError(f"the loss became NaN or infinite in epoch {epoch}; lower --lr, now {lr:g}")
            if not form.drifting or epoch + 1 == epochs or (epoch + 1) % LOOK_EVERY == 0:
                if form.drifting:
                    test = read(task, test.images, "test", encoder=encoder, precision=precision, cut=True)
                with torch.no_grad():
                    last = classifier(test.vectors.to(classifier.weight)).cpu()
                best = max(best, accuracies(last, test_labels)["top1"])
    if not form.drifting:
        check_frozen(encoder, before)
    notes = (*_notes(name, settings), *batches.notes, *test_notes)
    return Outcome({BEST[form.drifting]: best}, last, notes, test_labels, settings)


def in_force(name: str, task: Task) -> EvaluateConfig:
    """Return the settings, filled in from the form."""
    form, given = FORMS[name], task.settings
    lr = form.vit_lr if is_vit(task.encoder) else form.lr
    return given.model_copy(
        update={
            "form": name,
            "epochs": given.epochs or form.epochs,
            "batch_size": given.batch_size or form.batch_size,
            "lr": lr if given.lr is None else given.lr,
            "weight_decay": form.weight_decay if given.weight_decay is None else given.weight_decay,
            "precision": "fp32" if given.precision == "auto" else given.precision,
        }
    )


def _notes(name: str, settings: EvaluateConfig) -> tuple[str, ...]:
    form = FORMS[name]
    best = (
        f"best_top1_of_looks is the best on the test images over every {LOOK_EVERY}th epoch and the last (the "
        "published code takes the best of all epochs)"
        if form.drifting
        else "best_top1 is the best of every epoch on the test images, as published"
    )
    encoder = (
        "The encoder's weights were frozen; its batch-norm statistics were not, as published."
        if form.drifting
        else "Every tensor of the encoder is bit-for-bit what it was before."
    )
    return (
        f"{name}, {settings.epochs} epochs in {settings.precision}: top1 and top5 are those of the last epoch; {best}, "
        "so it is selected on the test set.",
        encoder,
        "Test images are cropped as published: short side to 256 pixels, central 224, or in that proportion.",
    )


def build_classifier(form: LinearForm, num_features: int, num_classes: int) -> nn.Linear:
    """Return the form's initial linear layer, drawn from the global generator."""
    classifier = nn.Linear(num_features, num_classes)
    if form.small_init:
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)
    return classifier


def build_optimizer(form: LinearForm, settings: EvaluateConfig, params: list[nn.Parameter]) -> Optimizer:
    """Return the form's optimizer for the trainable parameters; the learning rate is set each epoch."""
    trainable = [parameter for parameter in params if parameter.requires_grad]
    assert len(trainable) == 2, f"{len(trainable)} trainable tensors; expected the classifier's weight and bias alone"
    decay = form.weight_decay if settings.weight_decay is None else settings.weight_decay
    if form.optimizer == "sgd":
        return SGD(trainable, lr=0.0, momentum=0.9, weight_decay=decay)
    return Adam(trainable, lr=0.0, weight_decay=decay)


def learning_rate(form: LinearForm, settings: EvaluateConfig, epoch: int, *, is_vit: bool) -> float:
    """Learning rate of an epoch, counted from 0, in the form's schedule; multiplied by batch size / 256 if scaled."""
    epochs = settings.epochs or form.epochs
    peak = settings.lr if settings.lr is not None else form.vit_lr if is_vit else form.lr
    peak *= (settings.batch_size or form.batch_size) / 256 if form.scaled else 1
    if form.schedule == "step":
        return peak * 0.1 ** sum(epoch >= round(share * epochs) for share in (0.6, 0.8))
    if form.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    return peak


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in chain(module.named_parameters(), module.named_buffers())}


def check_frozen(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Check that every parameter and buffer is bit-for-bit what it was.

    Raises:
        RuntimeError: one has changed; the message names the first.
    """
    for name, now in tensors_of(module).items():
        if not torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (now, before[name]))):
            raise RuntimeError(f"{name} of the frozen encoder changed while the classifier was trained; this is a bug")
