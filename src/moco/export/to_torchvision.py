"""A plain state dict with torchvision's names and no classifier."""

from pathlib import Path

import torch

from moco.export.contract import Subject, Written
from moco.export.networks import in_torchvision
from moco.files import write_atomically

ABOUT = "`model.pth` is a plain state dict with torchvision's names, without the classifier `{head}`.{changed}"


def write(subject: Subject, folder: Path) -> Written:
    """Write a network that torchvision has with the same parameter names; a ResNet's stem may differ."""
    network = in_torchvision(subject.encoder, form="torchvision")
    write_atomically(folder / "model.pth", lambda file: torch.save(subject.weights, file))
    changed = " Its first convolution is not torchvision's: change it first, as below." if network.changes else ""
    loading = network.load("weights")
    code = f'{network.code}\nweights = torch.load(f"{{folder}}/model.pth", weights_only=True)\n{loading}'
    return Written(code, ABOUT.format(head=network.head, changed=changed), "pytorch", ("torchvision",))
