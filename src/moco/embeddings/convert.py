"""Convert a finished table of embeddings for other programs."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

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
    check_format(format)
    return FORMATS[format](Path(folder), load(folder), images)


def check_format(format: str) -> None:
    """Raise those errors of `convert` that are known before anything is computed."""
    if format not in FORMATS:
        known = list(FORMATS)
        raise ValueError(f"unknown format {format!r}: expected one of {', '.join(known)}{closest(format, known)}")
    if format == "parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise ImportError(f"Parquet needs an extra: run {install('parquet')}") from None


def _to_parquet(folder: Path, embeddings: Embeddings, images: Images | None) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = embeddings.vectors.shape[1]
    types = {"path": pa.string(), "label": pa.int64(), "class": pa.string(), "vector": pa.list_(pa.float32(), columns)}
    schema = pa.schema(list(types.items()))
    step = max(1, BLOCK // columns)

    def write(file: BinaryIO) -> None:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for start in range(0, len(embeddings), step):
                rows = range(start, min(start + step, len(embeddings)))
                labels = [None] * len(rows) if embeddings.labels is None else embeddings.labels[rows].tolist()
                names = [embeddings.class_of(row) for row in rows]
                numbers = pa.array(np.array(embeddings.vectors[rows.start : rows.stop]).reshape(-1))
                arrays = [
                    pa.array([_readable(embeddings.paths[row]) for row in rows], pa.string()),
                    pa.array(labels, pa.int64()),
                    pa.array([None if name is None else _readable(name) for name in names], pa.string()),
                    pa.FixedSizeListArray.from_arrays(numbers, columns),
                ]
                writer.write_batch(pa.record_batch(arrays, schema=schema))

    write_atomically(folder / "embeddings.parquet", write)
    return folder / "embeddings.parquet"


def _to_projector(folder: Path, embeddings: Embeddings, images: Images | None) -> Path:
    """See https://github.com/tensorflow/tensorboard/blob/master/docs/tensorboard_projector_plugin.ipynb."""
    out, rows = folder / "tensorboard", evenly(len(embeddings), MAX_POINTS)
    name = _plain(str(read_meta(folder).encoder.get("backbone", "features")))
    lines = [f'tensor_name: "{name}"', 'tensor_path: "tensors.tsv"', 'metadata_path: "metadata.tsv"']
    lines += [f"tensor_shape: {number}" for number in (len(rows), embeddings.vectors.shape[1])]

    def write_vectors(file: BinaryIO) -> None:
        for start in range(0, len(rows), 1000):
            np.savetxt(file, embeddings.vectors[rows[start : start + 1000]], fmt="%.9g", delimiter="\t")

    def write_text(name: str, text: str) -> None:
        write_atomically(out / name, lambda file: file.write(text.encode()))

    write_atomically(out / "tensors.tsv", write_vectors)
    columns = 2 if embeddings.labels is None else 3
    table = [["row", "path", "class"][:columns]]
    table += [[str(row), embeddings.paths[row], embeddings.class_of(row) or ""][:columns] for row in rows.tolist()]
    write_text("metadata.tsv", "".join("\t".join(map(_plain, cells)) + "\n" for cells in table))
    images = images or images_of(embeddings)
    if images is not None:
        side, sprite = _sprite(images, rows)
        write_atomically(out / "sprite.png", lambda file: file.write(sprite))
        sizes = f"single_image_dim: {side} single_image_dim: {side}"
        lines.append(f'sprite {{ image_path: "sprite.png" {sizes} }}')
    write_text("projector_config.pbtxt", "embeddings {\n" + "".join(f"  {line}\n" for line in lines) + "}\n")
    return out


def _sprite(images: Images, rows: Int64[np.ndarray, " n"]) -> tuple[int, bytes]:
    """Return the side of a thumbnail's square, and the PNG of all squares, each with its thumbnail in the centre."""
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
    "npy": lambda folder, embeddings, images: folder,
    "parquet": _to_parquet,
    "tensorboard": _to_projector,
}


def _readable(text: str) -> str:
    """Return the text with bytes that are not UTF-8 written as escape sequences."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _plain(text: str) -> str:
    """Return the text without characters that would end a field or a line."""
    return "".join(letter if letter.isprintable() and letter not in '"\\' else "?" for letter in _readable(text))
