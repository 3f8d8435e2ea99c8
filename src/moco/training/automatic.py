"""Settings for a user's own images, chosen from their size, their number and the machine, each with its reason."""

import statistics
from contextlib import suppress

from moco.config import DataConfig, PretrainConfig, parse_config
from moco.data import BadImage, Images, Splits, load_data
from moco.data.places.addresses import is_remote
from moco.parallel.device import choose_accelerator

SMALL = 64
"""Images with sides up to this many pixels are trained on at full resolution, with a small stem."""
ON_PROCESSOR = 32
"""Side of the views of larger images without an accelerator. In ten minutes, an encoder learns more from a few thousand
photos seen a hundred times at this size than from the same photos seen six times at 96 pixels (results/LOG.md)."""
SAMPLED = 50


def auto_config(data: DataConfig, loaded: Splits | None = None) -> tuple[PretrainConfig, list[str]]:
    """Choose settings that suit the images and the machine.

    Args:
        data: where the images are.
        loaded: the images themselves, if they are already in memory.

    Returns:
        The settings, and the reason for each choice, one line each.

    Raises:
        ValueError: there are fewer than 16 images, or none of those sampled can be read.
    """
    images = (loaded or load_data(data)).train
    number = len(images)
    if number < 16:
        raise ValueError(f"there are {number} images; expected at least 16 to contrast with each other: add more")
    side = _usual_side(images) if images.in_memory is None else min(images.in_memory.shape[2:])
    accelerated = choose_accelerator("auto") != "cpu"
    small = side <= SMALL
    size = max(8, side // 8 * 8) if small else min(224, side // 32 * 32) if accelerated else ON_PROCESSOR
    backbone = ("resnet18" if small else "resnet50") if accelerated else "resnet-mini"
    stem = "small" if small or not accelerated else "imagenet"
    recipe = "cifar" if small else "v2"
    batch = max(4, min(256 if accelerated else 128, 2 ** ((number // 4).bit_length() - 1)))
    queue = max(2 * batch, min(65536, 2 ** (max(1, number // 10).bit_length() - 1)))
    # Images seen in all: about a night on one accelerator, about ten minutes on two cores.
    epochs = max(5, min(800, (20_000_000 if accelerated else 300_000) // number))
    where = "this accelerator" if accelerated else "this processor"
    reasons = [
        f"--views.size {size}: the images have about {side} pixels on their short side"
        + ("" if size == side else ", rounded down to a multiple of 8" if small else f", and {size} suits {where}"),
        f"--model.backbone {backbone}: for {where}",
        f"--model.stem {stem}: views {'up to' if stem == 'small' else 'over'} {SMALL} pixels",
        f"--views.recipe {recipe}: {'no blur, it would wipe out small images' if small else 'as published'}",
        f"--batch_size {batch}: {number:,} images on {where}",
        f"--model.queue_size {queue}: a power of two, at most a tenth of the images, but at least two batches",
        f"--epochs {epochs}: about {epochs * number:,} images seen",
    ]
    model = {"variant": "v2", "backbone": backbone, "stem": stem, "queue_size": queue, "temperature": 0.2}
    settings = {
        "recipe": "auto",
        "epochs": epochs,
        "batch_size": batch,
        "data": data.model_dump(),
        "views": {"recipe": recipe, "size": size},
        "model": model | {"momentum": 0.99, "bn_splits": max(1, min(8, batch // 4))},
        "optim": {"base_lr": 0.06, "weight_decay": 5e-4, "warmup_epochs": min(10.0, epochs / 20)},
        "monitor": {"every": max(1, epochs // 20)},
    }
    return parse_config(settings), reasons


def _usual_side(images: Images) -> int:
    """Return the median of the short sides of some images; unreadable ones are skipped, as in training."""
    sides: list[int] = []
    # Of remote images, the first ones: any of the others may be in a shard that would have to be fetched for it.
    apart = 1 if is_remote(images.paths[0]) else max(1, len(images) // SAMPLED)
    for index in range(0, min(len(images), apart * SAMPLED), apart):
        with suppress(BadImage):
            sides.append(min(images.decode(index).shape[1:]))
    if not sides:
        raise ValueError(
            f"none of the images sampled can be read, such as {images.paths[0]!r}; give images that are not damaged"
        )
    return int(statistics.median(sides))
