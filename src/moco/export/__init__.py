"""Exporting an encoder for other programs. Each export is loaded with the other program and its features compared."""

import copy
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moco.export import to_detectron2, to_official, to_onnx, to_safetensors, to_timm, to_torchvision
from moco.export.card import Check, model_card, versions
from moco.export.contract import Exporter, Subject, Written
from moco.files import write_atomically
from moco.messages import closest
from moco.method.encoder import ImageEncoder
from moco.storage.encoder_files import load_encoder
from moco.storage.run import Run
from moco.storage.unpickle import first_line

__all__ = ["EXPORTERS", "Exporter", "Subject", "Written", "export"]

EXPORTERS: dict[str, Exporter] = {
    "timm": to_timm.write,
    "torchvision": to_torchvision.write,
    "safetensors": to_safetensors.write,
    "onnx": to_onnx.write,
    "detectron2": to_detectron2.write,
    "official": to_official.write,
}

TOLERANCE = 1e-4
"""Largest difference of features, as a fraction of the largest feature."""


def export(encoder: ImageEncoder | str | Path, out: str | Path | None = None, *, format: str = "timm") -> Path:
    """Write an encoder in another program's format, with a model card.

    The export is loaded with that program (timm, torchvision, onnxruntime) and must give the same features; otherwise
    nothing is kept.

    Args:
        encoder: an encoder from `load_encoder`, or anything that `load_encoder` takes. For a run, the card also says
            how it was trained and how good it is, and `official` includes its head, key encoder and queue.
        out: folder to create; not given: `exports/FORMAT` in the run's folder.
        format: a name in `EXPORTERS`.

    Returns:
        The folder; `export.json` in it holds the largest difference and a SHA-256 of each file.

    Raises:
        ValueError: the format is unknown, or cannot hold this encoder.
        FileExistsError: `out` exists already and is not empty.
        ImportError: the format needs an extra that is not installed.
        RuntimeError: the export cannot be loaded, or gives different features.

    Example:
        >>> moco.export("runs/first", format="timm")                                         # doctest: +SKIP
        PosixPath('runs/first/exports/timm')
    """
    if format not in EXPORTERS:
        known = list(EXPORTERS)
        raise ValueError(f"unknown format {format!r}: expected one of {', '.join(known)}{closest(format, known)}")
    run = None
    if not isinstance(encoder, ImageEncoder):
        run = Run.open(encoder) if (Path(encoder) / "config.yaml").is_file() else None
    if out is None and run is None:
        raise ValueError("out is not given, and the encoder is not a run with a folder for exports; give out")
    out = Path(out) if out is not None else run.path / "exports" / format if run else Path()
    _refuse_taken(out)
    loaded = encoder if isinstance(encoder, ImageEncoder) else load_encoder(encoder)
    subject = Subject(copy.deepcopy(loaded).cpu().float().eval().requires_grad_(False), run)
    with _whole_or_nothing(out) as folder:
        written = EXPORTERS[format](subject, folder)
        check = _compared(subject.encoder, format, written, folder)
        record = {
            "format": format,
            "encoder": subject.encoder.describe(),
            "largest_difference": check.difference,
            "largest_feature": check.largest,
            "versions": versions(written.packages),
            "sha256": {file.name: _sha256(file) for file in sorted(folder.iterdir())},
        }
        _write_text(folder / "export.json", json.dumps(record, indent=2) + "\n")
        _write_text(folder / "README.md", model_card(subject, format, written, check))
    return out


def _compared(encoder: ImageEncoder, form: str, written: Written, folder: Path) -> Check:
    """Run the code in the model card, and compare its features with the encoder's."""
    generator, shape = torch.Generator().manual_seed(0), (encoder.channels, encoder.input_size, encoder.input_size)
    differences, sizes = [], []
    for count in written.counts:
        images = torch.randn(count, *shape, generator=generator)
        with torch.no_grad():
            expected = encoder(images)
            found = _loaded(form, written, folder, images)
        if found.shape != expected.shape:
            raise RuntimeError(f"the {form} export gives features {[*found.shape]}, the encoder {[*expected.shape]}")
        differences.append(float((found - expected).abs().max()))
        sizes.append(float(expected.abs().max()))
        if not differences[-1] <= TOLERANCE * sizes[-1]:  # also if either is NaN
            raise RuntimeError(
                f"features of the {form} export differ from the encoder's by {differences[-1]:.1e}, the largest being "
                f"{sizes[-1]:.1e}; nothing was kept"
            )
    return Check(max(differences), max(sizes), written.counts)


def _loaded(form: str, written: Written, folder: Path, images: Float[Tensor, "n c s s"]) -> Tensor:
    names: dict[str, Any] = {"folder": str(folder), "images": images}
    try:
        exec(written.code, names)  # our own code, built from checked names: the card shows what was run
        return torch.as_tensor(names["features"])
    except Exception as error:  # any library, any mismatch
        raise RuntimeError(f"the {form} export does not load: {first_line(error)}; nothing was kept") from error


def _refuse_taken(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already and is not empty; give another folder with --out, or remove it")


@contextmanager
def _whole_or_nothing(out: Path) -> Generator[Path]:
    """Yield a temporary folder beside `out` that replaces it at the end; after an error, neither exists."""
    out = out.resolve()
    made = [parent for parent in out.parents if not parent.exists()]
    temporary = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if out.is_dir():
            out.rmdir()  # it is empty, as checked before
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))
