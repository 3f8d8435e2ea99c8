"""What takes long to compute for a map, cached on disk: the vectors of a run, and their layout."""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moco.data import Images, load_data, some_of
from moco.embeddings.coordinates import Method
from moco.embeddings.embed import embed, embed_to, fingerprint, fingerprint_of_images
from moco.embeddings.features import OnProgress
from moco.embeddings.table import META, Embeddings, read_meta
from moco.explore.layout import Layout, lay_out
from moco.files import write_atomically
from moco.packages import versions
from moco.parallel.device import choose_accelerator
from moco.storage.encoder_files import load_encoder
from moco.storage.run import Run

FOLDER = "explore"
"""Folder in a run with tables of embeddings, each named by its number of images."""
LAYOUT = "layout.npz"
"""File with the layout, beside the vectors."""
_LOG = logging.getLogger("moco")


def embedded(run: Run, most: int, on_progress: OnProgress) -> tuple[Embeddings, Images, int]:
    """Vectors of a run's training images, the images, and their total number; computed once per state of the encoder.

    Args:
        run: the run whose encoder embeds its own images.
        most: most images, evenly spaced if there are more.
        on_progress: called with (images done, images in all).
    """
    encoder = load_encoder(run.path).to(choose_accelerator("auto"))
    found = load_data(run.config.data).train
    images = some_of(found, most)
    folder, precision, batch_size = run.path / FOLDER / str(len(images)), "auto", None
    try:
        if (folder / META).is_file():
            before = read_meta(folder).settings
            if (before.encoder, before.images) == (fingerprint(encoder), fingerprint_of_images(images)):
                precision, batch_size = before.precision, before.batch_size  # also if from another machine
            else:
                shutil.rmtree(folder)
        embeddings = embed_to(
            folder, encoder, images, precision=precision, batch_size=batch_size, on_progress=on_progress
        )
    except OSError as error:  # someone else's run, or no space
        _LOG.info("the embeddings could not be kept for next time: %s", error)
        return embed(encoder, images, on_progress=on_progress), images, len(found)
    if len(embeddings) < len(images):  # files that cannot be read have no row
        place = {path: index for index, path in enumerate(images.paths)}
        images = images.select([place[path] for path in embeddings.paths])
    return embeddings, images, len(found)


def laid_out(embeddings: Embeddings, method: Method = "tsne") -> Layout:
    """Return the layout from `lay_out`, or the one stored for the same vectors; each method has its own file."""
    vectors = np.asarray(embeddings.vectors)
    if embeddings.folder is None:
        return lay_out(vectors, method=method)
    digest = hashlib.sha256(json.dumps([vectors.shape, versions()], sort_keys=True).encode())
    digest.update(np.ascontiguousarray(vectors).data)
    path = embeddings.folder / (LAYOUT if method == "tsne" else f"layout-{method}.npz")
    key = digest.hexdigest()
    found = _read(path, key)
    if found is None:
        found = lay_out(vectors, method=method)
        _write(path, key, found)
    return found


def _read(path: Path, key: str) -> Layout | None:
    try:
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["key"]) != key:
                return None
            arrays = (kept[name] for name in ("xy", "clusters", "outlier", "order"))
            return Layout(*arrays, notes=tuple(map(str, kept["notes"])))
    except Exception:  # there is none yet, or a damaged one, on which zipfile and numpy raise anything
        return None


def _write(path: Path, key: str, found: Layout) -> None:
    def write(file: BinaryIO) -> None:
        np.savez(
            file,
            key=np.array(key),
            xy=found.xy,
            clusters=found.clusters,
            outlier=found.outlier,
            order=found.order,
            notes=np.array(found.notes, dtype=np.str_),
        )

    try:
        write_atomically(path, write)
    except OSError as error:
        _LOG.info("the map could not be kept for next time: %s", error)
