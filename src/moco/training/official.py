"""Continuing from a training checkpoint of the official code."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco.method.optim import key_momentum
from moco.storage import checkpoint
from moco.storage.foreign import QUERY_HEAD, Foreign
from moco.training.step import Training


def continue_from_official(training: Training, source: Foreign, path: Path) -> None:
    """Continue from a training checkpoint of the official code, at the start of its next epoch.

    The official code updates the key encoder before a step, this one after it: the missing update is made here.

    Args:
        training: freshly built; its weights, queue, optimizer and step are replaced.
        source: content of the checkpoint.
        path: the file, for messages.

    Raises:
        ValueError: what the file lacks, or how it differs from the settings.
    """
    parts = {
        "optimizer": bool(source.optimizer),
        "number of epochs": source.epoch is not None,
        "key encoder": bool(source.part("key_encoder.")),
        "queue": bool(source.part("queue.")) or training.core.queue is None,
    }
    if lacking := [name for name, there in parts.items() if not there]:
        raise ValueError(
            f"{path} holds no {' and no '.join(lacking)}, so training cannot be resumed from it (released files "
            f"never hold these); start from its weights with --init_from {path}"
        )
    config, epoch = training.config, source.epoch or 0
    done = epoch * training.loader.steps_per_epoch
    if done >= training.total:
        raise ValueError(f"{path} is already at epoch {epoch} of {config.epochs}; raise --epochs or --steps")
    optional = {
        name: tensor
        for name, tensor in training.core.state_dict().items()
        if name.endswith((".num_batches_tracked", "queue.ids"))
    }
    checkpoint.load_weights(training.core, optional | source.tensors, path)
    state = {"state": _optimizer_state(training, source, path)}
    training.optimizer.load_state_dict(training.optimizer.state_dict() | state)
    training.done = done
    planned = config.epochs * training.loader.steps_per_epoch
    momentum = key_momentum(config.model.momentum, config.model.momentum_schedule, done, total_steps=planned)
    no_keys = torch.empty(0, config.model.dim, device=training.fabric.device)
    training.core.update(no_keys, momentum=momentum)
    found = source.summary(QUERY_HEAD, "key_encoder.", "predictor.", "queue.")
    training.origin = f"continues at step {done} from {path}: {found}"


def _optimizer_state(training: Training, source: Foreign, path: Path) -> dict[int, dict[str, Any]]:
    """Return the optimizer's state of each trained parameter, by its number."""
    name, states = training.config.optim.name, source.optimizer or {}
    expected = ("momentum_buffer",) if name in ("sgd", "lars") else ("step", "exp_avg", "exp_avg_sq")
    result: dict[int, dict[str, Any]] = {}
    trained = [(n, each) for n, each in training.core.named_parameters() if each.requires_grad]
    for number, (parameter, value) in enumerate(trained):
        state = dict(states.get(parameter, {}))
        if "mu" in state:  # the name in the official LARS
            state["momentum_buffer"] = state.pop("mu")
        tensors = [state.get(key) for key in expected if key != "step"]
        fits = all(isinstance(each, Tensor) and each.shape == value.shape for each in tensors)
        if not fits or not state.keys() >= set(expected):
            raise ValueError(
                f"{path} holds the state of another optimizer: expected {' and '.join(expected)} of {parameter}, found "
                f"{' and '.join(state) or 'nothing'}; give the --optim.name it was trained with"
            )
        result[number] = {key: state[key] for key in expected}
    return result
