"""The settings, in frozen sections whose attribute docstrings are the command line's help."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A frozen group of settings; an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which images, and how they are read."""

    source: Annotated[str, Field(min_length=1)] = "digits"
    """`digits`, `cifar10`, `cifar100`, `stl10`, `imagenet`; a folder of images (with class subfolders, without, or
    `train/` + `test/`); a list of image files (.csv, .tsv, .parquet); an array file (.npy, .npz, .pt); tar shards, here
    or at a URL; or `hf:NAME`."""
    size: Count | None = None
    """Side in pixels that images are resized to for feature extraction; default: the size of the views."""
    channels: Annotated[int, Field(gt=0, le=1024)] = 3
    """Channels of the encoder's input. Grey images are repeated to 3 channels, colour images averaged to 1; any other
    number requires arrays with that many channels."""
    memory: Annotated[float, Field(gt=0)] = 2.0
    """Memory in GiB for decoded images; a larger set is read from disk in every epoch."""
    cache: Path | None = None
    """Folder for decoded images, shrunk to `cache_side`; default: files are decoded in every epoch."""
    cache_side: Count = 256
    """Short side in pixels that cached images are shrunk to; smaller ones keep their size."""
    max_bad: Fraction = 0.01
    """Largest fraction of unreadable files to skip; above it the run stops and lists them."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Reader processes per device for sets larger than `memory`; default: chosen from the number of cores."""


class ViewsConfig(Section):
    """How one image becomes two views."""

    recipe: str = "digits"
    """Augmentation by name: `v1`, `v2`, `v3`, `cifar`, `digits`, or `package.module:function`."""
    size: Count = 16
    """Side of a view in pixels."""
    crop_min: Annotated[float, Field(gt=0, le=1)] | None = None
    """Smallest fraction of the image's area that a crop keeps; not given: the recipe's."""


