"""Finding the images in a table of embeddings that are most, or least, similar to a query, by cosine similarity."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from moco.data import BadImage, FileImages, Images, as_images
from moco.embeddings.embed import fingerprint
from moco.embeddings.features import features
from moco.embeddings.ranking import exact, likely
from moco.embeddings.table import Embeddings, images_of, load, read_meta
from moco.figures import Alike, Neighbours, neighbours
from moco.method.encoder import ImageEncoder
from moco.storage.encoder_files import load_encoder
from moco.views.pixels import centred, thumbnail

SHOWN, PIXELS = 5, 160
"""Images in a picture at either end, and the length of their longer side in pixels."""


@dataclass(frozen=True, eq=False)
class Found:
    """The answers to some queries, best first.

    Attributes:
        queries: names of the queries.
        rows: row numbers in the table, int64 `[queries, k]`; padded with -1 if a query has fewer answers than others.
        similarities: cosine similarities, float64 `[queries, k]`; NaN for padding.
        paths: paths of the rows, without padding.
        labels: class numbers of the rows `[queries, k]`, -1 for padding; or None.
        classes: names of the classes, or None.
    """

    queries: tuple[str, ...]
    rows: np.ndarray
    similarities: np.ndarray
    paths: tuple[tuple[str, ...], ...]
    labels: np.ndarray | None
    classes: tuple[str, ...] | None


class Asked(NamedTuple):
    """Resolved queries.

    Attributes:
        names: names to show.
        vectors: features, float32 `[queries, F]`.
        own: the query's row in the table; -1 if it is not in the table.
        pixels: pixels of queries that are not in the table, uint8 `[c, h, w]`; otherwise None.
    """

    names: tuple[str, ...]
    vectors: np.ndarray
    own: Int64[np.ndarray, " q"]
    pixels: tuple[Tensor | None, ...]


def search(
    embeddings: Embeddings | str | Path,
    query: Any,
    *,
    k: int = 10,
    farthest: bool = False,
    approximate: bool = False,
    encoder: Any = None,
) -> Found:
    """Find the images most similar to one or more queries.

    Args:
        embeddings: the result of `moco.embed`, or a folder written by `moco embed`.
        query: an image file, a row number, a PIL image, a uint8 array `[h, w, c]` or tensor `[c, h, w]`; or several. A
            query that is itself in the table is not among its own answers.
        k: number of answers to each query; fewer if there are fewer images.
        farthest: find the least similar images instead, least similar first.
        approximate: search a graph of the table, which is built the first time and kept in its folder; most answers
            are those of the exact search, and their similarities are exact. Needs the extra `ann`.
        encoder: the encoder of the embeddings, or its location; not given: the one that they name. Row numbers need
            none.

    Returns:
        The answers to each query, best first.

    Raises:
        ValueError: a query cannot be read, or the encoder is not the one that computed these embeddings.
        ImportError: `approximate` was given, but its extra is not installed.

    Example:
        >>> moco.search("emb", "cat.jpg", k=3).paths                                         # doctest: +SKIP
        (('photos/cat2.jpg', 'photos/lynx.jpg', 'photos/dog.jpg'),)
    """
    table = load(embeddings) if isinstance(embeddings, str | Path) else embeddings
    return answer(table, ask(table, query, encoder=encoder), k=k, farthest=farthest, approximate=approximate)


def ask(table: Embeddings, query: Any, *, encoder: Any = None) -> Asked:
    """Resolve queries, given as in `search`, for `answer` and `picture`."""
    items = _items(query)
    if not items:
        raise ValueError("there is no query; expected an image file, an image or a row number")
    own = np.array([_row(table, item) for item in items], dtype=np.int64)
    vectors, pixels = np.empty((len(items), table.vectors.shape[1]), np.float32), list[Tensor | None]([None]) * len(own)
    vectors[own >= 0] = table.vectors[own[own >= 0]]
    others = np.flatnonzero(own < 0)
    if len(others):
        network, precision = _encoder_of(table, encoder)
        for place in others:
            pixels[place] = _pixels(items[place], network.channels)
        given = [centred(each[None], network.input_size) for each in pixels if each is not None]
        images = as_images(torch.cat(given), channels=network.channels)
        vectors[others] = features(network, images, precision=precision).numpy()
    names = [
        table.paths[row] if row >= 0 else str(item) if isinstance(item, str | Path) else f"query {place}"
        for place, (item, row) in enumerate(zip(items, own, strict=True))
    ]
    return Asked(tuple(names), vectors, own, tuple(pixels))


def answer(table: Embeddings, asked: Asked, *, k: int = 10, farthest: bool = False, approximate: bool = False) -> Found:
    """Answer resolved queries, as `search` does."""
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    if approximate and farthest:
        raise ValueError("farthest was given with approximate, which finds the most similar; leave one of them out")
    k = min(k, int((len(table) - (asked.own >= 0)).max()))
    if approximate:
        ranking = likely(table.vectors, asked.vectors, k, own=asked.own, saved=_graph_of(table))
    else:
        ranking = exact(table.vectors, asked.vectors, k, own=asked.own, farthest=farthest)
    rows = ranking.rows
    return Found(
        queries=asked.names,
        rows=rows,
        similarities=ranking.similarities,
        paths=tuple(tuple(table.paths[row] for row in each if row >= 0) for each in rows),
        labels=None if table.labels is None else np.where(rows < 0, -1, table.labels[rows]),
        classes=table.classes,
    )


def _graph_of(table: Embeddings) -> Path | None:
    """Where the graph for approximate search is kept; its name differs for another table in the same folder."""
    if table.folder is None:
        return None
    settings = read_meta(table.folder).settings.model_dump_json()
    return table.folder / f"graph-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.usearch"


def picture(
    embeddings: Embeddings | str | Path, asked: Asked, *, shown: int = SHOWN, images: Images | None = None
) -> Figure:
    """Draw each query with the images most and least similar to it, their classes and similarities.

    Args:
        embeddings: as in `search`.
        asked: queries resolved by `ask` for these embeddings.
        shown: number of images at either end.
        images: images of the rows; not given: read from their paths.
    """
    table = load(embeddings) if isinstance(embeddings, str | Path) else embeddings
    images = images or images_of(table)
    near, far = (answer(table, asked, k=shown, farthest=farthest) for farthest in (False, True))
    drawn = []
    for query, (row, pixels) in enumerate(zip(asked.own.tolist(), asked.pixels, strict=True)):
        sides = [
            [
                Alike(_small(images, None, index), table.class_of(index) or "", similarity)
                for index, similarity in zip(
                    found.rows[query].tolist(), found.similarities[query].tolist(), strict=True
                )
                if index >= 0
            ]
            for found in (near, far)
        ]
        title = table.class_of(row) if row >= 0 else None
        drawn.append(Neighbours(_small(images, pixels, row), title or Path(asked.names[query]).name, *sides))
    return neighbours(drawn)


def _small(images: Images | None, pixels: Tensor | None, row: int) -> np.ndarray:
    """A small image in its own aspect ratio; grey if the file is gone."""
    if pixels is None and images is not None:
        try:
            pixels = images.decode(row)
        except BadImage:
            pixels = None
    if pixels is None:
        return np.full((PIXELS, PIXELS), 128, np.uint8)
    return np.asarray(thumbnail(pixels, PIXELS))


def _items(query: Any) -> list[Any]:
    """Queries one by one."""
    if isinstance(query, Tensor | np.ndarray) and query.dtype in (torch.uint8, np.dtype(np.uint8)):
        return list(query) if query.ndim == 4 else [query]
    if isinstance(query, Tensor | np.ndarray):
        return query.reshape(-1).tolist()
    if isinstance(query, Sequence) and not isinstance(query, str):
        return list(query)
    return [query]


def _row(table: Embeddings, item: Any) -> int:
    """The query's row in the table; -1 if it is not in it."""
    if isinstance(item, bool | np.bool_):
        raise ValueError(f"a query is {item}; expected an image file, an image or a row number")
    if isinstance(item, int | np.integer):
        if not 0 <= item < len(table):
            raise ValueError(f"row {item} was asked for; expected 0 to {len(table) - 1}")
        return int(item)
    if not isinstance(item, str | Path):
        return -1
    path, whole, name = str(item), os.path.realpath(item), os.path.basename(os.path.abspath(item))
    for row, known in enumerate(table.paths):
        if known == path or (known.endswith(name) and os.path.realpath(known) == whole):
            return row
    return -1


