"""Features of images: files are read ahead, and every caller uses the same forward pass."""

import logging
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from moco.data import BadImage, Images, resized
from moco.data.decode import decode, quiet_pillow
from moco.files import scratch_room
from moco.method.encoder import ImageEncoder
from moco.parallel import collectives
from moco.parallel.device import choose_precision
from moco.parallel.launch import own_cores
from moco.views.pixels import centred, normalise

READ_AHEAD = 2
"""Batches of files that are read ahead while one is processed."""

OnProgress = Callable[[int, int], None]
"""Called with (amount done, total amount)."""
Report = OnProgress


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
    kind, bad = resolve_precision(encoder, precision), dict[int, BadImage]()
    out = torch.from_numpy(scratch_room(len(images), encoder.num_features))
    rows = range(len(images))
    with closing(feature_batches(encoder, images, rows, batch_size=batch_size, precision=kind, short=short)) as batches:
        for batch, vectors, unreadable in batches:
            out[batch.start : batch.stop] = vectors
            bad |= unreadable
            if on_progress:
                on_progress(batch.stop, len(images))
    return out, bad


def feature_batches(
    encoder: ImageEncoder, images: Images, rows: range, *, batch_size: int, precision: str, short: int | None = None
) -> Generator[tuple[range, Float[Tensor, "n f"], dict[int, BadImage]]]:
    """Yield each batch's indices, its features on the CPU, and its unreadable files by index.

    Close the generator, which restores the encoder's mode. The arguments are those of `read_features`, but `precision`
    is resolved, and only the images in `rows` are read.
    """
    size = encoder.input_size
    short = size if short is None else short
    margin = round((short - size) / 2)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    device = next(encoder.parameters()).device
    with evaluating(encoder), closing(_pixel_batches(images, batches, short)) as read:
        for batch, pixels, bad in read:
            cropped = pixels[:, :, margin : margin + size, margin : margin + size]
            normalised = normalise(cropped.to(device), encoder.mean, encoder.std)
            with torch.inference_mode():
                vectors = encode(encoder, normalised, precision).float().cpu()
            yield batch, vectors, bad


def _pixel_batches(
    images: Images, batches: list[range], size: int
) -> Generator[tuple[range, UInt8[Tensor, "n c s s"], dict[int, BadImage]]]:
    """Yield the pixels of each batch, black for unreadable files; files of the next batches are read meanwhile."""
    if images.in_memory is not None:
        yield from ((batch, resized(images, batch, size=size), {}) for batch in batches)
        return

    def read(index: int, out: UInt8[np.ndarray, "c s s"]) -> BadImage | None:
        try:
            out[:] = centred(torch.from_numpy(decode(images.paths[index], images.channels))[None], size)[0].numpy()
        except BadImage as bad:
            return bad
        return None

    # As many threads as this process may use cores: each holds one picture at its full size.
    with quiet_pillow(), ThreadPoolExecutor(own_cores(collectives.on_this_machine())) as pool:
        ahead: deque[tuple[range, np.ndarray, list[Future[BadImage | None]]]] = deque()
        try:
            for batch in [*batches, *[range(0)] * READ_AHEAD]:
                pixels = np.zeros((len(batch), images.channels, size, size), np.uint8)
                reads = [pool.submit(read, index, out) for index, out in zip(batch, pixels, strict=True)]
                ahead.append((batch, pixels, reads))
                if len(ahead) > READ_AHEAD:
                    batch, pixels, reads = ahead.popleft()
                    bad = {index: each for index, done in zip(batch, reads, strict=True) if (each := done.result())}
                    yield batch, torch.from_numpy(pixels), bad
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def resolve_precision(encoder: ImageEncoder, precision: str) -> str:
    """Return the precision, and in place of `auto` the fastest on the encoder's device."""
    if precision not in ("auto", "fp32", "bf16", "fp64"):
        raise ValueError(f"precision is {precision!r}; expected fp32, bf16, fp64 or auto")
    return choose_precision(next(encoder.parameters()).device.type) if precision == "auto" else precision


@contextmanager
def evaluating(encoder: ImageEncoder) -> Generator[None]:
    """Switch an encoder to evaluation mode, and back to its own mode at the end."""
    was_training = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(was_training)


def encode(encoder: ImageEncoder, images: Float[Tensor, "n c h w"], precision: str) -> Float[Tensor, "n f"]:
    """Return the features of normalised images, on the encoder's device; bf16 runs under autocast."""
    weight = next(encoder.parameters())
    layout = torch.channels_last if precision == "bf16" else torch.contiguous_format
    with torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        return encoder(images.to(weight.dtype).to(memory_format=layout))


def pixels(images: Images, *, size: int) -> Tensor:
    """Return raw pixels as features, float32 `[n, c * size * size]` in [0, 1]: the baseline for every encoder."""
    return resized(images, range(len(images)), size=size).flatten(1).float() / 255
