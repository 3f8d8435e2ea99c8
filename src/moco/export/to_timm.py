"""A model folder for timm: config.json and model.safetensors, as `timm.create_model("local-dir:...")` reads them."""

import json
import math
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.data import resolve_model_data_config

from moco.export.contract import Subject, Written
from moco.export.networks import INSTEAD, in_timm
from moco.files import write_atomically

CODE = """\
import timm

model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
features = model(images)"""

ABOUT = """\
`timm` builds the network from `config.json` and loads the weights beside it; `num_classes=10` would add a new,
untrained classifier. `timm.data.resolve_model_data_config(model)` returns the image preparation described above, for
`timm.data.create_transform`. Uploaded to the Hugging Face hub, the folder loads as `hf-hub:NAME/OF-IT`."""


def write(subject: Subject, folder: Path) -> Written:
    """Write any network that timm has, one of v3's vision transformers, or a ResNet with the usual stem."""
    encoder, network = subject.encoder, in_timm(subject.encoder)
    if network is None:
        raise ValueError(f"timm has no network {encoder.name!r}; {INSTEAD}")
    if network.changes:
        what = "small-image stem" if encoder.stem != "imagenet" else "convolutional stem"
        raise ValueError(f"timm has no {network.architecture} with a {what}; {INSTEAD}; its card loads it with timm")
    about: Any = timm.get_pretrained_cfg(network.architecture)
    arguments = network.arguments
    any_size = not arguments.keys().isdisjoint({"dynamic_img_size", "strict_img_size"})
    if any_size:
        # The size that the position embeddings were made for, which is not the size images are resized to.
        patches: Any = encoder.backbone.get_submodule("patch_embed")
        arguments = arguments | {"img_size": list(patches.img_size)}
    prepared = {
        "input_size": [encoder.channels, encoder.input_size, encoder.input_size],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": subject.mean,
        "std": subject.std,
    }
    config = {
        "architecture": network.architecture,
        "num_classes": 0,
        "num_features": encoder.num_features,
        "model_args": arguments,
        # Complete: timm fills in missing fields from another checkpoint of that architecture.
        "pretrained_cfg": {
            "tag": "moco",
            "custom_load": False,
            **prepared,
            "fixed_input_size": bool(about and about.fixed_input_size and not any_size),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": about.first_conv if about else None,
            "classifier": about.classifier if about else None,
        },
    }
    text = json.dumps(config, indent=2) + "\n"
    write_atomically(folder / "config.json", lambda file: file.write(text.encode()))
    tensors = save(subject.weights, metadata={"format": "pt"})
    write_atomically(folder / "model.safetensors", lambda file: file.write(tensors))
    _check_preparation(folder, prepared)
    return Written(CODE, ABOUT, "timm", ("timm",))


def _check_preparation(folder: Path, expected: dict[str, Any]) -> None:
    with torch.device("meta"):  # what timm reads, without spending time on weights
        model = timm.create_model(f"local-dir:{folder}")
    for at_test in (False, True):
        found = resolve_model_data_config(model, use_test_size=at_test)
        for name, value in expected.items():
            same = list(found[name]) == value if isinstance(value, list) else found[name] == value
            if not same and not (isinstance(value, float) and math.isclose(found[name], value)):
                raise RuntimeError(f"timm reads {name} {found[name]} from what was written, expected {value}")
