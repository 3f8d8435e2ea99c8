"""MoCo v1, v2 and v3 as their papers state them, on dictionaries of tensors; nothing comes from the package tested.

A batch is numbered; device r of W holds the images r, r + W, r + 2W and so on, and normalises over these alone.
v1: He et al. 2020, arXiv:1911.05722, algorithm 1, section 3.3. v2: Chen et al. 2020, arXiv:2003.04297, section 3.
v3: Chen, Xie, He 2021, arXiv:2104.02057, algorithm 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Net = dict[str, Tensor]
Batches = list[tuple[Tensor, Tensor]]


@dataclass
class Trace:
    """What training went through."""

    losses: list[float] = field(default_factory=list)
    key_encoders: list[Net] = field(default_factory=list)  # those that encoded the keys of each step
    queue: Tensor = field(default_factory=lambda: torch.empty(0))
    pointer: int = 0
    query_encoder: Net = field(default_factory=dict)


def batch_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    axes = [0, *range(2, x.ndim)]
    mean = x.mean(axes, keepdim=True)
    x = (x - mean) / ((x - mean).pow(2).mean(axes, keepdim=True) + 1e-5).sqrt()
    if weight is None or bias is None:
        return x
    shape = [1, -1] + [1] * (x.ndim - 2)
    return x * weight.view(shape) + bias.view(shape)


def features(net: Net, x: Tensor) -> Tensor:
    """The two convolutions of `small.SmallBackbone`, each with batch norm and ReLU; then the mean over pixels."""
    for conv, norm in (("0", "1"), ("3", "4")):
        x = F.conv2d(x, net[f"query_encoder.backbone.{conv}.weight"], stride=2)
        prefix = f"query_encoder.backbone.{norm}"
        x = batch_norm(x, net[f"{prefix}.weight"], net[f"{prefix}.bias"]).clamp(min=0)
    return x.mean((2, 3))


def v3_head(net: Net, prefix: str, x: Tensor, *, last_norm: bool) -> Tensor:
    """Linear layers without bias, batch norm and ReLU between them."""
    linear = sorted(name for name, p in net.items() if name.startswith(prefix) and p.ndim == 2)
    for name in linear:
        x = x @ net[name].T
        if name != linear[-1]:
            norm = f"{prefix}.{int(name.split('.')[-2]) + 1}"
            x = batch_norm(x, net[f"{norm}.weight"], net[f"{norm}.bias"]).clamp(min=0)
    return batch_norm(x) if last_norm else x


def unit(x: Tensor) -> Tensor:
    return x / x.pow(2).sum(dim=1, keepdim=True).sqrt()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    peak = logits.max(dim=1, keepdim=True).values
    total = peak[:, 0] + (logits - peak).exp().sum(dim=1).log()
    return (total - logits.gather(1, labels[:, None])[:, 0]).mean()


def follow(key: Net, query: Net, momentum: float) -> Net:
    return {name: momentum * key[name] + (1 - momentum) * query[name].detach() for name in key}


def mlp_head(net: Net, prefix: str, x: Tensor) -> Tensor:
    """v2's two linear layers with a ReLU between them."""
    hidden = (x @ net[f"{prefix}.0.weight"].T + net[f"{prefix}.0.bias"]).clamp(min=0)
    return hidden @ net[f"{prefix}.2.weight"].T + net[f"{prefix}.2.bias"]


def linear_head(net: Net, prefix: str, x: Tensor) -> Tensor:
    """v1's."""
    return x @ net[f"{prefix}.weight"].T + net[f"{prefix}.bias"]


HEADS = {"v1": linear_head, "v2": mlp_head}


