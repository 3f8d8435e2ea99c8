"""Computing features of images, in order: in memory, or into a folder."""

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from moco import dist
from moco.config import DataConfig
from moco.data import ArrayImages, BadImage, FileImages, Images, as_images, load_data, resized
from moco.data.decode import decode, quiet_pillow
from moco.encoder import ImageEncoder
from moco.launch import own_cores
from moco.scratch import room
from moco.shares import write_shared
from moco.table import Unreadable, Writer
from moco.transforms import centred, normalise
from moco.vectors import Embeddings, Meta, Settings, load, load_part, versions, whole_source

READ_AHEAD = 2
"""Batches of files that are read ahead while one is processed."""

OnProgress = Callable[[int, int], None]
"""Called with (amount done, total amount)."""
Report = OnProgress


def embed(
    encoder: ImageEncoder,
    images: "Images | Tensor | np.ndarray | list[Any] | Dataset[Any] | str | Path",
    *,
    batch_size: int = 256,
    precision: str = "auto",
    on_progress: OnProgress | None = None,
) -> Embeddings:
    """Compute the features of all images.

    Args:
        encoder: an encoder from `load_encoder`, on the device to use.
        images: a folder or the name of a data set (its training part, if it has parts), uint8 tensor `[n, c, h, w]`,
            array `[n, h, w, c]`, list of PIL images, map-style dataset, or a part from `load_data`.
        batch_size: images per forward pass.
        precision: `fp32`, `bf16`, or `auto`: bf16 where it is fast.
        on_progress: called with (images done, images in all).

    Returns:
        The features as `.vectors`, float32 `[N, F]`, with `.paths`, `.labels` and `.classes`; rows of files that cannot
        be read are those of a black image.

    Raises:
        ValueError: these are not images, images in memory have different sizes, or the precision is unknown.

    Example:
        >>> emb = moco.embed(encoder, "photos/")                                             # doctest: +SKIP
        >>> emb.vectors.shape, emb.paths[0]                                                  # doctest: +SKIP
        ((1200, 512), 'photos/cat.jpg')
    """
    if isinstance(images, str | Path):
        images = load_data(DataConfig.model_validate({"source": str(images), "channels": encoder.channels})).train
    images = as_images(images, channels=encoder.channels)
    return Embeddings(
        vectors=features(encoder, images, batch_size=batch_size, precision=precision, on_progress=on_progress).numpy(),
        paths=images.paths,
        labels=None if images.labels is None else images.labels.numpy(),
        classes=images.classes,
        encoder=encoder,
    )


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
    kind, size, bad = _arithmetic(encoder, precision), encoder.input_size, {}
    short = size if short is None else short
    margin, out = round((short - size) / 2), room(len(images), encoder.num_features)
    batches = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    with _evaluating(encoder), closing(_batches(images, batches, short)) as read:
        for which, pixels, failed in read:
            pixels = pixels[:, :, margin : margin + size, margin : margin + size]
            out[which.start : which.stop] = _forward(encoder, pixels, kind)
            bad |= failed
            if on_progress:
                on_progress(which.stop, len(images))
    return out, bad


