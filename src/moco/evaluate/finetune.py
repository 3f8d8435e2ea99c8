"""Fine-tuning the whole network on some or all labels: what pre-training is worth to someone who has them.

Nothing is selected on the test images: settings are fixed beforehand, and results are those of the last epoch.
"""

import copy
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
from moco.evaluate.contract import Outcome, Protocol, Task, check_form, is_vit, labels_of, num_classes
from moco.evaluate.knn import projected
from moco.evaluate.reading import Batches, hold, read
from moco.method.backbones import build_backbone
from moco.method.encoder import ImageEncoder
from moco.method.optim import FUSED_DEVICES, learning_rate, resolved_lr
from moco.parallel.device import choose_precision
from moco.views.specs import ViewSpec
from moco.views.two_views import OneView

CROPS = ViewSpec(jitter_p=0.0, grey_p=0.0)
"""Crops and flips, the only augmentation; for a run's encoder, no stronger than in the run's own views."""
ASK_EVERY = 10
"""Steps between checks that the loss is finite, each of which waits for the device."""


@dataclass(frozen=True)
class FinetuneForm:
    """Settings for a kind of network; the learning rate follows a cosine down to 0.

    Attributes:
        optimizer: `sgd` uses Nesterov momentum of 0.9.
        lr: learning rate of the backbone, per 256 images.
        classifier: ratio of the linear classifier's learning rate to the backbone's.
        weight_decay: weight decay, not applied to biases and norms.
        layer_decay: factor between the learning rates of a layer and the one above it.
        batch_size: images per step; fewer if there are fewer in all.
        epochs: passes over the labelled images; more if that would be fewer than `min_steps` steps.
        min_steps: fewest steps.
        warmup: fraction of the epochs during which the learning rate rises from 0.
        crop_min: smallest fraction of an image's area that a crop keeps.
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
    # Learning rate, Nesterov and no weight decay: SimCLR (arXiv:2002.05709, appendix B.5), 30 epochs with 10 % of
    # ImageNet's labels. A classifier that learns faster than the trunk: SwAV (arXiv:2006.09882), 20 times with 10 %,
    # and others.
    "resnet": FinetuneForm("sgd", 0.05, 10.0, 0.0, 1.0, 128, 30),
    # Learning rate and weight decay: DeiT (arXiv:2012.12877), 5e-4 for 512 images, as for v3's own transformers.
    # Layer decay, warm-up and epochs: MAE (arXiv:2111.06377, table 9).
    "vit": FinetuneForm("adamw", 2.5e-4, 1.0, 0.05, 0.75, 256, 100, warmup=0.05),
}


class Plan(NamedTuple):
    """The settings of a fine-tuning, with every choice made."""

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
        """The plan as settings of an evaluation."""
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
        """Learning rate of the backbone's last layer."""
        per_epoch, batch = self.steps_per_epoch, self.batch_size
        return learning_rate(self.optim, step, steps_per_epoch=per_epoch, epochs=self.epochs, batch_size=batch)


def evaluate(task: Task) -> Outcome:
    """Run the protocol: train a copy of the encoder, batch norm included, with a linear classifier.

    Raises:
        ValueError: there are no labels or too few, or the form is not in `FINETUNE`.
        RuntimeError: the loss became NaN or infinite.
    """
    held, settings, encoder = task.labelled(), task.settings, task.encoder
    kind(settings.form, encoder)  # reports a wrong form before files are read
    source = hold(task, held.train)
    if len(source.images) < 2:
        raise ValueError("one labelled image is too few to learn from; raise --labels")
    plan = make_plan(task, len(source.images))
    spec = replace(CROPS, crop_scale=(plan.form.crop_min, 1.0), mean=encoder.mean, std=encoder.std)
    if task.views:  # images that may not be flipped or cropped small in pre-training may not be here either
        spec = replace(spec, flip=task.views[0].flip, crop_scale=task.views[0].crop_scale)
    batches = Batches(task, source, OneView(spec, encoder.input_size, settings.seed), plan.batch_size, whole=False)
    devices = [task.device] if task.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(settings.seed)
        network = trainable(encoder, from_scratch=settings.from_scratch)
        classifier = nn.Linear(encoder.num_features, num_classes(held))
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
    """Return the given form, or the default for this kind of network.

    Raises:
        ValueError: it is not in `FINETUNE`.
    """
    form = form or ("vit" if is_vit(encoder) else "resnet")
    check_form("finetune", form, list(FINETUNE))
    return form


PROTOCOL = Protocol(
    evaluate,
    frozenset({"form", "labels", "epochs", "lr", "weight_decay", "layer_decay", "from_scratch", "batch_size"}),
    default_form=lambda encoder: kind(None, encoder),
)


def make_plan(task: Task, num_images: int) -> Plan:
    """Return the form for this kind of network, with the settings applied."""
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
    """Return a trainable copy of the backbone, or the same network with random weights.

    All parameters are trained, including v3's frozen patch projection, except for computed position embeddings.
    """
    fresh = build_backbone(encoder.name, stem=encoder.stem, channels=encoder.channels)
    computed = {name for name, p in fresh.named_parameters() if name.endswith("pos_embed") and not p.requires_grad}
    network = fresh if from_scratch else copy.deepcopy(encoder.backbone)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in computed)
    return network


def layers(backbone: nn.Module) -> list[list[nn.Parameter]]:
    """All parameters by layer, from input to output: the stem, each block, and what follows the last block.

    Blocks are the modules in a sequence whose members all have children: residual blocks, transformer blocks. In a
    network without such sequences, each child is a layer, and nothing follows the last.
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
    """Parameter groups for an optimizer, each with its `rate`: a factor on the learning rate of the last layer.

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
    for batch, ids, _ in chain.from_iterable(map(batches, range(plan.epochs))):
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
                    f"the loss became NaN or infinite by step {done} of {plan.steps}; lower --lr (it was "
                    f"{plan.optim.base_lr:g} per 256 images), or use --precision fp32"
                )
            task.report("training", done, plan.steps)


def _optimizer(plan: Plan, groups: list[dict[str, Any]]) -> Optimizer:
    lr, decay = plan.optim.base_lr, plan.optim.weight_decay  # the learning rate is set again at every step
    fused = all(p.device.type in FUSED_DEVICES for group in groups for p in group["params"]) or None
    if plan.form.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr, weight_decay=decay, fused=fused)
    return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True, weight_decay=decay, fused=fused)


def _said(task: Task, plan: Plan, num_images: int) -> str:
    start = "random weights" if task.settings.from_scratch else "the pre-trained weights"
    rate = f"learning rate {resolved_lr(plan.optim, plan.batch_size):g}"
    return (
        f"From {start}: {num_images:,} labelled images, {plan.epochs} epochs of batches of {plan.batch_size}, "
        f"{plan.steps:,} steps of {plan.form.optimizer.upper()}; {rate} for the backbone, {plan.form.classifier:g} "
        f"times that for the classifier, layer decay {plan.layer_decay:g}, weight decay {plan.optim.weight_decay:g}; "
        f"{plan.precision}. Test images are resized by the short side, then centre-cropped to a square."
    )
