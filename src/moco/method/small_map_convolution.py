"""Convolutions over small maps on a CPU: their weight gradient as one matrix product for each place of the kernel.

The convolution library takes 90 ms for one where these take 21 (bf16, 512 channels on 4x4 maps, batch 256, two cores
with a matrix unit; without one they are equal: results/LOG.md). The sums are the same.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

LEAST_CHANNELS, LARGEST_MAP = 192, 7
"""From how many channels and up to which side of the output the products were faster, at every size measured."""


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = conv2d_input(x.shape, weight, grad, ctx.stride, ctx.padding)
        return grad_x, _weight_gradient(grad, x, weight, ctx.stride, ctx.padding), None, None


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """dW[o, c, i, j] = sum over n, y, x of grad[n, o, y, x] * x[n, c, stride * y + i, stride * x + j], x padded."""
    (channels_out, channels_in, side, _), (height, width) = weight.shape, grad.shape[2:]
    pixels = F.pad(x.movedim(1, 3), (0, 0, padding, padding, padding, padding))  # n h w c
    rows = grad.movedim(1, 3).reshape(-1, channels_out).T  # o nhw
    result = grad.new_empty(channels_out, side, side, channels_in)  # as a weight lies in memory, channels last
    for i in range(side):
        for j in range(side):
            seen = pixels[:, i : i + stride * height : stride, j : j + stride * width : stride]
            result[:, i, j] = rows @ seen.reshape(-1, channels_in)
    return result.movedim(3, 1)


class SmallMapConv2d(nn.Module):
    """A convolution without bias; parameter and result are those of torch's Conv2d."""

    weight: Tensor

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.stride, self.padding = conv.weight, conv.stride[0], int(conv.padding[0])

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d oh ow"]:
        here = x.device.type
        dtype = torch.get_autocast_dtype(here) if torch.is_autocast_enabled(here) else x.dtype
        side = (max(x.shape[2:]) + 2 * self.padding - self.weight.shape[2]) // self.stride + 1
        if here == "cpu" and dtype == torch.bfloat16 and side <= LARGEST_MAP:
            return _Products.apply(x.to(dtype), self.weight.to(dtype), self.stride, self.padding)
        return F.conv2d(x, self.weight, None, self.stride, self.padding)


def convert(module: nn.Module) -> None:
    """Replace every convolution below `module` that has the channels; names, shapes and values stay."""
    for name, child in module.named_children():
        if type(child) is not nn.Conv2d:
            convert(child)
            continue
        plain = child.bias is None and child.groups == 1 and child.dilation == (1, 1) and child.padding_mode == "zeros"
        (side, other), (stride, second), padding = child.kernel_size, child.stride, child.padding
        square = side == other and stride == second and not isinstance(padding, str) and padding[0] == padding[1]
        if plain and square and min(child.in_channels, child.out_channels) >= LEAST_CHANNELS:
            setattr(module, name, SmallMapConv2d(child))
