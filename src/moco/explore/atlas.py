"""What the page shows about a set of images: map, names, thumbnails and neighbours."""

import base64
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from moco.data import Images, some_of
from moco.data.spacing import evenly
from moco.embeddings.coordinates import Method, check_method
from moco.embeddings.embed import fingerprint
from moco.embeddings.search import search
from moco.embeddings.table import META, Embeddings, images_of, load, read_meta
from moco.explore.cached import embedded, laid_out
from moco.explore.layout import Layout
from moco.explore.thumbnails import ACROSS, CELL, Sheet, sheet
from moco.figures import CLASS_COLOURS_DARK, CLASS_COLOURS_LIGHT
from moco.method.encoder import ImageEncoder
from moco.parallel.device import choose_accelerator
from moco.storage.encoder_files import load_encoder
from moco.storage.run import Run

NEIGHBOURS = 12
"""Number of most similar images that the page shows."""
MOST_OF_RUN = 5000
"""Most images of a run that are embedded for the page, and default limit for a page saved as one file."""
MOST = 100_000
"""Most points on a map by default."""
OnProgress = Callable[[str, int, int], None]


class Neighbours(NamedTuple):
    """Rows of the map, most similar first, and their cosine similarities."""

    rows: list[int]
    similarity: list[float]


@dataclass(frozen=True, eq=False)
class Atlas:
    """A map of images, and everything needed to show it.

    Attributes:
        title: short title of the images.
        about: number of images and name of the encoder.
        embeddings: features, one row per image.
        images: the images of the same rows.
        layout: the map of the same rows.
        encoder: encoder of the embeddings, to search by a new image; None if it is not available.
    """

    title: str
    about: str
    embeddings: Embeddings
    images: Images
    layout: Layout
    encoder: ImageEncoder | None

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def num_sheets(self) -> int:
        return -(-len(self) // ACROSS**2)

    def sheet(self, number: int) -> Sheet:
        """Thumbnails of 256 images, starting at position `256 * number` in the layout's order."""
        return sheet(self.images, self.layout.order[number * ACROSS**2 :][: ACROSS**2].tolist())

    def neighbours(self, row: int) -> Neighbours:
        """Neighbours of an image on the map, without itself."""
        return self._nearest(row) if len(self) > 1 else Neighbours([], [])

    def search(self, pixels: UInt8[Tensor, "c h w"]) -> Neighbours:
        """Neighbours of another image; needs the encoder."""
        return self._nearest(pixels)

    def _nearest(self, query: int | Tensor) -> Neighbours:
        found = search(self.embeddings, query, k=NEIGHBOURS, encoder=self.encoder)
        return Neighbours(found.rows[0].tolist(), found.similarities[0].tolist())


def open_atlas(
    source: str | Path | Embeddings,
    *,
    most: int | None = None,
    layout: Method = "tsne",
    images: Images | None = None,
    on_progress: OnProgress | None = None,
) -> Atlas:
    """Open the map of a run's images, or of embeddings.

    Args:
        source: folder of a run, whose training images are embedded once and kept in the run; folder written by `moco
            embed`; or the result of `moco.embed`.
        most: most images on the map, evenly spaced if there are more; not given: 5,000 for a run, else 100,000.
        layout: method that lays out the map, as in `moco.embeddings.coordinates`.
        images: images of the same rows, for embeddings whose paths are not files.
        on_progress: called with what is being done, how much is done and how much there is.

    Raises:
        FileNotFoundError: the folder holds neither a run nor embeddings.
        ValueError: the images were not found, or the layout is unknown.
        ImportError: the layout needs an extra that is not installed.
    """
    check_method(layout)
    show = on_progress or (lambda *_: None)
    if most is not None and most < 1:
        raise ValueError(f"at most {most} images were asked for; expected at least 1")
    if isinstance(source, Embeddings):
        title, embeddings, total = "Images", *_thinned(source, most or MOST)
        images = None if images is None else some_of(images, most or MOST)
    elif (Path(source) / "config.yaml").is_file():
        title = Path(source).resolve().name
        embeddings, images, total = embedded(
            Run.open(source), most or MOST_OF_RUN, lambda done, total: show("embedding", done, total)
        )
    elif (Path(source) / META).is_file():
        title = Path(source).resolve().name
        embeddings, total = _thinned(load(source), most or MOST)
        embeddings = replace(embeddings, encoder=_encoder_of(Path(source)))
    else:
        raise FileNotFoundError(
            f"{source} holds neither a run nor embeddings; expected a folder written by `moco pretrain` or `moco embed`"
        )
    images = images or images_of(embeddings)
    if images is None:
        raise ValueError(
            f"the images of {source} were not found (the first is {embeddings.paths[0]!r}); run this where they "
            "were embedded, or embed them again"
        )
    if len(images) != len(embeddings):
        raise ValueError(f"there are {len(images)} images for {len(embeddings)} vectors; give one image for each")
    show("map", 0, 1)
    placed = laid_out(embeddings, layout)
    show("map", 1, 1)
    return Atlas(title, _about(embeddings, total), embeddings, images, placed, embeddings.encoder)


def page_data(atlas: Atlas, *, whole: bool) -> dict[str, Any]:
    """Return the data for the page's script.

    Args:
        atlas: the map to show.
        whole: include all thumbnails and neighbours, and leave out what reveals this machine's folders.
    """
    embeddings, layout = atlas.embeddings, atlas.layout
    start = os.path.commonprefix(embeddings.paths)
    root = start[: max(start.rfind("/"), start.rfind(os.sep)) + 1]
    labels = embeddings.labels
    data: dict[str, Any] = {
        "title": atlas.title,
        "about": atlas.about,
        "note": " ".join(layout.notes),
        "root": "" if whole else root,
        "names": [path[len(root) :] for path in embeddings.paths],
        "classes": embeddings.classes if labels is not None else None,
        "labels": None if labels is None else _packed(labels, "int32"),
        "clusters": _packed(layout.clusters, "uint8"),
        "outlier": _packed(layout.outlier, "float32"),
        "order": _packed(layout.order, "uint32"),
        "xy": _packed((layout.xy * 65535).round(), "uint16"),
        "cell": CELL,
        "across": ACROSS,
        "palette": {"light": CLASS_COLOURS_LIGHT, "dark": CLASS_COLOURS_DARK},
        "search": not whole and atlas.encoder is not None,
    }
    if whole:
        data["sheets"] = [atlas.sheet(number) for number in range(atlas.num_sheets)]
        if len(atlas) > 1:
            found = search(embeddings, np.arange(len(atlas)), k=NEIGHBOURS)
            # Similarities in steps of 1/10,000, -1 as 0.
            steps = ((found.similarities + 1) * 10_000).round().clip(0, 20_000)
            rows = _packed(found.rows, "uint16" if len(atlas) < 2**16 else "uint32")
            data["near"] = {"rows": rows, "similarity": _packed(steps, "uint16")}
    return data


def _packed(array: np.ndarray, kind: str) -> tuple[str, str]:
    """Return the name of a JavaScript typed array, and its bytes in base64."""
    name = {"uint8": "Uint8", "uint16": "Uint16", "uint32": "Uint32", "int32": "Int32", "float32": "Float32"}[kind]
    return f"{name}Array", base64.b64encode(array.astype(np.dtype(kind).newbyteorder("<")).tobytes()).decode()


def _encoder_of(folder: Path) -> ImageEncoder | None:
    """Return the encoder that the table names, if it still exists and is unchanged."""
    meta = read_meta(folder)
    if meta.encoder_source is None or not Path(meta.encoder_source).exists():
        return None
    try:
        encoder = load_encoder(meta.encoder_source)
    except (OSError, ValueError):
        return None
    return encoder.to(choose_accelerator("auto")) if fingerprint(encoder) == meta.settings.encoder else None


def _thinned(embeddings: Embeddings, most: int) -> tuple[Embeddings, int]:
    total, labels = len(embeddings), embeddings.labels
    if total <= most:
        return embeddings, total
    rows = evenly(total, most)
    thinned = replace(
        embeddings,
        vectors=np.asarray(embeddings.vectors[rows]),
        paths=tuple(embeddings.paths[row] for row in rows),
        labels=None if labels is None else labels[rows],
    )
    return thinned, total


def _about(embeddings: Embeddings, total: int) -> str:
    shown = f"{len(embeddings):,} images" if len(embeddings) == total else f"{len(embeddings):,} of {total:,} images"
    by = "" if embeddings.encoder is None else f", embedded by {embeddings.encoder.name}"
    return f"{shown}{by}"
