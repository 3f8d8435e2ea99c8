"""Optimizers, learning rates and the momentum of the key encoder.

The rates are pure functions of the step, so that a resumed run needs none of their history.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from moco.config import OptimConfig

# On any other device torch chooses the kernels.
FUSED_DEVICES = ("cpu", "cuda")


@final
class LARS(Optimizer):
    """SGD with updates proportional to the norm of each weight (arXiv:1708.03888), as in MoCo v3 (arXiv:2104.02057).

    For a weight p with two or more dimensions and gradient g, `g += weight_decay * p`, then, unless either norm is 0,
    `g *= trust_coefficient * |p| / |g|`. Biases and norms, with at most one dimension, get neither. For all of them,
    `buffer = momentum * buffer + g`, `p -= lr * buffer`: the learning rate stays outside the buffer.
    Norms are computed in at least float32 and never read by the host.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate; a number, not a tensor.
        momentum: Fraction of the buffer that is kept.
        weight_decay: Strength of the L2 penalty.
        trust_coefficient: Norm of one update at lr 1, as a fraction of the weight's.

    Raises:
        ValueError: A setting is negative.

    Example:
        >>> weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> weight.grad = torch.tensor([[0.0, 7.0]])
        >>> LARS([weight], lr=100.0).step()
        >>> weight.detach()
        tensor([[3.0000, 3.5000]])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        settings = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient)
        for name, value in settings.items():
            if not value >= 0:
                raise ValueError(f"LARS was given {name}={value}; expected a number of at least 0: change its sign")
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update every parameter that has a gradient; returns the closure's result, if one is given."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None and p.ndim > 1]
            vectors = [p for p in group["params"] if p.grad is not None and p.ndim <= 1]
            params = matrices + vectors
            if not params:
                continue
            decay, trust = group["weight_decay"], group["trust_coefficient"]
            gradients = _adapted(matrices, [p.grad for p in matrices], decay, trust)
            gradients += [p.grad for p in vectors]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])
        return loss


def _adapted(params: list[Tensor], gradients: list[Tensor], weight_decay: float, trust: float) -> list[Tensor]:
    """Gradients plus weight decay, scaled by the trust ratios: new tensors of at least float32."""
    if not params:
        return []
    weights = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in params]
    decayed = torch._foreach_add(gradients, weights, alpha=weight_decay)
    lengths, decayed_lengths = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, decayed))
    ratios = torch.where((lengths > 0) & (decayed_lengths > 0), trust * lengths / decayed_lengths, 1.0)
    torch._foreach_mul_(decayed, ratios.unbind())
    return list(decayed)


def build_optimizer(config: OptimConfig, params: Iterable[nn.Parameter], *, batch_size: int) -> Optimizer:
    """Build the configured optimizer at its peak learning rate, for the parameters that are not frozen.

    Weight decay applies to biases and norms, too, as in MoCo's reference code; only LARS leaves them out.

    Args:
        config: Settings of the optimizer.
        params: The model's parameters; those that require no gradient are left out.
        batch_size: Images per step over all devices.
    """
    trained = [p for p in params if p.requires_grad]
    lr, decay = resolved_lr(config, batch_size), config.weight_decay
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in trained) or None
    match config.name:
        case "lars":
            return LARS(trained, lr, momentum=config.momentum, weight_decay=decay)
        case "sgd":
            optimizer = torch.optim.SGD(trained, lr, momentum=config.momentum, weight_decay=decay, fused=fused)
        case "adam":
            optimizer = torch.optim.Adam(trained, lr, weight_decay=decay, fused=fused)
        case "adamw":
            optimizer = torch.optim.AdamW(trained, lr, weight_decay=decay, fused=fused)
    optimizer.register_load_state_dict_post_hook(_adopt_layout)
    return optimizer


def _adopt_layout(optimizer: Optimizer) -> None:
    """Give loaded state the memory layout of its parameter.

    torch's fused CPU kernels never compare strides: a run saved in channels_last and resumed without it would
    silently add each momentum to another weight.
    """
    for param, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == param.shape:
                state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)


def resolved_lr(config: OptimConfig, batch_size: int) -> float:
    """Peak learning rate: `base_lr * batch_size / 256` with the linear rule, else `base_lr` itself."""
    return config.base_lr * batch_size / 256 if config.lr_scaling == "linear" else config.base_lr


def learning_rate(config: OptimConfig, step: int, *, steps_per_epoch: int, epochs: int, batch_size: int) -> float:
    """Learning rate of one optimizer step, counted from 0.

    At epoch t of E, after a linear rise over w epochs: `lr / 2 * (1 + cos(pi * (t - w) / (E - w)))` for cosine
    (MoCo v2, v3), `lr * 0.1 ** (milestones reached)` for step (v1). Per step, t is a fraction (v3); per epoch, a
    whole number that starts at `first_epoch`; from 1, the last epoch of a cosine runs at exactly 0.
    """
    lr, warmup = resolved_lr(config, batch_size), config.warmup_epochs
    t = step / steps_per_epoch if config.per == "step" else step // steps_per_epoch + config.first_epoch
    if t < warmup:
        return lr * t / warmup
    match config.schedule:
        case "constant":
            return lr
        case "step":
            return lr * 0.1 ** sum(milestone <= t for milestone in config.milestones)
        case "cosine":
            return lr * _cosine((t - warmup) / (epochs - warmup) if epochs > warmup else 0.0)


def key_momentum(momentum: float, schedule: Literal["constant", "cosine"], step: int, *, total_steps: int) -> float:
    """Fraction of the key encoder that is kept; cosine rises from `momentum` at step 0 to 1 at the end (MoCo v3)."""
    return momentum if schedule == "constant" else 1 - _cosine(step / total_steps) * (1 - momentum)


def _cosine(progress: float) -> float:
    """Half a cosine from 1 down to 0, and 0 from then on."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group; one kept as a tensor is overwritten in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
