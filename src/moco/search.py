"""The images of a table of embeddings that are most, or least, like a query: exact, by cosine similarity."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from moco.checkpoint import load_encoder
from moco.data import ArrayImages, BadImage, FileImages, Images, as_images
from moco.embed import features, fingerprint
from moco.encoder import ImageEncoder
from moco.figures import Neighbours, neighbours
from moco.neighbours import nearest
from moco.transforms import centred
from moco.vectors import Embeddings, images_of, load, read_meta

MARGINS = 32, 1024
"""Further rows that are looked at in float64; the larger number where more than the smaller lie at the border."""
ROUNDING = 1e-5
"""More than two similarities in float32 can be wrong by together."""
SHOWN, PIXELS = 5, 160
"""Images of a picture at either end, and the longer side that they are brought to."""


@dataclass(frozen=True, eq=False)
class Found:
    """Images like, or unlike, some queries; the most so first.

    Attributes:
        queries: names.
        rows: of the table, int64 `[queries, k]`.
        similarities: cosines, float64 `[queries, k]`.
        paths: names of the rows.
        labels: class numbers of the rows `[queries, k]`, or None.
        classes: names of the class numbers, or None.
    """

    queries: tuple[str, ...]
    rows: np.ndarray
    similarities: np.ndarray
    paths: tuple[tuple[str, ...], ...]
    labels: np.ndarray | None
    classes: tuple[str, ...] | None


class Asked(NamedTuple):
    """Queries, understood.

    Attributes:
        names: to be shown.
        vectors: float32 `[queries, F]`.
        own: row of the table that a query is; -1: it is another image.
        pixels: of other images, uint8 `[c, h, w]`.
    """

    names: tuple[str, ...]
    vectors: np.ndarray
    own: Int64[np.ndarray, " q"]
    pixels: tuple[Tensor | None, ...]


def search(
    embeddings: Embeddings | str | Path, query: Any, *, k: int = 10, farthest: bool = False, encoder: Any = None
) -> Found:
    """The images most similar to others.

    Args:
        embeddings: what `moco.embed` gives, or a folder that `moco embed` made.
        query: an image file, a row number, a PIL image, a uint8 array `[h, w, c]` or tensor `[c, h, w]`; or several. A
            query that is itself in the table is not among its own answers.
        k: answers to each; fewer if there are fewer images.
        farthest: the least similar instead, the least so first.
        encoder: of the embeddings, or where it is; not given: the one that they name. Row numbers need none.

    Raises:
        ValueError: a query that cannot be read, or an encoder that did not compute these embeddings.

    Example:
        >>> moco.search("emb", "cat.jpg", k=3).paths                                         # doctest: +SKIP
        (('photos/cat2.jpg', 'photos/lynx.jpg', 'photos/dog.jpg'),)
    """
    table = load(embeddings) if isinstance(embeddings, str | Path) else embeddings
    return answer(table, ask(table, query, encoder=encoder), k=k, farthest=farthest)


def ask(table: Embeddings, query: Any, *, encoder: Any = None) -> Asked:
    """Queries as `search` takes them, ready for `answer` and `picture`."""
    items = _items(query)
    if not items:
        raise ValueError("there is no query; expected an image file, a picture or a row number")
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


def answer(table: Embeddings, asked: Asked, *, k: int = 10, farthest: bool = False) -> Found:
    """As `search`, of queries that have been understood."""
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    k = min(k, len(table) - bool((asked.own >= 0).any()))
    rows, similarities = _exact(table.vectors, asked, k, sign=-1 if farthest else 1)
    return Found(
        queries=asked.names,
        rows=rows,
        similarities=similarities,
        paths=tuple(tuple(table.paths[row] for row in each) for each in rows),
        labels=None if table.labels is None else table.labels[rows],
        classes=table.classes,
    )


def _exact(vectors: np.ndarray, asked: Asked, k: int, *, sign: int) -> tuple[np.ndarray, np.ndarray]:
    """The ranking that float64 gives, equals by row number: float32 finds some more, float64 puts them in order."""
    rows, similarities = np.empty((len(asked.own), k), np.int64), np.empty((len(asked.own), k))
    open_, most = np.arange(len(asked.own)), len(vectors) - (asked.own >= 0)
    for margin in MARGINS:
        queries = torch.from_numpy(sign * asked.vectors[open_])
        found = nearest(vectors, queries, k + margin, own=torch.from_numpy(asked.own[open_]))
        if found.similarity.isnan().any():
            bad = int(found.index[found.similarity.isnan()][0])
            raise ValueError(f"the vector of a query or of row {bad} is not finite; the encoder is broken")
        unsure = []
        for place, index, similarity in zip(open_, found.index.numpy(), found.similarity.numpy(), strict=True):
            index = index[: most[place]]
            cosine = _cosines(asked.vectors[place], vectors[index])
            order = np.lexsort((index, -sign * cosine))[:k]
            rows[place], similarities[place] = index[order], cosine[order]
            if len(index) < most[place] and sign * cosine[order[-1]] - similarity[-1] < ROUNDING:
                unsure.append(place)
        open_ = np.array(unsure, dtype=np.int64)
        if not len(open_):
            break
    return rows, similarities


def _cosines(query: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    one, many = query.astype(np.float64), vectors.astype(np.float64)
    length = np.linalg.norm(one) * np.linalg.norm(many, axis=1)
    return many @ one / np.maximum(length, 1e-300)


def picture(
    embeddings: Embeddings | str | Path, asked: Asked, *, shown: int = SHOWN, images: Images | None = None
) -> Figure:
    """Each query with the images most and least like it, their classes and similarities.

    Args:
        embeddings: as for `search`.
        asked: what `ask` gives for these embeddings.
        shown: images at either end.
        images: of the rows; not given: looked for where they were.
    """
    table = load(embeddings) if isinstance(embeddings, str | Path) else embeddings
    images = images or images_of(table)
    near, far = (answer(table, asked, k=shown, farthest=farthest) for farthest in (False, True))
    drawn = []
    for query, (row, pixels) in enumerate(zip(asked.own.tolist(), asked.pixels, strict=True)):
        sides = [
            [
                (_small(images, None, index), f"{(table.class_of(index) or '')[:12]} {similarity:.2f}".lstrip())
                for index, similarity in zip(found.rows[query].tolist(), found.similarities[query], strict=True)
            ]
            for found in (near, far)
        ]
        title = table.class_of(row) if row >= 0 else None
        drawn.append(Neighbours(_small(images, pixels, row), title or Path(asked.names[query]).name, *sides))
    return neighbours(drawn)


def _small(images: Images | None, pixels: Tensor | None, row: int) -> np.ndarray:
    """A picture in its own proportions; grey where there is none any more."""
    if pixels is None and images is not None:
        try:
            pixels = images.decode(row)
        except BadImage:
            pixels = None
    if pixels is None:
        return np.full((PIXELS, PIXELS), 128, np.uint8)
    array = pixels.movedim(0, 2).numpy()
    small = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    small.thumbnail((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    return np.asarray(small)


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
    """Of the table; -1: the query is none of its rows."""
    if isinstance(item, int | np.integer):
        if not 0 <= item < len(table):
            raise ValueError(f"row {item} was asked for; expected 0 to {len(table) - 1}")
        return int(item)
    if not isinstance(item, str | Path):
        return -1
    path, whole = str(item), Path(item).absolute()
    for row, known in enumerate(table.paths):
        if known == path or (known.endswith(whole.name) and Path(known).absolute() == whole):
            return row
    return -1


def _pixels(item: Any, channels: int) -> UInt8[Tensor, "c h w"]:
    if isinstance(item, str | Path):
        return FileImages((str(item),), None, None, (), channels).decode(0)
    given = item[None] if isinstance(item, np.ndarray | Tensor) else [item]
    images = as_images(given, channels=channels)
    assert isinstance(images, ArrayImages)
    return images.images[0]


def _encoder_of(table: Embeddings, given: Any) -> tuple[ImageEncoder, str]:
    """The encoder that computed a table, and in which arithmetic."""
    meta = read_meta(table.folder) if table.folder else None
    named = given if given is not None else table.encoder or (meta.encoder_source if meta else None)
    if named is None:
        raise ValueError("these embeddings do not say what encoder computed them; give it as encoder (--encoder)")
    try:
        encoder = named if isinstance(named, ImageEncoder) else load_encoder(named)
    except FileNotFoundError as error:
        where = f"{table.folder} was embedded with {named}, which is not there any more"
        raise ValueError(f"{where} ({error}); give the encoder (--encoder)") from None
    if meta and fingerprint(encoder) != meta.settings.encoder:
        what = "the encoder" if isinstance(named, ImageEncoder) else str(named)
        raise ValueError(
            f"{what} is not what {table.folder} was embedded with (its hash differs, it may have been trained on); "
            "give the right one (--encoder), or embed the images anew"
        )
    if encoder.num_features != table.vectors.shape[1]:
        raise ValueError(
            f"the encoder gives {encoder.num_features} features, these embeddings have {table.vectors.shape[1]}; give "
            "the encoder that computed them (--encoder)"
        )
    return encoder, meta.settings.precision if meta else "auto"
