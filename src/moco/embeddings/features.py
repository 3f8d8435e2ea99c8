"""From images to features: reading ahead, and one forward pass for all users."""

import logging
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from moco.data import ArrayImages, BadImage, Images, resized
from moco.data.decode import decode, quiet_pillow
from moco.files import scratch_room
from moco.method.encoder import ImageEncoder
from moco.parallel import collectives
from moco.parallel.launch import own_cores
from moco.views.pixels import centred, normalise

READ_AHEAD = 2
"""Batches of files that are read ahead while one is processed."""

OnProgress = Callable[[int, int], None]
"""Called with (amount done, total amount)."""
Report = OnProgress


@torch.inference_mode()
def features(
    encoder: ImageEncoder,
    images: Images,
    *,
    batch_size: int = 256,
    precision: str = "auto",
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Compute the features of images as a float32 tensor `[n, f]` on the CPU; the encoder's mode is restored.

    A file that cannot be read becomes a black image; the log says how many there are, and names the first.
    """
    out, bad = read_features(encoder, images, batch_size=batch_size, precision=precision, on_progress=on_progress)
    if bad:
        first = next(iter(bad.values()))
        logging.getLogger("moco").warning("%d of %d images are black: %s", len(bad), len(out), first)
    return out


@torch.inference_mode()
def read_features(
    encoder: ImageEncoder,
    images: Images,
    *,
    batch_size: int = 256,
    precision: str = "auto",
    short: int | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[Tensor, dict[int, BadImage]]:
    """Compute the features of images, and report files that cannot be read.

    Args:
        encoder: on the device to use.
        images: images in memory or files.
        batch_size: images per forward pass.
        precision: as in `embed`.
        short: length in pixels that the short side is resized to before the centre is cropped; not given: the
            encoder's size.
        on_progress: called with (images done, images in all).

    Returns:
        Features `[n, f]`, and the unreadable files by index; the rows of the latter mean nothing.

    Raises:
        OSError: there are too many features for memory, and the disk has no room for them.
    """
    kind, size, bad = arithmetic(encoder, precision), encoder.input_size, {}
    short = size if short is None else short
    margin, out = round((short - size) / 2), torch.from_numpy(scratch_room(len(images), encoder.num_features))
    batches = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    with evaluating(encoder), closing(read_batches(images, batches, short)) as read:
        for which, pixels, failed in read:
            pixels = pixels[:, :, margin : margin + size, margin : margin + size]
            out[which.start : which.stop] = forward(encoder, pixels, kind)
            bad |= failed
            if on_progress:
                on_progress(which.stop, len(images))
    return out, bad


def read_batches(
    images: Images, batches: Sequence[range], size: int
) -> Generator[tuple[range, UInt8[Tensor, "n c s s"], dict[int, BadImage]]]:
    """Pixels of each batch, black for unreadable files; files are read while earlier batches are processed."""
    if isinstance(images, ArrayImages):
        yield from ((which, resized(images, list(which), size=size), {}) for which in batches)
        return

    def read(index: int) -> UInt8[Tensor, "c s s"] | BadImage:
        try:
            return centred(torch.from_numpy(decode(images.paths[index], images.channels))[None], size)[0]
        except BadImage as bad:
            return bad

    # As many threads as this process may use cores: each holds one picture at its full size.
    with quiet_pillow(), ThreadPoolExecutor(own_cores(collectives.on_this_machine())) as pool:
        waiting: deque[tuple[range, list[Future[Tensor | BadImage]]]] = deque()
        try:
            for which in [*batches, *[range(0)] * READ_AHEAD]:
                waiting.append((which, [pool.submit(read, index) for index in which]))
                if len(waiting) > READ_AHEAD:
                    which, futures = waiting.popleft()
                    yield which, *_gathered(which, [future.result() for future in futures], images.channels, size)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _gathered(
    which: range, read: Sequence[Tensor | BadImage], channels: int, size: int
) -> tuple[UInt8[Tensor, "n c s s"], dict[int, BadImage]]:
    pixels, bad = torch.zeros(len(which), channels, size, size, dtype=torch.uint8), {}
    for place, (index, each) in enumerate(zip(which, read, strict=True)):
        if isinstance(each, BadImage):
            bad[index] = each
        else:
            pixels[place] = each
    return pixels, bad


def arithmetic(encoder: ImageEncoder, precision: str) -> str:
    from moco.parallel.device import choose_precision

    if precision not in ("auto", "fp32", "bf16", "fp64"):
        raise ValueError(f"precision is {precision!r}; expected fp32, bf16, fp64 or auto")
    return choose_precision(next(encoder.parameters()).device.type) if precision == "auto" else precision


@contextmanager
def evaluating(encoder: ImageEncoder) -> Generator[None]:
    was_training = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(was_training)


def forward(encoder: ImageEncoder, pixels: UInt8[Tensor, "n c h w"], kind: str) -> Float[Tensor, "n f"]:
    device = next(encoder.parameters()).device
    return encode(encoder, normalise(pixels.to(device), encoder.mean, encoder.std), kind).float().cpu()


def encode(encoder: ImageEncoder, views: Float[Tensor, "n c h w"], precision: str) -> Float[Tensor, "n f"]:
    """Return the features of normalised images, on the encoder's device; bf16 runs under autocast."""
    parameter = next(encoder.parameters())
    layout = torch.channels_last if precision == "bf16" else torch.contiguous_format
    with torch.autocast(parameter.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        return encoder(views.to(parameter.dtype, memory_format=layout))


def pixels(images: Images, *, size: int) -> Tensor:
    """Raw pixels as features, float32 `[n, c * size * size]` in [0, 1]: the baseline that an encoder has to beat."""
    if isinstance(images, ArrayImages) and tuple(images.images.shape[2:]) == (size, size):
        return images.images.flatten(1).float() / 255
    return resized(images, list(range(len(images))), size=size).flatten(1).float() / 255
