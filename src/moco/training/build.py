"""From settings and images to everything that a training step needs."""

import torch
from lightning_fabric import Fabric

from moco.config import ModelConfig, PretrainConfig
from moco.data import Images, Loader, Splits, fingerprint
from moco.data.loader import num_workers
from moco.method import small_map_convolution
from moco.method.backbones import refuse_size
from moco.method.encoder import Encoder, ImageEncoder
from moco.method.model import MoCo
from moco.method.optim import build_optimizer
from moco.method.variants import build_model, choose_batchnorm
from moco.parallel import collectives, consensus
from moco.parallel.fabric import processes
from moco.parallel.launch import sharing_cores
from moco.storage import encoder_files
from moco.training.metrics import Clock, Meter
from moco.training.monitor import build_monitor
from moco.training.step import Training, seed_everything
from moco.views.specs import view_specs
from moco.views.two_views import TwoViews


def prepare(config: PretrainConfig, splits: Splits, fabric: Fabric, *, fresh: bool = True, groups: int = 0) -> Training:
    """Build everything a step needs from the settings and the images, and draw the initial weights.

    Args:
        config: settings of the run.
        splits: its images.
        fabric: launched.
        fresh: false if weights will be restored, so that those the settings start from are not needed.
        groups: batch-norm groups that the run was started with; kept if the number of processes allows it.

    Raises:
        ValueError: the images or the batch cannot be divided among the processes.
        Exception: what fails in one process alone, such as reading weights; in the others a ValueError that names it.
    """
    train = splits.train
    settings, across, groups = same_groups(config.model, groups)
    _check_division(config, settings, len(train))
    specs = consensus.together(lambda: view_specs(config.views))  # which may be code of the user's
    views = TwoViews(specs, config.views.size, config.seed)
    # One machine alone may lack room for shards, or a file of weights.
    loader, core, origin = consensus.together(
        lambda: (_loader(config, train, fabric, views), *_model(config, settings, fresh=fresh))
    )
    if across:
        core.shuffle = "ranks"
    model, optimizer = _set_up(config, core, fabric)
    query_encoder = core.query_encoder
    assert isinstance(query_encoder, Encoder)
    encoder = ImageEncoder(
        query_encoder.backbone,
        name=config.model.backbone,
        stem=config.model.stem,
        channels=config.data.channels,
        mean=specs[0].mean,
        std=specs[0].std,
        input_size=config.data.size or config.views.size,
    )
    mask = config.model.mask_own
    planned = config.epochs * loader.steps_per_epoch
    return Training(
        config=config,
        fabric=fabric,
        core=core,
        model=model,
        optimizer=optimizer,
        views=views,
        loader=loader,
        monitor=build_monitor(config, splits, encoder, query_encoder.projector),
        num_images=len(train),
        images=fingerprint(train),
        in_memory=train.in_memory is not None,
        mask_own=config.model.queue_size > 0.1 * len(train) if mask is None else mask and config.model.queue_size > 0,
        total=min(planned, config.steps or planned),
        meter=Meter(fabric.device),
        clock=Clock(),
        groups=groups,
        origin=origin,
    )


def _check_division(config: PretrainConfig, settings: ModelConfig, num_images: int) -> None:
    world, parts = collectives.world_size(), config.optim.accumulate
    if num_images < world:
        raise ValueError(f"{num_images} images for {world} processes; start at most as many processes as images")
    part, left = divmod(config.batch_size, world * parts)
    if left:
        raise ValueError(
            f"batch_size is {config.batch_size}, expected a multiple of the {world} processes x optim.accumulate "
            f"{parts}: change --batch_size, or the number of processes"
        )
    if part == 1 and choose_batchnorm(settings) == "shuffle":
        raise ValueError(
            f"batch_size {config.batch_size} gives each of {world} processes one image, but batch norm needs at least "
            "2; raise --batch_size, or start fewer processes"
        )


def _loader(config: PretrainConfig, images: Images, fabric: Fabric, views: TwoViews) -> Loader:
    workers = config.data.workers
    if workers is None:
        workers = num_workers(sharing_cores(processes(config.engine)[0]))
    return Loader(
        images,
        batch_size=config.batch_size,
        seed=config.seed,
        device=fabric.device,
        rank=collectives.rank(),
        world_size=collectives.world_size(),
        workers=workers,
        crop=views,
        max_bad=config.data.max_bad,
    )


def _model(config: PretrainConfig, settings: ModelConfig, *, fresh: bool) -> tuple[MoCo, str]:
    """Build the model with its initial weights; also return where these come from, in words."""
    seed_everything(config.seed)
    pretrained = settings.pretrained and fresh and not config.init_from
    core = build_model(settings.model_copy(update={"pretrained": pretrained}), channels=config.data.channels)
    for size in {config.views.size, config.data.size or config.views.size}:
        refuse_size(core.query_encoder.get_submodule("backbone"), size, channels=config.data.channels)
    return core, encoder_files.initialise(core, config) if config.init_from and fresh else ""


def _set_up(config: PretrainConfig, core: MoCo, fabric: Fabric) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Bring the model into its precision and layout, and let Fabric wrap it and its optimizer."""
    engine = config.engine
    if engine.precision == "fp64":
        core.double()
    if engine.accelerator == "cpu" and engine.precision == "bf16":
        small_map_convolution.convert(core.query_encoder)
    if engine.channels_last:
        core.to(memory_format=torch.channels_last)
    trained = [parameter for parameter in core.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(config.optim, trained, batch_size=config.batch_size)
    if engine.compile:
        core.query_encoder.compile()
        core.key_encoder.compile()
    return fabric.setup(core, optimizer)


def same_groups(model: ModelConfig, groups: int) -> tuple[ModelConfig, bool, int]:
    """Return settings with which the present processes compute batch-norm statistics over the earlier run's groups.

    Group j consists of images j, j + s, ... of the batch, in any order. These are the same images with s groups on one
    process, on s processes that exchange images (v1, section 3.3), or on fewer processes with several groups each.

    Args:
        model: the settings as given.
        groups: number of groups in the earlier run; 0: none.

    Returns:
        The settings; whether images are exchanged between processes although each computes several groups; and the
        number of groups in a forward pass of all processes, 0 if batch norm has no groups that other processes could
        form.
    """
    world, kind = collectives.world_size(), choose_batchnorm(model)
    if model.variant == "v3" or kind not in ("split", "shuffle"):
        return model, False, 0
    own = world if kind == "shuffle" else model.bn_splits if world == 1 else 0
    if not own or not groups or groups % world or groups == own:
        return model, False, own
    each = groups // world
    changed = {"batchnorm": "shuffle"} if each == 1 and world > 1 else {"batchnorm": "split", "bn_splits": each}
    return model.model_copy(update=changed), world > 1 and each > 1, groups
