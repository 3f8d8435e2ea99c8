"""What a run is made of: frozen sections whose attribute docstrings are the command line's help.

Nothing here imports torch, so that help, unknown flags and wrong values answer at once.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from moco.explain import explain

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A frozen group of settings; an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which images, and how they are read."""

    source: Annotated[str, Field(min_length=1)] = "digits"
    """`digits`, `cifar10`, `cifar100`, `imagenet`, a folder (with class subfolders, without, `train/` +
    `test/`), tar shards, a URL of such, or `hf:NAME`."""
    size: Count | None = None
    """Side in pixels at which images are looked at when features are taken; not given: that of the views."""
    channels: Annotated[int, Field(gt=0, le=1024)] = 3
    """Channels the encoder sees; grey images are repeated to 3, colour ones averaged to 1. Any other number: arrays of
    so many."""
    memory: Annotated[float, Field(gt=0)] = 2.0
    """GiB that decoded images may take; a larger set is read from disk at every epoch."""
    cache: Path | None = None
    """Folder to keep decoded images in, shrunk to `cache_side`; not given: files are decoded at every epoch."""
    cache_side: Count = 256
    """Short side in pixels that cached images are shrunk to; smaller ones stay as they are."""
    max_bad: Fraction = 0.01
    """Largest fraction of unreadable files that is skipped; above it the run stops with the list."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Reading processes per device for sets that do not fit `memory`; not given: from the machine's cores."""


class ViewsConfig(Section):
    """How one image becomes two views."""

    recipe: str = "digits"
    """Augmentation by name: `v1`, `v2`, `v3`, `cifar`, `digits`, or `package.module:function`."""
    size: Count = 16
    """Side of a view in pixels."""
    crop_min: Annotated[float, Field(gt=0, le=1)] | None = None
    """Smallest share of the image's area that a crop keeps; not given: the recipe's."""


