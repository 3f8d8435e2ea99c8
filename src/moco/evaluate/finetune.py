"""The whole network learns from labels, from few or from all: what pre-training is worth to someone who has them.

Nothing is chosen by the test images: settings are fixed beforehand, and the last epoch is what is reported.
"""

import copy
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn
from torch.optim import Optimizer

from moco.config import OptimConfig
from moco.encoder import ImageEncoder, build_backbone
from moco.engine import choose_precision
from moco.evaluate.contract import HeldOut, Outcome, Protocol, Task, labels_of
from moco.evaluate.knn import projected
from moco.evaluate.reading import Batches, hold, read
from moco.optim import FUSED_DEVICES, learning_rate, resolved_lr
from moco.views import OneView, ViewSpec

CROPS = ViewSpec(jitter_p=0.0, grey_p=0.0)
"""Crops and flips, the only augmentation; of a run's encoder, as far as the run's own views go."""
ASK_EVERY = 10
"""Steps after which the device is asked whether the loss is still a number."""


@dataclass(frozen=True)
class FinetuneForm:
    """Settings of a kind of network; the rate falls to 0 along a cosine.

    Attributes:
        optimizer: SGD has Nesterov's momentum of 0.9.
        lr: of the backbone, per 256 images.
        classifier: the linear classifier's rate over the backbone's.
        weight_decay: on weights; biases and norms are spared.
        layer_decay: each layer learns at so many times the rate of the one above it.
        batch_size: images per step; fewer if there are fewer.
        epochs: passes over the labelled images; more where they are so few that it would be under `min_steps`.
        min_steps: see `epochs`.
        warmup: share of the epochs in which the rate rises from 0.
        crop_min: smallest share of an image's area that is kept.
    """

    optimizer: Literal["sgd", "adamw"]
    lr: float
    classifier: float
    weight_decay: float
    layer_decay: float
    batch_size: int
    epochs: int
    min_steps: int = 2_000
    warmup: float = 0.0
    crop_min: float = 0.2


FINETUNE: Mapping[str, FinetuneForm] = {
    # Rate, Nesterov and no weight decay: SimCLR (arXiv:2002.05709, appendix B.5), 30 epochs with 10 % of ImageNet's
    # labels. A classifier that learns faster than the trunk: SwAV (arXiv:2006.09882), 20 times with 10 %, and others.
    "resnet": FinetuneForm("sgd", 0.05, 10.0, 0.0, 1.0, 128, 30),
    # Rate and weight decay: DeiT (arXiv:2012.12877), 5e-4 for 512 images, with which v3's transformers were fine-tuned.
    # Layer decay, warm-up and epochs: MAE (arXiv:2111.06377, table 9).
    "vit": FinetuneForm("adamw", 2.5e-4, 1.0, 0.05, 0.75, 256, 100, warmup=0.05),
}


class Plan(NamedTuple):
    """What is going to be done."""

    name: str
    form: FinetuneForm
    optim: OptimConfig
    layer_decay: float
    batch_size: int
    epochs: int
    steps_per_epoch: int
    precision: str

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def in_force(self) -> dict[str, Any]:
        """As settings of an evaluation."""
        return {
            "form": self.name,
            "epochs": self.epochs,
            "lr": self.optim.base_lr,
            "weight_decay": self.optim.weight_decay,
            "layer_decay": self.layer_decay,
            "batch_size": self.batch_size,
            "precision": self.precision,
        }

    def lr(self, step: int) -> float:
        """Of the backbone's last layer."""
        per_epoch, batch = self.steps_per_epoch, self.batch_size
        return learning_rate(self.optim, step, steps_per_epoch=per_epoch, epochs=self.epochs, batch_size=batch)


