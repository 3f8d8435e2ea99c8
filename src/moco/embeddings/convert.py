"""Converting a finished table of embeddings for other programs."""

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int64
from PIL import Image

from moco.data import BadImage, Images
from moco.data.spacing import evenly
from moco.embeddings.table import Embeddings, images_of, load, read_meta
from moco.files import write_atomically
from moco.messages import closest
from moco.packages import install
from moco.views.pixels import thumbnail

MAX_POINTS = 10_000
"""Most rows for the projector, evenly spaced; a browser struggles to draw more."""
SPRITE, THUMBNAIL = 4096, 64
"""Most pixels along a side of all thumbnails together, and of one."""
AT_ONCE = 16
"""Images read at a time: camera-sized ones take tens of megabytes each until they are shrunk."""
BLOCK = 2**24
"""Values converted at a time."""


def convert(folder: str | Path, format: str, *, images: Images | None = None) -> Path:
    """Write a table in another format, into its own folder.

    Args:
        folder: folder of a finished table.
        format: `npy`, which it already has; `parquet` (columns path, label, class, vector); or `tensorboard`, for its
            projector, with thumbnails.
        images: images of the rows, for the thumbnails; not given: read from their paths.

    Returns:
        Path of the file or folder that was written.

    Raises:
        ValueError: the format is unknown, or the table is unfinished.
        ImportError: the format needs an extra that is not installed.

    Example:
        >>> convert("emb", "parquet")                                                        # doctest: +SKIP
        PosixPath('emb/embeddings.parquet')
    """
    if format not in FORMATS:
        known = list(FORMATS)
        raise ValueError(f"unknown format {format!r}: expected one of {', '.join(known)}{closest(format, known)}")
    return FORMATS[format](Path(folder), load(folder), images)


def refuse_missing(format: str) -> None:
    """Raise those errors of `convert` that are known before anything is computed."""
    if format not in FORMATS:
        convert(".", format)
    if format == "parquet":
        _pyarrow()


def _as_it_is(folder: Path, embeddings: Embeddings, images: Images | None) -> Path:
    return folder


def _to_parquet(folder: Path, embeddings: Embeddings, images: Images | None) -> Path:
    pa = _pyarrow()
    import pyarrow.parquet as pq

    columns = embeddings.vectors.shape[1]
    schema = pa.schema(
        [
            pa.field("path", pa.string()),
            pa.field("label", pa.int64()),
            pa.field("class", pa.string()),
            pa.field("vector", pa.list_(pa.float32(), columns)),
        ]
    )

    def write(file: BinaryIO) -> None:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for rows in _blocks(len(embeddings), columns):
                labels = [None] * len(rows) if embeddings.labels is None else embeddings.labels[rows].tolist()
                numbers = pa.array(np.array(embeddings.vectors[rows.start : rows.stop]).reshape(-1))
                arrays = [
                    pa.array([readable(embeddings.paths[row]) for row in rows], pa.string()),
                    pa.array(labels, pa.int64()),
                    pa.array([_readable_class(embeddings, row) for row in rows], pa.string()),
                    pa.FixedSizeListArray.from_arrays(numbers, columns),
                ]
                writer.write_batch(pa.record_batch(arrays, schema=schema))

    write_atomically(folder / "embeddings.parquet", write)
    return folder / "embeddings.parquet"


def _to_projector(folder: Path, embeddings: Embeddings, images: Images | None) -> Path:
    """See https://github.com/tensorflow/tensorboard/blob/master/docs/tensorboard_projector_plugin.ipynb."""
    out, rows = folder / "tensorboard", evenly(len(embeddings), MAX_POINTS)
    classed = embeddings.labels is not None
    config = [("tensor_name", read_meta(folder).encoder.get("backbone", "features")), ("tensor_path", "tensors.tsv")]
    config.append(("metadata_path", "metadata.tsv"))
    lines = [f'  {name}: "{_plain(str(value))}"' for name, value in config]
    lines += [f"  tensor_shape: {number}" for number in (len(rows), embeddings.vectors.shape[1])]

    def write_vectors(file: BinaryIO) -> None:
        for start in range(0, len(rows), 1000):
            np.savetxt(file, embeddings.vectors[rows[start : start + 1000]], fmt="%.9g", delimiter="\t")

    write_atomically(out / "tensors.tsv", write_vectors)
    named = [["row", "path", "class"][: 2 + classed]]
    named += [[str(row), embeddings.paths[row], embeddings.class_of(row) or ""][: 2 + classed] for row in rows.tolist()]
    text = "".join("\t".join(map(_plain, each)) + "\n" for each in named)
    write_atomically(out / "metadata.tsv", lambda file: file.write(text.encode()))
    images = images or images_of(embeddings)
    if images is not None:
        side, sprite = _sprite(images, rows)
        write_atomically(out / "sprite.png", lambda file: file.write(sprite))
        sizes = f"single_image_dim: {side} single_image_dim: {side}"
        lines.append(f'  sprite {{ image_path: "sprite.png" {sizes} }}')
    text_config = "embeddings {\n" + "\n".join(lines) + "\n}\n"
    write_atomically(out / "projector_config.pbtxt", lambda file: file.write(text_config.encode()))
    return out


def _sprite(images: Images, rows: Int64[np.ndarray, " n"]) -> tuple[int, bytes]:
    """The side of a thumbnail's square, and all thumbnails in one image, row by row, each centred in its square."""
    across = int(np.ceil(np.sqrt(len(rows))))
    side = min(THUMBNAIL, SPRITE // across)
    canvas = Image.new("RGB", (across * side, across * side), "white")
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE].tolist()
        for place, pixels in enumerate(images.decode_many(part), start):
            if isinstance(pixels, BadImage):
                continue
            picture = thumbnail(pixels, side)
            left, top = place % across * side, place // across * side
            canvas.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
    file = io.BytesIO()
    canvas.save(file, format="PNG")
    return side, file.getvalue()


FORMATS: Mapping[str, Callable[[Path, Embeddings, Images | None], Path]] = {
    "npy": _as_it_is,
    "parquet": _to_parquet,
    "tensorboard": _to_projector,
}


def readable(text: str) -> str:
    """The text with bytes that are not UTF-8 written as escape sequences."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _plain(text: str) -> str:
    """The text without characters that would end a field or a line."""
    return "".join(letter if letter.isprintable() and letter not in '"\\' else "?" for letter in readable(text))


def _readable_class(embeddings: Embeddings, row: int) -> str | None:
    name = embeddings.class_of(row)
    return None if name is None else readable(name)


def _blocks(rows: int, columns: int) -> Iterator[range]:
    step = max(1, BLOCK // columns)
    return (range(start, min(start + step, rows)) for start in range(0, rows, step))


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ImportError(f"Parquet needs an extra: run {install('parquet')}") from None
    return pyarrow