def published_queue(
    variant: str,
    net: Net,
    queue: Tensor,
    batches: Batches,
    *,
    devices: int,
    shuffled: bool,
    symmetric: bool,
    temperature: float,
    momentum: Callable[[int], float],
    lr: float,
    weight_decay: float,
) -> Trace:
    """v1 or v2: the key encoder moves before the keys are taken, with the query encoder of before the step."""
    query, key = _start(net)
    slots, trace, buffers = list(queue), Trace(), {name: torch.zeros_like(p) for name, p in net.items()}

    def encode(net: Net, images: Tensor) -> Tensor:
        out = images.new_zeros(len(images), queue.shape[1])
        for device in range(devices):
            pooled = features(net, images[device::devices])
            out[device::devices] = HEADS[variant](net, "query_encoder.projector", pooled)
        return unit(out)

    def keys_of(images: Tensor, random: torch.Generator) -> Tensor:
        if not shuffled:
            return encode(key, images).detach()
        order = torch.randperm(len(images), generator=random)
        keys = torch.zeros(len(images), queue.shape[1], dtype=images.dtype)
        keys[order] = encode(key, images[order]).detach()
        return keys

    for step, (view1, view2) in enumerate(batches):
        key = follow(key, query, momentum(step))
        trace.key_encoders.append(key)
        random, negatives = torch.Generator().manual_seed(step), torch.stack(slots)
        keys2 = keys_of(view2, random)
        pairs = [(view1, keys2)]
        entering = keys2
        if symmetric:
            keys1 = keys_of(view1, random)
            pairs.append((view2, keys1))
            entering = torch.cat([keys1, keys2])
        loss = torch.zeros((), dtype=view1.dtype)
        for view, keys in pairs:
            q = encode(query, view)
            logits = torch.cat([(q * keys).sum(dim=1, keepdim=True), q @ negatives.T], dim=1) / temperature
            loss = loss + cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
        for (name, p), g in zip(query.items(), torch.autograd.grad(loss, list(query.values())), strict=True):
            buffers[name] = 0.9 * buffers[name] + g + weight_decay * p.detach()
        query = {name: (p.detach() - lr * buffers[name]).requires_grad_() for name, p in query.items()}
        for row in entering:
            slots[trace.pointer] = row
            trace.pointer = (trace.pointer + 1) % len(slots)
        trace.losses.append(loss.item())
    trace.queue, trace.query_encoder = torch.stack(slots), query
    return trace


def published_v3(
    net: Net,
    batches: Batches,
    *,
    predictor_norm: bool,
    temperature: float,
    momentum: Callable[[int], float],
    lr: float,
    weight_decay: float,
) -> Trace:
    """Batch norm over all devices; LARS with its learning rate outside the buffer."""
    query, key = _start(net)
    trace, buffers = Trace(), {name: torch.zeros_like(p) for name, p in net.items()}

    def project(net: Net, images: Tensor) -> Tensor:
        return v3_head(net, "query_encoder.projector", features(net, images), last_norm=True)

    for step, (view1, view2) in enumerate(batches):
        key = follow(key, query, momentum(step))
        trace.key_encoders.append(key)
        loss = torch.zeros((), dtype=view1.dtype)
        for view, other in ((view1, view2), (view2, view1)):
            q = unit(v3_head(query, "predictor", project(query, view), last_norm=predictor_norm))
            k = unit(project(key, other)).detach()
            loss = loss + 2 * temperature * cross_entropy(q @ k.T / temperature, torch.arange(len(q)))
        for (name, p), g in zip(query.items(), torch.autograd.grad(loss, list(query.values())), strict=True):
            if p.ndim > 1:
                g = g + weight_decay * p.detach()
                g = g * 0.001 * p.detach().norm() / g.norm()
            buffers[name] = 0.9 * buffers[name] + g
        query = {name: (p.detach() - lr * buffers[name]).requires_grad_() for name, p in query.items()}
        trace.losses.append(loss.item())
    trace.query_encoder = query
    return trace


def _start(net: Net) -> tuple[Net, Net]:
    query = {name: p.clone().requires_grad_() for name, p in net.items()}
    return query, {name: p.clone() for name, p in net.items() if name.startswith("query_encoder")}
