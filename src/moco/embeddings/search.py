"""Find the images in a table of embeddings that are most, or least, similar to a query, by cosine similarity."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
from moco.embeddings.ranking import rank_all, rank_candidates
from moco.embeddings.table import Embeddings, images_of, load, read_meta
from moco.figures import Alike, Neighbours, neighbours
from moco.method.encoder import ImageEncoder
from moco.storage.encoder_files import load_encoder
from moco.views.pixels import centred, thumbnail

COUNT, LONGER_SIDE = 5, 160
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


class Queries(NamedTuple):
    """What to search for.

    Attributes:
        names: names to show.
        vectors: features, float32 `[queries, F]`.
        own: the query's row in the table; -1 if it is not in the table.
        pixels: uint8 `[c, h, w]` by number of the query, for queries that are not in the table.
    """

    names: tuple[str, ...]
    vectors: np.ndarray
    own: Int64[np.ndarray, " q"]
    pixels: Mapping[int, Tensor]


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
    queries = read_queries(table, query, encoder=encoder)
    return answer(table, queries, k=k, farthest=farthest, approximate=approximate)


def read_queries(table: Embeddings, query: Any, *, encoder: Any = None) -> Queries:
    """Read queries, which are given as in `search`, for `answer` and `picture`."""
    items = _items(query)
    if not items:
        raise ValueError("there is no query; expected an image file, an image or a row number")
    own = np.array([_row(table, item) for item in items], dtype=np.int64)
    vectors, pixels = np.empty((len(items), table.vectors.shape[1]), np.float32), dict[int, Tensor]()
    vectors[own >= 0] = table.vectors[own[own >= 0]]
    others = np.flatnonzero(own < 0).tolist()
    if others:
        network, precision = _encoder_of(table, encoder)
        pixels = {place: _pixels(items[place], network.channels) for place in others}
        crops = torch.cat([centred(each[None], network.input_size) for each in pixels.values()])
        vectors[others] = features(network, as_images(crops, channels=network.channels), precision=precision).numpy()
    names = [
        table.paths[row] if row >= 0 else str(item) if isinstance(item, str | Path) else f"query {place}"
        for place, (item, row) in enumerate(zip(items, own, strict=True))
    ]
    return Queries(tuple(names), vectors, own, pixels)


def answer(
    table: Embeddings, queries: Queries, *, k: int = 10, farthest: bool = False, approximate: bool = False
) -> Found:
    """Answer queries, as `search` does."""
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    if approximate and farthest:
        raise ValueError("farthest was given with approximate, which finds the most similar; leave one of them out")
    vectors, own = queries.vectors, queries.own
    k = min(k, int((len(table) - (own >= 0)).max()))
    if approximate:
        rows, similarities = rank_candidates(table.vectors, vectors, k, own=own, saved=_graph_file(table))
    else:
        rows, similarities = rank_all(table.vectors, vectors, k, own=own, farthest=farthest)
    return Found(
        queries=queries.names,
        rows=rows,
        similarities=similarities,
        paths=tuple(tuple(table.paths[row] for row in each if row >= 0) for each in rows),
        labels=None if table.labels is None else np.where(rows < 0, -1, table.labels[rows]),
        classes=table.classes,
    )


def _graph_file(table: Embeddings) -> Path | None:
    """Return where the graph for approximate search is kept; another table in the same folder has another name."""
    if table.folder is None:
        return None
    settings = read_meta(table.folder).settings.model_dump_json()
    return table.folder / f"graph-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.usearch"


def picture(table: Embeddings, queries: Queries, *, count: int = COUNT, images: Images | None = None) -> Figure:
    """Draw each query with the `count` images most and least similar to it, their classes and similarities.

    The images of the rows are read from their paths, unless they are given.
    """
    images = images or images_of(table)
    ends = [answer(table, queries, k=count, farthest=farthest) for farthest in (False, True)]
    drawn = []
    for number, (name, row) in enumerate(zip(queries.names, queries.own.tolist(), strict=True)):
        sides = [
            [
                Alike(_small(images, None, index), table.class_of(index) or "", similarity)
                for index, similarity in zip(found.rows[number].tolist(), found.similarities[number], strict=True)
                if index >= 0
            ]
            for found in ends
        ]
        title = table.class_of(row) if row >= 0 else None
        drawn.append(Neighbours(_small(images, queries.pixels.get(number), row), title or Path(name).name, *sides))
    return neighbours(drawn)


def _small(images: Images | None, pixels: Tensor | None, row: int) -> np.ndarray:
    """Return the small image of a row, or of pixels, in its own aspect ratio; grey if the file no longer exists."""
    if pixels is None and images is not None:
        with suppress(BadImage):
            pixels = images.decode(row)
    if pixels is None:
        return np.full((LONGER_SIDE, LONGER_SIDE), 128, np.uint8)
    return np.asarray(thumbnail(pixels, LONGER_SIDE))


def _items(query: Any) -> list[Any]:
    """Return the queries one by one."""
    if isinstance(query, Tensor | np.ndarray) and query.dtype in (torch.uint8, np.dtype(np.uint8)):
        return list(query) if query.ndim == 4 else [query]
    if isinstance(query, Tensor | np.ndarray):
        return query.reshape(-1).tolist()
    if isinstance(query, Sequence) and not isinstance(query, str):
        return list(query)
    return [query]


def _row(table: Embeddings, item: Any) -> int:
    """Return the query's row in the table; -1 if it is not in it."""
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
    return as_images(item[None] if isinstance(item, np.ndarray | Tensor) else [item], channels=channels).decode(0)


def _encoder_of(table: Embeddings, source: Any) -> tuple[ImageEncoder, str]:
    """Return the encoder that computed a table, and its precision; `source` is the encoder or where to find it."""
    meta = read_meta(table.folder) if table.folder else None
    source = source if source is not None else table.encoder or (meta.encoder_source if meta else None)
    if source is None:
        raise ValueError("these embeddings do not say which encoder computed them; give the encoder (--encoder)")
    try:
        encoder = source if isinstance(source, ImageEncoder) else load_encoder(source)
    except FileNotFoundError as error:
        where = f"{table.folder} was embedded with {source}, which is no longer there"
        raise ValueError(f"{where} ({error}); give the encoder (--encoder)") from None
    if meta and fingerprint(encoder) != meta.settings.encoder:
        what = "the encoder" if isinstance(source, ImageEncoder) else str(source)
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
