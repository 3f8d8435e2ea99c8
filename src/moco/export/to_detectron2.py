"""A pre-trained backbone for detectron2: a pickle with detectron2's own names.

detectron2 itself is not needed: the file is checked by reading it back and turning its names into torchvision's again.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torchvision

from moco.export.contract import Subject, Written
from moco.export.networks import INSTEAD, TorchvisionNetwork, in_torchvision
from moco.files import write_atomically

ABOUT = """\
`model.pkl` has detectron2's names for a ResNet and loads as `MODEL.WEIGHTS`. These settings tell detectron2 that this
is torchvision's kind of ResNet, with RGB input:

```yaml
INPUT:
  FORMAT: RGB
MODEL:
  WEIGHTS: model.pkl
  PIXEL_MEAN: {mean}
  PIXEL_STD: {std}
  BACKBONE:
    FREEZE_AT: 0
  RESNETS:
    DEPTH: {depth}
    NUM_GROUPS: {groups}
    WIDTH_PER_GROUP: {width}
    RES2_OUT_CHANNELS: {out}
    STRIDE_IN_1X1: false
    NORM: SyncBN
```

detectron2 itself was not run when this was written; the code below, which turns the names back, was."""

CODE = """\
import pickle
import re

{network}


def torchvision_name(name):
    name = re.sub(r"^res(\\d)", lambda found: f"layer{{int(found[1]) - 1}}", name.removeprefix("stem."))
    name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    return re.sub(r"conv(\\d)\\.norm", r"bn\\1", name)


with open(f"{{folder}}/model.pkl", "rb") as file:
    arrays = pickle.load(file)["model"]
weights = {{torchvision_name(name): torch.from_numpy(array) for name, array in arrays.items()}}
{loading}"""


def write(subject: Subject, folder: Path) -> Written:
    """Write a ResNet with the usual stem, which may be a wide one or a ResNeXt."""
    encoder = subject.encoder
    network = in_torchvision(encoder, form="detectron2")
    theirs = torchvision.models.get_model(network.name)
    if not isinstance(theirs, torchvision.models.ResNet):
        raise ValueError(f"--format detectron2 is for ResNets, but the encoder is {encoder.name!r}; {INSTEAD}")
    if network.changes:
        raise ValueError(f"detectron2's ResNets have a 7x7 stem for 3 channels, but this encoder does not; {INSTEAD}")
    arrays = {detectron2_name(name): tensor.numpy() for name, tensor in subject.weights.items()}
    content = {"model": arrays, "__author__": "MOCO", "matching_heuristics": True}
    write_atomically(folder / "model.pkl", lambda file: _Pickler(file, protocol=4).dump(content))
    return Written(_code(network), _about(subject, theirs), "detectron2", ("torchvision", "numpy"))


def detectron2_name(name: str) -> str:
    """Detectron2's name for a parameter that torchvision's ResNet calls `name`."""
    name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
    name = re.sub(r"bn(\d)", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return name if name.startswith("res") else f"stem.{name}"


class _Pickler(pickle.Pickler):
    """Pickles arrays so that any numpy can read them: numpy 2's own form names modules that numpy 1 does not have."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, bytearray(obj.tobytes()))
        return NotImplemented


def _code(network: TorchvisionNetwork) -> str:
    return CODE.format(network=network.code, loading=network.load("weights"))


def _about(subject: Subject, theirs: torchvision.models.ResNet) -> str:
    depth = re.search(r"\d+", subject.encoder.name)
    assert depth
    return ABOUT.format(
        mean=[round(255 * value, 4) for value in subject.mean],
        std=[round(255 * value, 4) for value in subject.std],
        depth=depth[0],
        groups=theirs.groups,
        width=theirs.base_width,
        out=64 if depth[0] in ("18", "34") else 256,
    )