def embed_to(
    out: str | Path,
    source: ImageEncoder | str | Path,
    images: "Images | Tensor | np.ndarray | list[Any] | Dataset[Any] | str | Path",
    *,
    part: str = "train",
    batch_size: int | None = None,
    precision: str = "auto",
    accelerator: str = "auto",
    on_progress: OnProgress | None = None,
) -> Embeddings:
    """Write the features of all images into a folder (see `moco.vectors`), keeping few of them in memory.

    If it is killed at any moment, the same call resumes from the last rows synced to disk, and the table is that of an
    undisturbed run, to the last bit on the same machine. A finished table is returned as it is. Each of several
    processes started by `torchrun` embeds a share of the images.

    Args:
        out: a new folder, or an unfinished one.
        source: folder of a run, anything else that `load_encoder` takes, or an encoder.
        images: as in `embed`. Files that cannot be read get no row; unreadable.csv lists them with the reasons.
        part: `train` or `test`, if the images are divided so.
        batch_size: images per forward pass; not given: chosen from the size of the images.
        precision: `fp32`, `bf16`, or `auto`: bf16 where it is fast.
        accelerator: where to load the encoder, if it is not loaded yet.
        on_progress: called with (images done, images in all) of this process.

    Returns:
        The table, with memory-mapped vectors.

    Raises:
        ValueError: there are no images, none can be read, or the folder was begun with other images, another encoder or
            other settings.
        FileExistsError: the folder holds something else.
    """
    from moco.checkpoint import load_encoder
    from moco.engine import own_device

    if isinstance(source, ImageEncoder):
        encoder, origin = source, None
    else:
        encoder, origin = load_encoder(source).to(own_device(accelerator)), os.path.abspath(source)
    whence = whole_source(str(images)) if isinstance(images, str | Path) else None
    found = load_part(whence, part, encoder.channels) if whence else as_images(images, channels=encoder.channels)
    size = batch_size or max(16, min(256, 2**22 // encoder.input_size**2 // 16 * 16))
    kind = _arithmetic(encoder, precision)
    settings = Settings(
        encoder=fingerprint(encoder), images=fingerprint_of_images(found), precision=kind, batch_size=size
    )
    meta = Meta(
        columns=encoder.num_features,
        settings=settings,
        encoder=encoder.describe(),
        encoder_source=origin,
        images_source=whence,
        part=part,
        classes=found.classes,
        stop=len(found),
        versions=versions(),
    )

    def write(folder: Path, meta: Meta) -> None:
        _write(folder, meta, encoder, found, on_progress)

    write_shared(Path(out), meta, write)
    return replace(load(out), encoder=encoder)


@torch.inference_mode()
def _write(folder: Path, meta: Meta, encoder: ImageEncoder, images: Images, on_progress: OnProgress | None) -> None:
    """Write the missing rows; batches start at the same images wherever the work was interrupted."""
    with Writer(folder, meta) as writer, _evaluating(encoder):
        size, done, stop = meta.settings.batch_size, writer.meta.done, meta.stop
        batches = [range(start, min(start + size, stop)) for start in range(done, stop, size)]
        listed = _reasons(images) if done == 0 else []
        with closing(_batches(images, batches, encoder.input_size)) as read:
            for which, pixels, bad in read:
                vectors = _forward(encoder, pixels, meta.settings.precision).numpy()
                good = [index for index in which if index not in bad]
                writer.add(
                    vectors[[index - which.start for index in good]],
                    [images.paths[index] for index in good],
                    None if images.labels is None else images.labels[good].tolist(),
                    listed + [Unreadable(bad[index].path, bad[index].reason) for index in sorted(bad)],
                    done=which.stop,
                )
                listed = []
                if on_progress:
                    on_progress(which.stop - meta.start, stop - meta.start)
        writer.finish()


def _batches(
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
    with quiet_pillow(), ThreadPoolExecutor(own_cores(dist.on_this_machine())) as pool:
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


def _reasons(images: Images) -> list[Unreadable]:
    """The reasons for files that were skipped as unreadable when the images were listed."""
    again = FileImages(images.skipped, None, None)
    answers = [each for at in range(0, len(again), 32) for each in again.decode_many(range(at, len(again))[:32])]
    return [
        Unreadable(path, each.reason if isinstance(each, BadImage) else "it could not be read at first")
        for path, each in zip(images.skipped, answers, strict=True)
    ]


def fingerprint(encoder: ImageEncoder) -> str:
    """SHA-256 of an encoder's weights and description: equal for equal encoders, on any machine."""
    digest = hashlib.sha256(json.dumps(encoder.describe(), sort_keys=True).encode())
    for name, tensor in sorted(encoder.backbone.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint_of_images(images: Images) -> str:
    """SHA-256 of names and labels in order, and of pixels that are in memory; files are not opened."""
    digest = hashlib.sha256()
    for path in images.paths:
        digest.update(path.encode("utf-8", "surrogateescape") + b"\0")
    if images.labels is not None:
        digest.update(images.labels.numpy())
        digest.update("\0".join(images.classes or ()).encode("utf-8", "surrogateescape"))
    if isinstance(images, ArrayImages):
        digest.update(images.images.cpu().contiguous().numpy())
    return digest.hexdigest()


def _arithmetic(encoder: ImageEncoder, precision: str) -> str:
    from moco.engine import choose_precision

    if precision not in ("auto", "fp32", "bf16", "fp64"):
        raise ValueError(f"precision is {precision!r}; expected fp32, bf16, fp64 or auto")
    return choose_precision(next(encoder.parameters()).device.type) if precision == "auto" else precision


@contextmanager
def _evaluating(encoder: ImageEncoder) -> Generator[None]:
    was_training = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(was_training)


def _forward(encoder: ImageEncoder, pixels: UInt8[Tensor, "n c h w"], kind: str) -> Float[Tensor, "n f"]:
    first = next(encoder.parameters())
    layout = torch.channels_last if kind == "bf16" else torch.contiguous_format
    batch = normalise(pixels.to(first.device), encoder.mean, encoder.std).to(first.dtype).to(memory_format=layout)
    with torch.autocast(first.device.type, dtype=torch.bfloat16, enabled=kind == "bf16"):
        return encoder(batch).float().cpu()


def pixels(images: Images, *, size: int) -> Tensor:
    """Raw pixels as features, float32 `[n, c * size * size]` in [0, 1]: the baseline that an encoder has to beat."""
    if isinstance(images, ArrayImages) and tuple(images.images.shape[2:]) == (size, size):
        return images.images.flatten(1).float() / 255
    return resized(images, list(range(len(images))), size=size).flatten(1).float() / 255
