"""Batch norm whose statistics do not leak which key belongs to a query (MoCo v1, section 3.3).

`split`: groups within a device. `shuffle`: ordinary batch norm on each device, over images exchanged between devices.
`sync`: one statistic over all devices (v3). All keep the parameter and buffer names and shapes of torch's BatchNorm2d.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from moco.parallel import collectives


def group_sizes(n: int, num_splits: int) -> list[int]:
    """How many of `n` images fall into each interleaved group (image i into group i mod num_splits)."""
    return [len(range(group, n, num_splits)) for group in range(min(n, num_splits))]


def grouped_order(n: int, num_splits: int, device: torch.device) -> Int64[Tensor, " n"]:
    """Return the order that puts the interleaved groups one behind the other."""
    return torch.cat([torch.arange(group, n, num_splits, device=device) for group in range(min(n, num_splits))])


class _GroupedNorm(torch.autograd.Function):
    """Batch norm over consecutive groups of a batch, each written in place into one output."""

    @staticmethod
    def forward(ctx, x, weight, bias, means, variances, sizes, eps):
        out, saved = torch.empty_like(x), []
        for part, target, mean, var in zip(x.split(sizes), out.split(sizes), means, variances, strict=True):
            stats = torch.empty_like(mean), torch.empty_like(mean)
            # momentum 1: the buffers are left holding the group's own mean and unbiased variance
            torch.native_batch_norm(part, weight, bias, mean, var, True, 1.0, eps, out=(target, *stats))
            saved += stats
        ctx.save_for_backward(x, weight, *saved)
        ctx.sizes, ctx.eps = sizes, eps
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, *saved = ctx.saved_tensors
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x, grad_weight, grad_bias = torch.empty_like(x), 0, 0
        parts = zip(x.split(ctx.sizes), grad.split(ctx.sizes), grad_x.split(ctx.sizes), strict=True)
        for group, (part, part_grad, target) in enumerate(parts):
            mean, invstd = saved[2 * group : 2 * group + 2]
            dx, dw, db = torch.ops.aten.native_batch_norm_backward(
                part_grad, part, weight, None, None, mean, invstd, True, ctx.eps, [True, True, True]
            )
            target.copy_(dx)
            if weight is not None:
                grad_weight, grad_bias = grad_weight + dw, grad_bias + db
        return grad_x, *((None, None) if weight is None else (grad_weight, grad_bias)), None, None, None, None


class _TrackedNorm(nn.Module):
    """Parameters and buffers as torch's BatchNorm2d has them; what is done in training is the subclass's."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, *, eps: float, momentum: float):
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))  # never counted, as in the reference
        self.after: nn.Module = nn.Identity()  # what a network has fused into its batch norm: an activation

    def _plain(self, x: Tensor) -> Tensor:
        stats = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(x, *stats, self.training, self.momentum, self.eps)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)


class SplitBatchNorm2d(_TrackedNorm):
    """Batch norm with statistics over `num_splits` interleaved groups: image i belongs to group i mod num_splits.

    Scale and shift are shared. Running statistics are the mean over groups of each group's update; in eval mode this is
    ordinary batch norm. Any batch size, memory format, and also `[n, c]` input.

    Args:
        num_features: channels c.
        num_splits: groups; 1 is ordinary batch norm.
        momentum: weight of the new value in the running statistics (torch's meaning: the fraction replaced).
        eps: added to the variance.
        grouped: the batch already comes with its groups one behind the other (`grouped_order`); spares two copies.
    """

    def __init__(
        self, num_features: int, num_splits: int = 8, *, momentum: float = 0.1, eps: float = 1e-5, grouped: bool = False
    ):
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.num_splits, self.grouped = num_splits, grouped

    def forward(self, x: Float[Tensor, "n c *hw"]) -> Float[Tensor, "n c *hw"]:
        if not self.training:
            return self.after(self._plain(x))
        sizes = group_sizes(len(x), self.num_splits)
        if min(sizes) * x[0, 0].numel() < 2:
            raise ValueError(
                f"{len(x)} images in {self.num_splits} batch-norm groups leave one with a single value a channel; "
                "expected at least 2: lower bn_splits or raise the batch size"
            )
        if not self.grouped:
            order = grouped_order(len(x), self.num_splits, x.device)
            x = x[order]
        means = self.running_mean.new_zeros(len(sizes), self.num_features)
        variances = torch.zeros_like(means)
        if not (x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))):
            x = x.contiguous()
        out = _GroupedNorm.apply(x, self.weight, self.bias, means, variances, sizes, self.eps)
        self._track(means.mean(dim=0), variances.mean(dim=0))
        return self.after(out if self.grouped else torch.empty_like(out).index_copy_(0, order, out))