def evaluate(task: Task) -> Outcome:
    """The protocol: a copy of the encoder and a linear classifier learn the labelled images; batch norm does, too.

    Raises:
        ValueError: no labels, too few of them, or a form that is not in `FINETUNE`.
        RuntimeError: the loss is no longer a number.
    """
    held, settings, encoder = task.labelled(), task.settings, task.encoder
    kind(settings.form, encoder)  # a wrong one is answered before files are read
    source = hold(task, held.train)
    if len(source.images) < 2:
        raise ValueError("one labelled image is too few to learn from; raise --labels")
    plan = make_plan(task, len(source.images))
    spec = replace(CROPS, crop_scale=(plan.form.crop_min, 1.0), mean=encoder.mean, std=encoder.std)
    if task.views:  # what may not be flipped or cut small in pre-training may not be here
        spec = replace(spec, flip=task.views[0].flip, crop_scale=task.views[0].crop_scale)
    batches = Batches(task, source, OneView(spec, encoder.input_size, settings.seed), plan.batch_size, whole=False)
    devices = [task.device] if task.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(settings.seed)
        network = trainable(encoder, from_scratch=settings.from_scratch)
        classifier = nn.Linear(encoder.num_features, _num_classes(held))
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)
        dtype = torch.float64 if plan.precision == "fp64" else torch.float32
        for module in (network, classifier):
            module.to(task.device, dtype)
        _train(task, plan, network, classifier, batches, labels_of(source.images))
    tuned = ImageEncoder(
        network,
        name=encoder.name,
        stem=encoder.stem,
        channels=encoder.channels,
        mean=encoder.mean,
        std=encoder.std,
        input_size=encoder.input_size,
    )
    test = read(task, held.test, "test", encoder=tuned.eval(), precision=plan.precision)
    notes = (_said(task, plan, len(source.images)), *batches.notes, *test.notes)
    scores = projected(classifier, test.vectors)
    return Outcome({}, scores, notes, labels_of(test.images), settings.model_copy(update=plan.in_force))


def kind(form: str | None, encoder: ImageEncoder) -> str:
    """The form that is named, or that of this kind of network.

    Raises:
        ValueError: it is not in `FINETUNE`.
    """
    form = form or ("vit" if hasattr(encoder.backbone, "patch_embed") else "resnet")
    if form not in FINETUNE:
        near = difflib.get_close_matches(form, FINETUNE, n=1)
        raise ValueError(
            f"unknown form {form!r} of finetune: expected one of {', '.join(FINETUNE)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return form


PROTOCOL = Protocol(
    evaluate,
    frozenset({"form", "labels", "epochs", "lr", "weight_decay", "layer_decay", "from_scratch", "batch_size"}),
    default_form=lambda encoder: kind(None, encoder),
)


def make_plan(task: Task, num_images: int) -> Plan:
    """The form of this kind of network, with what the settings say in its place."""
    settings = task.settings
    name = kind(settings.form, task.encoder)
    form = FINETUNE[name]
    batch = min(settings.batch_size or form.batch_size, num_images)
    per_epoch = num_images // batch
    epochs = settings.epochs or max(form.epochs, math.ceil(form.min_steps / per_epoch))
    optim = OptimConfig(
        name=form.optimizer,
        base_lr=form.lr if settings.lr is None else settings.lr,
        weight_decay=form.weight_decay if settings.weight_decay is None else settings.weight_decay,
        warmup_epochs=form.warmup * epochs,
    )
    decay = form.layer_decay if settings.layer_decay is None else settings.layer_decay
    precision = choose_precision(task.device.type) if settings.precision == "auto" else settings.precision
    return Plan(name, form, optim, decay, batch, epochs, per_epoch, precision)


def trainable(encoder: ImageEncoder, *, from_scratch: bool) -> nn.Module:
    """A copy of the backbone, or one at its random start, that learns.

    All of it does, a frozen patch projection of v3 as well; only positions that are computed stay as they are.
    """
    fresh = build_backbone(encoder.name, stem=encoder.stem, channels=encoder.channels)
    computed = {name for name, p in fresh.named_parameters() if name.endswith("pos_embed") and not p.requires_grad}
    network = fresh if from_scratch else copy.deepcopy(encoder.backbone)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in computed)
    return network


