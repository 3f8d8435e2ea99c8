import pytest
import torch
from torch import nn
from torch.testing import assert_close

from moco.method.small_map_convolution import SmallMapConv2d, convert


def gradients(conv: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = conv(x)
    (out.float() * weights).sum().backward()
    weight = next(conv.parameters())
    assert x.grad is not None and weight.grad is not None
    return out.detach(), x.grad, weight.grad


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "height", "width"),
    [(3, 1, 1, 4, 3), (3, 2, 1, 7, 8), (1, 2, 0, 5, 5), (1, 1, 0, 2, 2)],
)
def test_values_and_gradients_are_those_of_an_ordinary_convolution_but_for_rounding(
    kernel: int, stride: int, padding: int, height: int, width: int, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(192, 256, kernel, stride, padding, bias=False).to(memory_format=layout)
    x = torch.randn(6, 192, height, width).to(memory_format=layout)
    # What bf16 leaves of input and weight is the input and weight of the reference, in float64.
    exact = nn.Conv2d(192, 256, kernel, stride, padding, bias=False).double()
    exact.weight.data = conv.weight.detach().bfloat16().double()
    seen = x.bfloat16().double().requires_grad_()
    out = exact(seen)
    weights = torch.randn(out.shape).bfloat16().float()
    (out * weights.double()).sum().backward()
    assert seen.grad is not None and exact.weight.grad is not None

    net = nn.Sequential(conv)
    convert(net)
    assert isinstance(net[0], SmallMapConv2d) and net[0].weight is conv.weight
    answers = gradients(net, x, weights)
    for ours, theirs in zip(answers, (out.detach(), seen.grad, exact.weight.grad), strict=True):
        assert_close(ours.double(), theirs, rtol=2**-8, atol=2**-8 * theirs.abs().max().item())


def test_large_maps_and_other_precisions_take_the_ordinary_way() -> None:
    conv = nn.Conv2d(192, 192, 3, padding=1, bias=False)
    net = nn.Sequential(conv)
    convert(net)
    for side, dtype in ((8, torch.bfloat16), (4, torch.float32)):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
            assert net(torch.randn(2, 192, side, side)).grad_fn.name() == "ConvolutionBackward0"
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert "_Products" in net(torch.randn(2, 192, 4, 4)).grad_fn.name()


def test_only_plain_square_convolutions_of_many_channels_are_replaced_and_names_stay() -> None:
    left = [
        nn.Conv2d(64, 256, 3, bias=False),
        nn.Conv2d(256, 256, 3),
        nn.Conv2d(256, 256, 3, bias=False, groups=2),
        nn.Conv2d(256, 256, 3, bias=False, dilation=2),
        nn.Conv2d(256, 256, (3, 1), bias=False),
        nn.Conv2d(256, 256, 3, padding="same", bias=False),
        nn.Conv2d(256, 256, 3, padding=1, bias=False, padding_mode="reflect"),
    ]
    inner = nn.Sequential(nn.Conv2d(256, 192, 3, bias=False))
    net = nn.Sequential(inner, *left)
    names = list(net.state_dict())
    convert(net)
    assert list(net.state_dict()) == names
    assert isinstance(inner[0], SmallMapConv2d) and list(net[1:]) == left
