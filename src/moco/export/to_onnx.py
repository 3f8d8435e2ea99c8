"""ONNX, for onnxruntime and everything else that reads it."""

import importlib
import io
import json
import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from moco.export.contract import Subject, Written
from moco.files import write_atomically
from moco.method.backbones import num_heads
from moco.packages import install
from moco.storage.unpickle import first_line

IN_ONE_FILE = 1_900_000_000
"""Most bytes of weights in one file: protobuf files are limited to 2 GiB, so larger weights go into a second file."""

CODE = """\
import onnxruntime

session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
[features] = session.run(["features"], {"images": images.numpy()})"""

ABOUT = """\
`model.onnx` (opset {opset}) takes `images`, float32 `[n, {channels}, {size}, {size}]` with any n, and returns
`features`, float32 `[n, {features}]`. It does not normalise: prepare images as described above, or as given in
`preprocessing.json` for programs."""


def write(subject: Subject, folder: Path) -> Written:
    """Write any encoder that torch can trace, for any number of images of the encoder's input size."""
    _need("onnx", "onnxscript", "onnxruntime")
    encoder = subject.encoder
    size, channels, weights = encoder.input_size, encoder.channels, subject.weights
    heads = num_heads(encoder.backbone)
    with _quiet():
        try:
            program: Any = torch.onnx.export(
                encoder.backbone,
                (torch.zeros(2, channels, size, size),),
                dynamo=True,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=({0: "n"},),
                verbose=False,
            )
            apart = sum(tensor.nbytes for tensor in weights.values()) > IN_ONE_FILE
            program.save(str(folder / "model.onnx"), external_data=apart)
        except OSError:
            raise
        except Exception as error:  # tracing runs the network's own code, and onnxscript's passes
            raise RuntimeError(f"torch.onnx cannot export {encoder.name!r}: {first_line(error)}") from error
    opset = program.model.opset_imports[""]
    about = {
        "input": "images",
        "output": "features",
        "layout": ["n", channels, size, size],
        "dtype": "float32",
        "resize": {"short_side": size, "interpolation": "bilinear", "antialias": True, "then": "center_crop"},
        "scale": 1 / 255,
        "mean": subject.mean,
        "std": subject.std,
        "num_features": encoder.num_features,
        **({} if heads is None else {"num_heads": heads}),
        "opset": opset,
    }
    text = json.dumps(about, indent=2) + "\n"
    write_atomically(folder / "preprocessing.json", lambda file: file.write(text.encode()))
    told = ABOUT.format(opset=opset, size=size, channels=channels, features=encoder.num_features)
    # Two batch sizes: a traced network may be fixed to the one it was traced with.
    return Written(CODE, told, "onnx", ("onnx", "onnxscript", "onnxruntime"), counts=(2, 3))


def _need(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            raise ImportError(f"--format onnx needs {package}, which is not installed; run {install('onnx')}") from None


@contextmanager
def _quiet() -> Generator[None]:
    """Silence the exporter, which prints its progress and its own deprecation warnings."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