def layers(backbone: nn.Module) -> list[list[nn.Parameter]]:
    """All parameters, from the images to the features: the stem, block after block, what follows the last block.

    Blocks are the parts of a sequence of modules that have parts themselves: residual blocks, transformer blocks. A
    network without such sequences has a layer for each of its parts, and nothing after them.
    """
    stem, blocks, loose = list(backbone.parameters(recurse=False)), [], []
    for child in backbone.children():
        if isinstance(child, nn.Sequential | nn.ModuleList) and all(any(part.children()) for part in child):
            (blocks[-1] if blocks else stem).extend(loose)
            loose = []
            blocks += [list(block.parameters()) for block in child]
        else:
            loose += child.parameters()
    if blocks:
        return [stem, *blocks, loose]
    parts = [list(child.parameters()) for child in backbone.children()]
    return [each for each in (stem, *parts) if each] + [[]]


def parameter_groups(backbone: nn.Module, classifier: nn.Module, *, form: FinetuneForm, decay: float) -> list[dict]:
    """Groups for an optimizer, each with its `rate`: how many times the rate of what follows the last block it has.

    Layer i of n, counted from 0, has `decay ** (n - 1 - i)`.
    """
    parts = layers(backbone)
    rated = [(params, decay ** (len(parts) - 1 - place)) for place, params in enumerate(parts)]
    rated.append((list(classifier.parameters()), form.classifier))
    groups: list[dict[str, Any]] = []
    for params, rate in rated:
        matrices = [p for p in params if p.requires_grad and p.ndim > 1]
        vectors = [p for p in params if p.requires_grad and p.ndim <= 1]
        groups += [{"params": matrices, "rate": rate}] if matrices else []
        groups += [{"params": vectors, "rate": rate, "weight_decay": 0.0}] if vectors else []
    return groups


def _train(
    task: Task,
    plan: Plan,
    network: nn.Module,
    classifier: nn.Module,
    batches: Batches,
    labels: Int64[Tensor, " n"],
) -> None:
    device, done = task.device, 0
    labels = labels.to(device)
    optimizer = _optimizer(plan, parameter_groups(network, classifier, form=plan.form, decay=plan.layer_decay))
    layout = torch.channels_last if plan.precision == "bf16" else torch.contiguous_format
    network.train().to(memory_format=layout)
    running = torch.zeros((), device=device)
    for batch, ids in chain.from_iterable(map(batches, range(plan.epochs))):
        for group in optimizer.param_groups:
            group["lr"] = plan.lr(done) * group["rate"]
        batch = batch.to(next(classifier.parameters()).dtype, memory_format=layout)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=plan.precision == "bf16"):
            scores = classifier(network(batch))
        loss = F.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), labels[ids.to(device)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done, running = done + 1, running + loss.detach().float()
        if done % ASK_EVERY == 0 or done == plan.steps:
            if not running.isfinite():
                raise RuntimeError(
                    f"the loss is not a number before step {done} of {plan.steps}; lower --lr (it was "
                    f"{plan.optim.base_lr:g} per 256 images), or use --precision fp32"
                )
            task.report("training", done, plan.steps)


def _optimizer(plan: Plan, groups: list[dict[str, Any]]) -> Optimizer:
    lr, decay = plan.optim.base_lr, plan.optim.weight_decay  # the rate is set anew at every step
    fused = all(p.device.type in FUSED_DEVICES for group in groups for p in group["params"]) or None
    if plan.form.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr, weight_decay=decay, fused=fused)
    return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True, weight_decay=decay, fused=fused)


def _num_classes(held: HeldOut) -> int:
    return len(held.train.classes or ()) or 1 + int(max(held.train_labels.max(), held.test_labels.max()))


def _said(task: Task, plan: Plan, num_images: int) -> str:
    start = "random weights" if task.settings.from_scratch else "the pre-trained weights"
    rate = f"learning rate {resolved_lr(plan.optim, plan.batch_size):g}"
    return (
        f"From {start}: {num_images:,} labelled images, {plan.epochs} epochs of batches of {plan.batch_size}, "
        f"{plan.steps:,} steps of {plan.form.optimizer.upper()}; {rate} for the backbone, {plan.form.classifier:g} "
        f"times that for the classifier, layer decay {plan.layer_decay:g}, weight decay {plan.optim.weight_decay:g}; "
        f"{plan.precision}. Test images are seen whole but for what is longer than the short side."
    )
