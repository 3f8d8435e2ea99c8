"""The layout of the authors' own checkpoints, which many tools read: that of v1 and v2, and that of v3."""

from pathlib import Path

import torch
from torch import Tensor

from moco.export.contract import Subject, Written
from moco.export.networks import in_torchvision, standalone
from moco.files import write_atomically
from moco.method.backbones import num_heads
from moco.method.vit import VITS
from moco.storage import checkpoint
from moco.storage.run import Run

ABOUT = """\
`checkpoint.pth.tar` holds `epoch`, `arch` and `state_dict`, named as in the authors' code (the encoder under
`{prefix}`), for their linear classification and every tool that reads their files. It holds no optimizer,
so their code cannot resume training from it.

{held}"""

CODE = """\
{network}
state = torch.load(f"{{folder}}/checkpoint.pth.tar", map_location="cpu", weights_only=True)["state_dict"]
prefix = "{prefix}"
weights = {{name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}}
weights = {{name: tensor for name, tensor in weights.items() if not name.startswith("{head}.")}}
{loading}"""

WHOLE = """\
Besides the query encoder, it holds the head, the key encoder and {rest}. The key encoder is one update ahead of that in
the authors' files: their code updates it before a step, this one after it."""
BARE = "It holds only the backbone of the query encoder{why}."


def write(subject: Subject, folder: Path) -> Written:
    """Write a ResNet with the usual stem or one of v3's vision transformers; from a run, the whole model."""
    encoder, run = subject.encoder, subject.run
    is_v3 = run.config.model.variant == "v3" if run else encoder.name in VITS
    prefix, key_prefix = (
        ("module.base_encoder.", "module.momentum_encoder.") if is_v3 else ("module.encoder_q.", "module.encoder_k.")
    )
    if encoder.name in VITS:
        architecture, head, packages = encoder.name.removesuffix("-v3").replace("-", "_"), "head", ("timm",)
        network, _ = standalone(encoder)
        loading = "model.load_state_dict(weights)\nfeatures = model.eval()(images)"
    else:
        theirs = in_torchvision(encoder, form="official")
        if theirs.changes or theirs.head != "fc":
            raise ValueError(
                f"the official code has ResNets with a 7x7 stem for 3 channels, but this encoder ({encoder.name!r}) is "
                "different; use --format torchvision or safetensors"
            )
        architecture, head, packages = theirs.name, theirs.head, ("torchvision",)
        network, loading = theirs.code, theirs.load("weights")
    state = {prefix + name: tensor for name, tensor in subject.weights.items()}
    rest, why, epoch = _rest(subject, prefix, key_prefix, head)
    heads = num_heads(encoder.backbone)
    about = {"epoch": epoch, "arch": architecture} | ({} if heads is None else {"num_heads": heads})
    content = about | {"state_dict": state | rest}
    write_atomically(folder / "checkpoint.pth.tar", lambda file: torch.save(content, file))
    held = WHOLE.format(rest="the predictor" if is_v3 else "the queue") if rest else BARE.format(why=why)
    code = CODE.format(network=network, prefix=prefix, head=head, loading=loading)
    return Written(code, ABOUT.format(prefix=prefix, held=held), "pytorch", packages)


def _rest(subject: Subject, prefix: str, key_prefix: str, head: str) -> tuple[dict[str, Tensor], str, int]:
    """Return a run's tensors besides the backbone, by official names; why there are none; and completed epochs."""
    run = subject.run
    if run is None:
        return {}, "", 0
    if not run.last.is_file():
        return {}, ", because the run has no checkpoint", 0
    state = checkpoint.load(run.last)
    ours = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state["model"].items()}
    epoch = _epochs(run, state["step"])
    backbone = _part(ours, "query_encoder.backbone.", "")
    weights = subject.weights
    if backbone.keys() != weights.keys() or any(not torch.equal(backbone[name], weights[name]) for name in weights):
        return {}, ", because the run's last checkpoint is from another step than its encoder", epoch
    model = run.config.model
    if model.variant != "v3" and model.head == "mlp_bn":
        return {}, ", because the official code has no head with batch norm", epoch
    named = _part(ours, "query_encoder.projector.", f"{prefix}{head}.")
    named |= _part(ours, "key_encoder.backbone.", key_prefix)
    named |= _part(ours, "key_encoder.projector.", f"{key_prefix}{head}.")
    named |= _part(ours, "predictor.", "module.predictor.")
    if "queue.keys" in ours:
        named["module.queue"] = ours["queue.keys"].T.contiguous()
        named["module.queue_ptr"] = ours["queue.pointer"].reshape(1)
    return named, "", epoch


def _part(tensors: dict[str, Tensor], prefix: str, new: str) -> dict[str, Tensor]:
    return {new + name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def _epochs(run: Run, step: int) -> int:
    """Epochs completed at that step, according to the metrics."""
    return int(max((row["epoch"] for row in run.metrics if row["step"] <= step), default=0))