class ModelConfig(Section):
    """The encoder, its head and the queue."""

    variant: str = "v2"
    """`v1` (linear head), `v2` (two-layer head) or `v3` (no queue, predictor, symmetric loss)."""
    backbone: str = "resnet50"
    """A timm or torchvision name, or `vit-small-v3`, `vit-base-v3`, `vit-conv-small-v3`, `vit-conv-base-v3`."""
    stem: Literal["imagenet", "small", "small-pad2", "small-linear"] = "imagenet"
    """`small`: 3x3/1 convolution, no pooling (images under 64 pixels). Last two: see docs/checkpoints.md."""
    pretrained: bool = False
    """Start the backbone from timm's pretrained weights."""
    head: Literal["variant", "linear", "mlp", "mlp_bn"] = "variant"
    """Projector. `variant`: the one from the variant's paper; `mlp_bn`: two layers with batch norm between them."""
    hidden_dim: Count | None = None
    """Width of the head's hidden layers; not given: that of the features for v2, 512 for `mlp_bn`, 4096 for v3."""
    dim: Count = 128
    """Dimension of the projections."""
    queue_size: Annotated[int, Field(ge=0)] = 65536
    """Number of keys kept as negatives, K; 0 for v3, which has no queue."""
    temperature: Annotated[float, Field(gt=0)] = 0.2
    """Divides the cosine similarities before the softmax."""
    symmetric: bool = False
    """v1 and v2: add the loss with the two views swapped. v3 always does."""
    momentum: Fraction = 0.999
    """Fraction of the key encoder that is kept at each update."""
    momentum_schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` raises the momentum to 1 at the end of training (v3)."""
    batchnorm: Literal["auto", "split", "shuffle", "sync", "plain"] = "auto"
    """Batch statistics that leak nothing. `auto`: `split` on one device, `shuffle` on several, `sync` for v3."""
    bn_splits: Count = 8
    """Groups per device over which `split` computes its statistics."""
    mask_own: bool | None = None
    """Exclude an image's own older keys from its negatives; not given: if the queue exceeds 10 % of the images."""


class OptimConfig(Section):
    """The optimizer and its learning rate."""

    name: Literal["sgd", "lars", "adam", "adamw"] = "sgd"
    """Weight decay is L2 in `adam` and decoupled in `adamw`; `lars` neither adapts nor decays biases and norms."""
    base_lr: Annotated[float, Field(ge=0)] = 0.03
    """Learning rate per 256 images; see `lr_scaling` for the rate that is used."""
    lr_scaling: Literal["linear", "none"] = "linear"
    """`linear`: lr = base_lr x batch_size / 256. `none`: lr = base_lr."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Applied to all trainable parameters, as in the reference code; `lars` leaves out biases and norms."""
    momentum: Fraction = 0.9
    """Momentum of SGD and LARS."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    milestones: tuple[int, ...] = ()
    """Epochs at which `step` multiplies the learning rate by 0.1."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs over which the learning rate rises linearly from 0."""
    per: Literal["step", "epoch"] = "step"
    """Whether the learning rate changes at every step or once per epoch."""
    first_epoch: Literal[0, 1] = 0
    """First epoch of a per-epoch schedule: 0 in the official ImageNet code, 1 in its CIFAR notebook."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient; not given: no clipping."""
    accumulate: Count = 1
    """Gradient accumulation: parts per batch; queue and key encoder still update once per step."""


class MonitorConfig(Section):
    """What is measured and saved during training."""

    every: Annotated[int, Field(ge=0)] = 1
    """Epochs between kNN evaluations; 0: only before and after training."""
    split: Literal["heldout", "test"] = "heldout"
    """kNN on `heldout`: every tenth training image against the rest (selects `best`); `test`: the test images."""
    knn_k: Count = 200
    """Number of neighbours that vote."""
    knn_temperature: Annotated[float, Field(gt=0)] = 0.1
    """A neighbour's vote is exp(similarity / temperature)."""
    log_every: Count = 10
    """Steps between rows of metrics.csv; metrics stay on the device until then."""
    save_every: Annotated[float, Field(gt=0)] = 60.0
    """Seconds between checkpoints; one is also written at the end, and on Ctrl-C and SIGTERM."""
    loggers: tuple[Literal["tensorboard"], ...] = ()
    """Loggers besides metrics.csv; each needs the extra of its name: `pip install "moco-ssl[tensorboard]"`."""


class EngineConfig(Section):
    """Where training runs, and in which precision."""

    accelerator: str = "auto"
    """`cpu`, `cuda`, `mps`, or any other accelerator that Lightning Fabric supports."""
    devices: Count | Literal["auto"] = "auto"
    """Processes per node, one per device; `auto`: all devices, but 1 on CPU and in a notebook. Under torchrun or SLURM,
    set by them."""
    nodes: Count = 1
    """Number of machines. Under torchrun or SLURM, set by them."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """Precision of the encoder; weights, logits and averages stay fp32. `auto`: bf16 where it is fast."""
    channels_last: bool | None = None
    """Use the channels_last memory layout in the encoder; not given: with bf16, where it measured faster."""
    compile: bool = False
    """Compile the encoders with torch.compile; never needed for correctness."""
    threads: Count | None = None
    """CPU threads per process; not given: torch's default, divided among processes. Kept on resume, to be bit-exact."""
    deterministic: bool = False
    """Use only deterministic algorithms on CUDA; those on the CPU always are."""


class EvaluateConfig(Section):
    """How an encoder is evaluated; settings not given are those published for the protocol.

    A setting that the protocol does not use is refused; each description names the protocols that use it.
    """

    form: str | None = None
    """`linear`: `fast` (the default), `official`, `v3` or `leftthomas`; `finetune`: `resnet` or `vit`."""
    features: Literal["features", "projection"] = "features"
    """`knn`: compare the output of the backbone or of the projector, which only runs of this program have."""
    k: Count | None = None
    """`knn`: number of neighbours that vote; not given: as in the run, or 200."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """`knn`: a neighbour's vote is exp(similarity / temperature); not given: as in the run, or 0.1."""
    labels: Annotated[float, Field(gt=0, le=1)] = 1.0
    """All but `health`: fraction of the training labels to use, the same number of each class, drawn with the seed."""
    epochs: Count | None = None
    """`linear`, `finetune`: passes over the labelled images."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """`linear`, `finetune`: learning rate per 256 images. `leftthomas`: not scaled; `fast`: 1 is the largest safe."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """`linear`, `finetune`: weight decay; not given: the form's, or, for `fast`, the best of six."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """`finetune`: factor between the learning rates of a layer and the one above it; not given: the form's."""
    from_scratch: bool = False
    """`finetune`: start the same network from random weights, to see what pre-training is worth."""
    batch_size: Annotated[int, Field(ge=2)] | None = None
    """`linear`, `finetune`: images per step."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of all random numbers."""
    accelerator: str = "auto"
    """`cpu`, `cuda`, `mps`; `auto`: the fastest available."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """Precision of the encoder. `auto`: fp32 for published forms of `linear`, else the run's, or bf16 where fast."""


class PretrainConfig(Section):
    """All settings of one pre-training run."""

    recipe: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = "custom"
    """Name of the recipe these settings came from."""
    seed: Annotated[int, Field(ge=-(2**32), le=2**32)] = 0
    """Seed of all random numbers."""
    epochs: Count = 100
    """Passes over the training images."""
    steps: Count | None = None
    """Stop after this many steps; schedules still span `epochs`. Not given: train for all epochs."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images per step, over all devices."""
    init_from: Annotated[str, Field(min_length=1)] | None = None
    """Start the backbone from a checkpoint of any supported program: a file, or the folder of a run."""
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
"""Settings that may change when a run is resumed: they say where and how often, never what is computed."""


def check(config: PretrainConfig) -> None:
    """Refuse settings that are valid one by one but do not work together.

    Raises:
        ValueError: one line that says what was given, what was expected and which flag to change.
    """
    model, optim, batch = config.model, config.optim, config.batch_size
    if model.variant == "v3" and model.queue_size:
        raise ValueError(f"model.queue_size is {model.queue_size}; v3 has no queue: give --model.queue_size 0")
    if model.variant in ("v1", "v2"):
        keys = batch * (2 if model.symmetric else 1)
        if model.queue_size < keys:
            what = "2 x batch_size, because the loss is symmetric" if model.symmetric else "batch_size"
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
            f"model.bn_splits is {model.bn_splits}; expected at least 2 in each group of the {part} images of a "
            "forward pass: lower --model.bn_splits or raise --batch_size"
        )
