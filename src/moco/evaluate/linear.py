"""Linear classification on a frozen encoder, in the published forms; `fast`, on features at hand, is in `probe`.

`official` is MoCo v1 and v2's (arXiv:1911.05722, section 4.1), `v3` is MoCo v3's (arXiv:2104.02057, and its code),
`leftthomas` that of a much used CIFAR re-implementation of MoCo.
"""

import copy
import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from moco.config import EvaluateConfig
from moco.data import ArrayImages, BadImage, Images, Loader, epoch_order, resized
from moco.embed import features
from moco.encoder import ImageEncoder
from moco.evaluate.contract import HeldOut, Outcome, Task, accuracies
from moco.evaluate.probe import Settings, figures, probe
from moco.views import VIEWS, OneView, ViewSpec

LOOK_EVERY = 10
"""Epochs between looks at the test images where the encoder's statistics drift, so that each costs a pass over them."""


@dataclass(frozen=True)
class LinearForm:
    """A published way to train a linear classifier."""

    optimizer: Literal["sgd", "adam"]
    lr: float
    """Per 256 images."""
    vit_lr: float
    """The same for vision transformers."""
    batch_size: int
    epochs: int
    schedule: Literal["step", "cosine", "constant"]
    """`step`: a tenth from 60 % of the epochs on, a hundredth from 80 % on."""
    view: ViewSpec
    """What is done to training images; normalised as the encoder wants it."""
    small_init: bool = True
    """Weights from N(0, 0.01), biases 0; else as PyTorch's linear layer has it."""
    weight_decay: float = 0.0
    drifting: bool = False
    """The encoder is in training mode: batch statistics normalise, and the running ones, used for testing, drift."""


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
        drifting=True,
    ),
}


def evaluate(task: Task) -> Outcome:
    """The protocol: `settings.form`, or `fast`.

    Raises:
        ValueError: unknown form, projections in place of features, or images without labels.
        RuntimeError: the loss is not a number, or something frozen has changed.
    """
    name = task.settings.form or "fast"
    if name != "fast" and name not in FORMS:
        known = ["fast", *FORMS]
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"unknown form {name!r} of linear: expected one of {', '.join(known)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if task.settings.features != "features":
        raise ValueError("linear is defined on features; leave out --features, which is for --protocol knn")
    return _fast(task) if name == "fast" else _published(task, name)


def _fast(task: Task) -> Outcome:
    settings, held = task.settings, task.labelled()
    train, test = (
        features(
            task.encoder,
            images,
            precision=settings.precision,
            on_progress=lambda done, total, part=part: task.report(f"features of the {part} images", done, total),
        )
        for part, images in (("training", held.train), ("test", held.test))
    )
    asked = Settings(settings.lr, settings.weight_decay, settings.epochs, settings.batch_size, settings.seed)
    found = probe(train, held.train_labels, test, settings=asked, device=task.device)
    where = (
        "left at the default, for no class has two training images"
        if math.isnan(found.validation_top1)
        else "chosen on every tenth training image of each class, then trained on all"
    )
    note = f"Learning rate {found.lr:g} and weight decay {found.weight_decay:g}: {where}; no test image had a say."
    chosen = {name: value for name, value in figures(found).items() if not math.isnan(value)}
    return Outcome(chosen, found.scores, (note,))


def _published(task: Task, name: str) -> Outcome:
    form, settings, held, device = FORMS[name], task.settings, task.labelled(), task.device
    epochs, batch_size = settings.epochs or form.epochs, settings.batch_size or form.batch_size
    dtype = torch.float64 if settings.precision == "fp64" else torch.float32
    layout = torch.channels_last if settings.precision == "bf16" else torch.contiguous_format
    # A copy: it may drift, and the check below then speaks of what was really used.
    encoder = copy.deepcopy(task.encoder).to(dtype).to(memory_format=layout).train(form.drifting)
    before = tensors_of(encoder)
    spec = replace(form.view, mean=encoder.mean, std=encoder.std)
    read = _batches(held.train, OneView(spec, encoder.input_size, settings.seed), batch_size, settings.seed, device)
    labels, test_labels = held.train_labels.to(device), held.test_labels
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        classifier = build_classifier(form, encoder.num_features, _num_classes(held)).to(device, dtype)
        optimizer = build_optimizer(form, settings, [*encoder.parameters(), *classifier.parameters()])
        scores = _tester(task, form, encoder, classifier, held.test)
        best, last, steps = 0.0, torch.empty(0), math.ceil(len(held.train) / batch_size)
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(form, settings, epoch, is_vit=hasattr(encoder.backbone, "patch_embed"))
            total = torch.zeros((), device=device)
            for step, (views, ids) in enumerate(read(epoch)):
                if form.drifting and len(ids) == 1:
                    continue  # one image has no batch statistics
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                    inputs = encoder(views.to(dtype=dtype, memory_format=layout)).to(dtype)
                loss = F.cross_entropy(classifier(inputs), labels[ids.to(device)])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach()
                task.report("linear classifier, steps", epoch * steps + step + 1, epochs * steps)
            if not math.isfinite(total):
                lr = optimizer.param_groups[0]["lr"]
                raise RuntimeError(f"the loss is not a number in epoch {epoch} at learning rate {lr:g}; lower --lr")
            if not form.drifting or epoch + 1 == epochs or (epoch + 1) % LOOK_EVERY == 0:
                last = scores()
                best = max(best, accuracies(last, test_labels)["top1"])
    if not form.drifting:
        check_frozen(encoder, before)
    return Outcome({"best_top1": best}, last, _notes(name, epochs))


