"""Embed images, in their order: in memory, or into a folder."""

import hashlib
import json
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moco.config import DataConfig
from moco.data import BadImage, FileImages, Images, as_images, load_data
from moco.embeddings.features import OnProgress, feature_batches, features, resolve_precision
from moco.embeddings.shared_writing import write_shared
from moco.embeddings.table import Embeddings, Meta, Settings, absolute_source, load, load_part
from moco.embeddings.writing import Writer
from moco.method.encoder import ImageEncoder
from moco.packages import versions
from moco.parallel.device import own_device
from moco.storage.encoder_files import load_encoder


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
    """Write the features of all images into a folder (see `moco.embeddings.table`), keeping few of them in memory.

    If it is killed at any moment, the same call resumes from the last rows synced to disk, and the table is that of an
    undisturbed run, to the last bit on the same machine. A finished table is returned as it is. Processes started by
    `torchrun` divide the images among themselves.

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
    encoder = source if isinstance(source, ImageEncoder) else load_encoder(source).to(own_device(accelerator))
    name = absolute_source(str(images)) if isinstance(images, str | Path) else None
    found = load_part(name, part, encoder.channels) if name else as_images(images, channels=encoder.channels)
    meta = Meta(
        columns=encoder.num_features,
        settings=Settings(
            encoder=fingerprint(encoder),
            images=fingerprint_of_images(found),
            precision=resolve_precision(encoder, precision),
            batch_size=batch_size or max(16, min(256, 2**22 // encoder.input_size**2 // 16 * 16)),
        ),
        encoder=encoder.describe(),
        encoder_source=None if isinstance(source, ImageEncoder) else os.path.abspath(source),
        images_source=name,
        part=part,
        classes=found.classes,
        stop=len(found),
        versions=versions(),
    )
    write_shared(Path(out), meta, lambda folder, meta: _write(folder, meta, encoder, found, on_progress))
    return replace(load(out), encoder=encoder)


def _write(folder: Path, meta: Meta, encoder: ImageEncoder, images: Images, on_progress: OnProgress | None) -> None:
    """Write the missing rows; batches start at the same images wherever the work was interrupted."""
    size, kind, stop = meta.settings.batch_size, meta.settings.precision, meta.stop
    with Writer(folder, meta) as writer:
        rows = range(writer.meta.done, stop)
        skipped = [] if writer.meta.done else _skipped(images)
        with closing(feature_batches(encoder, images, rows, batch_size=size, precision=kind)) as batches:
            for batch, vectors, bad in batches:
                good = [index for index in batch if index not in bad]
                writer.add(
                    vectors.numpy()[[index - batch.start for index in good]],
                    [images.paths[index] for index in good],
                    None if images.labels is None else images.labels[good].tolist(),
                    [*skipped, *bad.values()],
                    done=batch.stop,
                )
                skipped = []
                if on_progress:
                    on_progress(batch.stop - meta.start, stop - meta.start)
        writer.finish()


def _skipped(images: Images) -> list[BadImage]:
    """Return the files that were skipped when the images were listed, and why each cannot be read."""
    files, found = FileImages(images.skipped, None, None), list[BadImage]()
    for start in range(0, len(files), 32):
        some = range(len(files))[start : start + 32]
        for index, each in zip(some, files.decode_many(some), strict=True):
            reason = each.reason if isinstance(each, BadImage) else "it could not be read at first"
            found.append(BadImage(files.paths[index], reason))
    return found


def fingerprint(encoder: ImageEncoder) -> str:
    """Return the SHA-256 of an encoder's weights and description: equal for equal encoders, on any machine."""
    digest = hashlib.sha256(json.dumps(encoder.describe(), sort_keys=True).encode())
    for name, tensor in sorted(encoder.backbone.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint_of_images(images: Images) -> str:
    """Return the SHA-256 of names and labels in order, and of pixels that are in memory; files are not opened."""
    digest = hashlib.sha256()
    for path in images.paths:
        digest.update(path.encode("utf-8", "surrogateescape") + b"\0")
    if images.labels is not None:
        digest.update(images.labels.numpy())
        digest.update("\0".join(images.classes or ()).encode("utf-8", "surrogateescape"))
    if images.in_memory is not None:
        digest.update(images.in_memory.cpu().contiguous().numpy())
    return digest.hexdigest()