class ModelConfig(Section):
    """The encoder, its head, and how keys are kept."""

    variant: str = "v2"
    """`v1` (linear head), `v2` (two-layer head) or `v3` (no queue, predictor, symmetric loss)."""
    backbone: str = "resnet50"
    """A timm or torchvision name, or `vit-small-v3`, `vit-base-v3`, `vit-conv-small-v3`, `vit-conv-base-v3`."""
    stem: Literal["imagenet", "small", "small-pad2", "small-linear"] = "imagenet"
    """`small`: a ResNet's with a 3x3/1 convolution, no pooling (under 64 pixels); two odd ones: docs/checkpoints.md."""
    pretrained: bool = False
    """Start the backbone from timm's published weights."""
    head: Literal["variant", "linear", "mlp", "mlp_bn"] = "variant"
    """Projector; `variant` takes the one of the paper, `mlp_bn` is a two-layer one with batch norm between."""
    hidden_dim: Count | None = None
    """Width of the head's hidden layers; not given: the features' for v2, 512 for `mlp_bn`, 4096 for v3."""
    dim: Count = 128
    """Length of a projection."""
    queue_size: Annotated[int, Field(ge=0)] = 65536
    """Keys kept as negatives, K; 0 for v3, which has no queue."""
    temperature: Annotated[float, Field(gt=0)] = 0.2
    """Divides the cosine similarities before the softmax."""
    symmetric: bool = False
    """Queue variants: add the loss with the two views exchanged. v3 always does."""
    momentum: Fraction = 0.999
    """Fraction of the key encoder that is kept at each update."""
    momentum_schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` raises the momentum to 1 at the end of training (v3)."""
    batchnorm: Literal["auto", "split", "shuffle", "sync", "plain"] = "auto"
    """Statistics that do not leak: `split` on one device, `shuffle` across several, `sync` for v3."""
    bn_splits: Count = 8
    """Groups per device that `split` takes its statistics over."""
    mask_own: bool | None = None
    """Leave an image's own older keys out of its negatives; not given: if the queue is over 10 % of the images."""


class OptimConfig(Section):
    """The optimizer and its learning rate."""

    name: Literal["sgd", "lars", "adam", "adamw"] = "sgd"
    """Adam's weight decay is of the L2 form, AdamW's is decoupled; LARS spares biases and norms."""
    base_lr: Annotated[float, Field(ge=0)] = 0.03
    """Learning rate per 256 images; `lr_scaling` turns it into the rate in force."""
    lr_scaling: Literal["linear", "none"] = "linear"
    """`linear`: lr = base_lr x batch_size / 256. `none`: lr = base_lr."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """On all trainable parameters, as the references do; LARS spares biases and norms."""
    momentum: Fraction = 0.9
    """Of SGD and LARS."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    milestones: tuple[int, ...] = ()
    """Epochs at which `step` multiplies the rate by 0.1."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs of linear rise from 0."""
    per: Literal["step", "epoch"] = "step"
    """Whether the rate changes at every step or once an epoch."""
    first_epoch: Literal[0, 1] = 0
    """How a per-epoch schedule counts: the official ImageNet code from 0, its CIFAR notebook from 1."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient; not given: not clipped."""
    accumulate: Count = 1
    """Parts that each batch is worked through in; queue and key encoder move once a step."""


class MonitorConfig(Section):
    """What is watched while training."""

    every: Annotated[int, Field(ge=0)] = 1
    """Epochs between kNN evaluations; 0: only before and after."""
    split: Literal["heldout", "test"] = "heldout"
    """Whose labels: each tenth training image against the others (chooses `best`), or the test images, as published."""
    knn_k: Count = 200
    """Neighbours that vote."""
    knn_temperature: Annotated[float, Field(gt=0)] = 0.1
    """A neighbour's vote is exp(similarity / temperature)."""
    log_every: Count = 10
    """Steps between rows of metrics.csv; the device is asked for numbers only then."""
    save_every: Annotated[float, Field(gt=0)] = 60.0
    """Seconds between checkpoints; one is also written at the end and on Ctrl-C and SIGTERM."""
    loggers: tuple[Literal["tensorboard"], ...] = ()
    """Besides metrics.csv; needs the extra of that name: `pip install moco-ssl[tensorboard]`."""


class EngineConfig(Section):
    """Where it runs, and in which arithmetic."""

    accelerator: str = "auto"
    """`cpu`, `cuda`, `mps`, or any accelerator Lightning Fabric knows."""
    devices: Count | Literal["auto"] = "auto"
    """Processes per node, one a device; `auto`: all devices there are, one process on CPU. torchrun and SLURM say."""
    nodes: Count = 1
    """Machines; torchrun and SLURM say."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """Of the encoder's arithmetic; weights, logits and averages stay fp32. `auto`: bf16 where it is fast."""
    channels_last: bool | None = None
    """Memory layout of the encoder; not given: where it measured faster."""
    compile: bool = False
    """torch.compile the encoders; never needed for correctness."""
    threads: Count | None = None
    """CPU threads of a process; not given: torch's choice, shared. Stored in the run, for bit-equal resume."""
    deterministic: bool = False
    """Only algorithms that give the same bits each time (CUDA; CPU always does)."""


class EvaluateConfig(Section):
    """How an encoder is measured; what is not given is the published setting of the protocol.

    A setting that the protocol does not look at is refused; which each takes stands with it.
    """

    form: str | None = None
    """Of `linear`: `fast`, `official`, `v3` or `leftthomas`, not given `fast`; of `finetune`: `resnet` or `vit`."""
    features: Literal["features", "projection"] = "features"
    """`knn`: what it looks at, the backbone's output or the projector's, which runs of this program hold."""
    k: Count | None = None
    """`knn`: neighbours that vote; not given: as in the run, or 200."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """`knn`: a neighbour's vote is exp(similarity / temperature); not given: as in the run, or 0.1."""
    labels: Annotated[float, Field(gt=0, le=1)] = 1.0
    """All but `health`: fraction of the training labels that is used: as many of each class, chosen by the seed."""
    epochs: Count | None = None
    """`linear`, `finetune`: passes over the labelled images."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """`linear`, `finetune`: rate per 256 images; of `leftthomas` as it is; of `fast` 1 is as fast as is safe."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """`linear` in every form, `finetune`: in place of the form's; of `fast` in place of a choice among six."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """`finetune`: each layer learns at so many times the rate of the one above it; not given: the form's."""
    from_scratch: bool = False
    """`finetune`: start the same network at random, to see what the pre-training is worth."""
    batch_size: Annotated[int, Field(ge=2)] | None = None
    """`linear`, `finetune`: images per step."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Everything random follows from it."""
    accelerator: str = "auto"
    """`cpu`, `cuda`, `mps`; `auto`: the fastest that is there."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """Of the encoder's arithmetic; `auto`: fp32 for published forms of `linear`, else the run's, or bf16 if fast."""


class PretrainConfig(Section):
    """One pre-training run, whole."""

    recipe: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = "custom"
    """Name of the recipe this came from."""
    seed: Annotated[int, Field(ge=-(2**32), le=2**32)] = 0
    """Everything random follows from it."""
    epochs: Count = 100
    """Passes over the training images."""
    steps: Count | None = None
    """Stop after this many steps; the schedules still span `epochs`. Not given: never."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images per step over all devices."""
    init_from: Annotated[str, Field(min_length=1)] | None = None
    """Start the backbone from a checkpoint of anybody's: a file, or the folder of a run."""
    data: DataConfig = DataConfig()
    views: ViewsConfig = ViewsConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    monitor: MonitorConfig = MonitorConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "PretrainConfig":
        check(self)
        return self


CONTINUABLE = (
    "steps",
    "data.source",
    "data.workers",
    "data.cache",
    "data.max_bad",
    "monitor.save_every",
    "engine.accelerator",
    "engine.devices",
    "engine.nodes",
    "engine.threads",
)
"""What may differ when a run is continued: where and how often, never what is computed."""


def check(config: PretrainConfig) -> None:
    """Refuse settings that are fine one by one and impossible together.

    Raises:
        ValueError: what was given, what was expected and which flag to change, in one line.
    """
    model, optim, batch = config.model, config.optim, config.batch_size
    if model.variant == "v3" and model.queue_size:
        raise ValueError(f"model.queue_size is {model.queue_size}; v3 has no queue: give --model.queue_size 0")
    if model.variant in ("v1", "v2"):
        keys = batch * (2 if model.symmetric else 1)
        if model.queue_size < keys:
            what = "2 x batch_size, as the loss is symmetric" if model.symmetric else "batch_size"
            raise ValueError(
                f"model.queue_size is {model.queue_size}; expected at least the {keys} keys of one step ({what}): "
                "raise --model.queue_size or lower --batch_size"
            )
    if optim.schedule == "step" and not optim.milestones:
        raise ValueError("optim.milestones is empty; the step schedule needs epochs: give --optim.milestones 120 160")
    if optim.warmup_epochs >= config.epochs:
        raise ValueError(
            f"optim.warmup_epochs is {optim.warmup_epochs:g}; expected less than the run's {config.epochs} epochs: "
            "lower --optim.warmup_epochs or raise --epochs"
        )
    devices = config.engine.nodes * (1 if config.engine.devices == "auto" else config.engine.devices)
    if batch % (devices * optim.accumulate):
        raise ValueError(
            f"batch_size is {batch}; expected a multiple of {devices * optim.accumulate} "
            "(devices x optim.accumulate): change --batch_size or --optim.accumulate"
        )
    part = batch // (devices * optim.accumulate)
    split = model.batchnorm == "split" or (model.batchnorm == "auto" and model.variant != "v3" and devices == 1)
    if split and part < 2 * model.bn_splits:
        raise ValueError(
            f"model.bn_splits is {model.bn_splits}; expected at least 2 of a forward pass's {part} images in each "
            "group: lower --model.bn_splits or raise --batch_size"
        )


def parse_evaluation(data: dict[str, Any]) -> EvaluateConfig:
    """Plain settings of an evaluation, checked; errors as `parse_config`."""
    try:
        return EvaluateConfig.model_validate(data)
    except ValidationError as error:
        raise ValueError(explain(error, list(EvaluateConfig.model_fields))) from None


def fields(section: type[BaseModel] = PretrainConfig, prefix: str = "") -> dict[str, FieldInfo]:
    """All settings by their dotted names, in the order of the file."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= fields(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def parse_config(data: dict[str, Any]) -> PretrainConfig:
    """Nested plain settings to a checked configuration.

    Args:
        data: what a YAML holds, or part of it; the rest takes its defaults.

    Raises:
        ValueError: one line with the dotted name, what was given, what was expected; for an unknown name the closest.

    Example:
        >>> parse_config({"epochs": 5, "optim": {"base_lr": 0.06}}).optim.base_lr
        0.06
    """
    try:
        return PretrainConfig.model_validate(data)
    except ValidationError as error:
        raise ValueError(explain(error, list(fields()))) from None


def merge(config: PretrainConfig, overrides: dict[str, Any]) -> PretrainConfig:
    """The configuration with some settings replaced, checked as a whole.

    Args:
        config: where everything else comes from.
        overrides: nested, only what is to change: `{"optim": {"base_lr": 0.06}}`.

    Raises:
        ValueError: as `parse_config`.
    """
    return parse_config(_merged(config.model_dump(), overrides))


def to_yaml(config: PretrainConfig) -> str:
    """Every setting as YAML, without comments; `load_recipe` reads it back to an equal configuration."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for name, value in above.items():
        old = result.get(name)
        result[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