class _SyncedNorm(torch.autograd.Function):
    """Batch norm over the batches of all ranks: one message forward, one backward, and of the batch only `x` is kept.

    Returns the output and, for the running statistics, the mean and biased variance over all ranks.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        wide, axes = torch.promote_types(x.dtype, torch.float32), [0, *range(2, x.ndim)]
        own = x.mean(axes, keepdim=True, dtype=wide)  # 1 c 1 1
        spread = (x - own).square_().mean(axes)  # two passes: no cancellation
        means, variances = collectives.gather(torch.stack([own.flatten(), spread])[None]).unbind(dim=1)  # ranks c
        mean = means.mean(dim=0)
        var = variances.mean(dim=0) + (means - mean).square().mean(dim=0)  # Chan et al. 1979, for equal counts
        invstd = torch.rsqrt(var + eps)
        scale = invstd if weight is None else invstd * weight.to(wide)
        out = (x - mean.view_as(own)).mul_(scale.view_as(own))
        if bias is not None:
            out += bias.to(wide).view_as(own)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.mark_non_differentiable(mean, var)
        return out.to(x.dtype), mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        x, weight, mean, invstd = ctx.saved_tensors
        axes, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        normal = (x - mean.view(shape)).mul_(invstd.view(shape))
        own = torch.stack([grad.sum(axes, dtype=mean.dtype), (grad * normal).sum(axes)])
        along_one, along_normal = collectives.all_reduce_sum(own) / (x.numel() // x.shape[1] * collectives.world_size())
        scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
        grad_x = normal.mul_(-along_normal.view(shape)).add_(grad).sub_(along_one.view(shape)).mul_(scale.view(shape))
        grad_bias, grad_weight = (None, None) if weight is None else own.to(weight.dtype)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None


class SyncBatchNorm(_TrackedNorm):
    """Batch norm over the batches of all ranks, each with as many images; any device, dtype and memory format."""

    def forward(self, x: Float[Tensor, "n c *hw"]) -> Float[Tensor, "n c *hw"]:
        if not self.training or collectives.world_size() == 1:
            return self.after(self._plain(x))
        out, mean, var = _SyncedNorm.apply(x, self.weight, self.bias, self.eps)
        count = x.numel() // x.shape[1] * collectives.world_size()
        self._track(mean, var * (count / max(count - 1, 1)))
        return self.after(out)


def convert(module: nn.Module, kind: str, *, num_splits: int = 8, grouped: bool = False) -> nn.Module:
    """Replace every torch batch norm below `module` by `split` or `sync`; `shuffle` and `plain` keep torch's.

    Parameters and buffers are carried over, so names, shapes and values stay.
    """
    if kind in ("plain", "shuffle"):
        return module
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, _converted(child, kind, num_splits, grouped))
        else:
            convert(child, kind, num_splits=num_splits, grouped=grouped)
    return module


def _converted(norm: nn.BatchNorm1d | nn.BatchNorm2d, kind: str, num_splits: int, grouped: bool) -> _TrackedNorm:
    momentum = 0.1 if norm.momentum is None else norm.momentum
    if kind == "split":
        new = SplitBatchNorm2d(norm.num_features, num_splits, momentum=momentum, eps=norm.eps, grouped=grouped)
    else:
        new = SyncBatchNorm(norm.num_features, eps=norm.eps, momentum=momentum)
    fused = [getattr(norm, name, None) for name in ("drop", "act")]  # timm's BatchNormAct2d
    new.after = nn.Sequential(*(module for module in fused if isinstance(module, nn.Module)))
    new.weight, new.bias = (norm.weight, norm.bias) if norm.affine else (None, None)
    if norm.running_mean is not None and norm.running_var is not None:
        new.running_mean, new.running_var = norm.running_mean, norm.running_var
    return new.train(norm.training)


@torch.no_grad()
def average_running_statistics(module: nn.Module) -> None:
    """Before evaluating or saving: every rank's running means and variances become their mean over ranks."""
    if collectives.world_size() == 1:
        return
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(collectives.all_reduce_sum(buffer) / collectives.world_size())