def _notes(name: str, epochs: int) -> tuple[str, ...]:
    form = FORMS[name]
    looks = f"every {LOOK_EVERY}th epoch and the last" if form.drifting else "every epoch"
    encoder = (
        "The encoder's weights were frozen; its batch-norm statistics were not, as published."
        if form.drifting
        else "Every tensor of the encoder is bit-equal to what it was before."
    )
    return (
        f"{name}, {epochs} epochs: top1 and top5 are of the last one; best_top1 is the best of {looks} on the test "
        "images, as it is published, and so chosen by them.",
        encoder,
    )


def _num_classes(held: HeldOut) -> int:
    return max(len(held.train.classes or ()), int(held.train_labels.max()) + 1)


def build_classifier(form: LinearForm, num_features: int, num_classes: int) -> nn.Linear:
    """A linear layer as the form begins with; drawn from the global generator."""
    classifier = nn.Linear(num_features, num_classes)
    if form.small_init:
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)
    return classifier


def build_optimizer(form: LinearForm, settings: EvaluateConfig, params: list[nn.Parameter]) -> Optimizer:
    """The form's optimizer of what is trainable; the rate is set each epoch."""
    trainable = [parameter for parameter in params if parameter.requires_grad]
    assert len(trainable) == 2, f"{len(trainable)} trainable tensors; expected the classifier's weight and bias alone"
    decay = form.weight_decay if settings.weight_decay is None else settings.weight_decay
    if form.optimizer == "sgd":
        return SGD(trainable, lr=0.0, momentum=0.9, weight_decay=decay)
    return Adam(trainable, lr=0.0, weight_decay=decay)


def learning_rate(form: LinearForm, settings: EvaluateConfig, epoch: int, *, is_vit: bool) -> float:
    """Of an epoch, counted from 0: the rate per 256 images x batch size / 256, along the form's schedule."""
    epochs = settings.epochs or form.epochs
    peak = settings.lr if settings.lr is not None else form.vit_lr if is_vit else form.lr
    peak *= (settings.batch_size or form.batch_size) / 256
    if form.schedule == "step":
        return peak * 0.1 ** sum(epoch >= round(share * epochs) for share in (0.6, 0.8))
    if form.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    return peak


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in chain(module.named_parameters(), module.named_buffers())}


def check_frozen(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """That every parameter and buffer has the very bits it had.

    Raises:
        RuntimeError: one has not; the first is named.
    """
    for name, now in tensors_of(module).items():
        if not torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (now, before[name]))):
            raise RuntimeError(f"{name} of the frozen encoder has changed while the classifier was trained; a bug")


def _tester(
    task: Task, form: LinearForm, encoder: ImageEncoder, classifier: nn.Linear, images: Images
) -> Callable[[], Float[Tensor, "m classes"]]:
    """What gives the scores of the test images; features that cannot change are computed once."""

    def found() -> Tensor:
        whole = features if form.drifting else cut_features
        return whole(encoder, images, precision=task.settings.precision)

    cached = None if form.drifting else found()

    @torch.no_grad()
    def scores() -> Tensor:
        vectors = found() if cached is None else cached
        return classifier(vectors.to(classifier.weight)).cpu()

    return scores


def cut_features(encoder: ImageEncoder, images: Images, *, precision: str) -> Float[Tensor, "n f"]:
    """Features of the centres: of 256 pixels of the short side the middle 224, or in this proportion at another size.

    Images in memory that are no larger than the encoder's size are taken as they are.
    """
    size = encoder.input_size
    small = isinstance(images, ArrayImages) and min(images.images.shape[2:]) <= size
    if small:
        return features(encoder, images, precision=precision)
    short, parts = round(size * 256 / 224), []
    margin = round((short - size) / 2)
    for which in torch.arange(len(images)).split(256):
        pixels = resized(images, which, size=short)[:, :, margin : margin + size, margin : margin + size]
        parts.append(features(encoder, ArrayImages(pixels, None, None, ()), precision=precision))
    return torch.cat(parts)


def _batches(
    images: Images, view: OneView, batch_size: int, seed: int, device: torch.device
) -> Callable[[int], Iterator[tuple[Tensor, Int64[Tensor, " n"]]]]:
    """From an epoch to its batches of (views, ids). All images come, so that the last batch may be smaller."""
    if isinstance(images, ArrayImages):
        pixels = images.images.to(device)

        def from_memory(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            for ids in epoch_order(len(images), seed=seed, epoch=epoch).split(batch_size):
                yield view(pixels[ids.to(device)], ids, epoch=epoch), ids

        return from_memory

    loader = None
    if len(images) >= batch_size:
        loader = Loader(images, batch_size=batch_size, seed=seed, device=device, crop=view.crop)

    def from_files(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        if loader:
            for crops, ids in loader.epoch(epoch):
                yield view.finish(crops.to(device, non_blocking=True), ids, epoch=epoch), ids
        # The loader drops what is less than a batch.
        rest = epoch_order(len(images), seed=seed, epoch=epoch)[len(images) // batch_size * batch_size :]
        read = [(each, id) for each, id in zip(images.decode_many(rest.tolist()), rest.tolist(), strict=True)]
        good = [(view.crop(each, id, epoch), id) for each, id in read if not isinstance(each, BadImage)]
        if good:
            ids = torch.tensor([id for _, id in good])
            yield view.finish(torch.stack([crop for crop, _ in good]).to(device), ids, epoch=epoch), ids

    return from_files