def _pixels(item: Any, channels: int) -> UInt8[Tensor, "c h w"]:
    if isinstance(item, str | Path):
        return FileImages((str(item),), None, None, (), channels).decode(0)
    given = item[None] if isinstance(item, np.ndarray | Tensor) else [item]
    images = as_images(given, channels=channels)
    return images.decode(0)


def _encoder_of(table: Embeddings, given: Any) -> tuple[ImageEncoder, str]:
    """The encoder that computed a table, and its precision."""
    meta = read_meta(table.folder) if table.folder else None
    named = given if given is not None else table.encoder or (meta.encoder_source if meta else None)
    if named is None:
        raise ValueError("these embeddings do not say which encoder computed them; give the encoder (--encoder)")
    try:
        encoder = named if isinstance(named, ImageEncoder) else load_encoder(named)
    except FileNotFoundError as error:
        where = f"{table.folder} was embedded with {named}, which is no longer there"
        raise ValueError(f"{where} ({error}); give the encoder (--encoder)") from None
    if meta and fingerprint(encoder) != meta.settings.encoder:
        what = "the encoder" if isinstance(named, ImageEncoder) else str(named)
        raise ValueError(
            f"{what} is not what {table.folder} was embedded with (its hash differs; it may have been trained "
            "further); give the right one (--encoder), or embed the images again"
        )
    if encoder.num_features != table.vectors.shape[1]:
        raise ValueError(
            f"the encoder gives {encoder.num_features} features, these embeddings have {table.vectors.shape[1]}; give "
            "the encoder that computed them (--encoder)"
        )
    return encoder, meta.settings.precision if meta else "auto"
