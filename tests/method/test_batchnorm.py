from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import moco
from moco.method.batchnorm import SyncBatchNorm, average_running_statistics, convert, group_sizes, grouped_order
from moco.method.encoder import Encoder

CHANNELS = 3


def images(n: int, *, hw: tuple[int, ...] = (4, 5), seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(n, CHANNELS, *hw, generator=random, dtype=torch.float64) + 1).to(dtype)


def scaled(norm: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    """Scale, shift and running statistics that are none of 0 and 1."""
    norm.load_state_dict(
        {
            "weight": torch.tensor([0.5, -1.5, 2.0]),
            "bias": torch.tensor([0.1, 0.2, -0.3]),
            "running_mean": torch.tensor([0.3, -0.2, 0.7]),
            "running_var": torch.tensor([1.5, 0.7, 2.1]),
            "num_batches_tracked": torch.tensor(0),
        }
    )
    return norm.to(dtype)


def loop_over_groups(x: Tensor, num_splits: int) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Output, gradients of the weighted sum of it by x, weight and bias, and running statistics: x[j::s] by x[j::s]."""
    x = x.detach().clone().requires_grad_()
    weight, bias = torch.tensor([0.5, -1.5, 2.0]).to(x), torch.tensor([0.1, 0.2, -0.3]).to(x)
    weight.requires_grad_(), bias.requires_grad_()
    rows: list[Tensor] = [x.new_empty(0)] * len(x)
    means, variances = [], []
    for j in range(min(num_splits, len(x))):
        group = x[j::num_splits]
        axes = [0, *range(2, x.ndim)]
        mean = group.mean(axes, keepdim=True)
        biased = (group - mean).square().mean(axes, keepdim=True)
        shape = mean.shape
        normal = (group - mean) / (biased + 1e-5).sqrt() * weight.view(shape) + bias.view(shape)
        for i, row in enumerate(normal):
            rows[j + i * num_splits] = row
        count = group.numel() // CHANNELS
        means.append(0.9 * torch.tensor([0.3, -0.2, 0.7]).to(x) + 0.1 * mean.detach().flatten())
        unbiased = biased.detach().flatten() * count / (count - 1)
        variances.append(0.9 * torch.tensor([1.5, 0.7, 2.1]).to(x) + 0.1 * unbiased)
    out = torch.stack(rows)
    gradients = torch.autograd.grad((out * pull(out)).sum(), [x, weight, bias])
    return out.detach(), list(gradients), torch.stack(means).mean(dim=0), torch.stack(variances).mean(dim=0)


def pull(out: Tensor) -> Tensor:
    """A gradient for the output that is different everywhere."""
    return torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape).sin()


def assert_law(norm: Any, x: Tensor, num_splits: int) -> None:
    expected, gradients, mean, variance = loop_over_groups(x, num_splits)
    leaf = x.detach().requires_grad_()
    out = norm(leaf)
    out.backward(pull(out))
    for ours, theirs in zip(
        [out, leaf.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var],
        [expected, *gradients, mean, variance],
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


# Split


@given(
    st.integers(1, 6),
    st.integers(2, 13),
    st.sampled_from([(4, 5), (1, 2), (6,), ()]),
    st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_split_is_a_loop_over_every_sth_image(num_splits: int, n: int, hw: tuple, layout: torch.memory_format) -> None:
    if not hw:
        n = max(n, 2 * num_splits)  # vectors: two to a group, or there is no variance
    x = images(n, hw=hw)
    x = x.contiguous(memory_format=layout) if x.ndim == 4 else x
    assert_law(scaled(moco.SplitBatchNorm2d(CHANNELS, num_splits)), x, num_splits)


def test_split_takes_inputs_that_are_views_of_others() -> None:
    wide = torch.stack([images(8), images(8, seed=1)], dim=-1)  # n c h w 2
    assert_law(scaled(moco.SplitBatchNorm2d(CHANNELS, 4)), wide[..., 1], 4)
    assert_law(scaled(moco.SplitBatchNorm2d(CHANNELS, 4)), images(16)[::2], 4)


def test_split_keeps_the_memory_layout() -> None:
    norm = moco.SplitBatchNorm2d(CHANNELS, 4).double()
    for grouped in (False, True):
        norm.grouped = grouped
        assert norm(images(8)).is_contiguous()
        x = images(8).contiguous(memory_format=torch.channels_last).requires_grad_()
        out = norm(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        out.sum().backward()
        assert x.grad is not None
        assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_one_group_is_torchs_batch_norm() -> None:
    ours, theirs = scaled(moco.SplitBatchNorm2d(CHANNELS, 1)), scaled(nn.BatchNorm2d(CHANNELS))
    torch.testing.assert_close(ours(images(7)), theirs(images(7)), rtol=0, atol=1e-12)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(ours.get_buffer(name), theirs.get_buffer(name), rtol=0, atol=1e-12)


def test_split_in_eval_mode_is_torchs_batch_norm() -> None:
    ours, theirs = scaled(moco.SplitBatchNorm2d(CHANNELS, 4)).eval(), scaled(nn.BatchNorm2d(CHANNELS)).eval()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    for x in (images(5), images(1)):
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)


def test_grouped_layers_expect_the_groups_one_behind_the_other() -> None:
    x = images(11)
    order = grouped_order(11, 4, x.device)
    assert order.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7]
    assert group_sizes(11, 4) == [3, 3, 3, 2]
    assert group_sizes(3, 4) == [1, 1, 1]
    norm = scaled(moco.SplitBatchNorm2d(CHANNELS, 4, grouped=True))
    torch.testing.assert_close(norm(x[order]), loop_over_groups(x, 4)[0][order], rtol=0, atol=1e-12)


def small_net() -> tuple[Any, Any]:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return backbone, nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


@pytest.mark.parametrize("n", [8, 11])
def test_an_encoder_that_orders_its_batch_once_equals_interleaved_layers(n: int) -> None:
    interleaved = convert(nn.Sequential(*small_net()), "split", num_splits=4).double()
    ordered = convert(Encoder(*small_net(), num_splits=4), "split", num_splits=4, grouped=True).double()
    results = []
    for net in (interleaved, ordered):
        x = images(n).requires_grad_()
        out = net(x)
        out.backward(pull(out))
        state = [p.grad for p in net.parameters()] + [b for b in net.buffers() if b.is_floating_point()]
        results.append([out, x.grad, *state, net.eval()(images(n))])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


def test_split_in_bf16_takes_its_statistics_in_float32() -> None:
    norm = scaled(moco.SplitBatchNorm2d(CHANNELS, 4), torch.float32)
    x = images(32, hw=(8, 8), dtype=torch.bfloat16)
    out = norm(x)
    assert out.dtype == torch.bfloat16
    assert norm.running_var.dtype == torch.float32
    expected, _, mean, variance = loop_over_groups(x.double(), 4)
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), variance, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("n", "hw"), [(9, ()), (9, (1, 1)), (1, (1, 1))])
def test_a_group_of_a_single_value_is_refused_in_one_line(n: int, hw: tuple) -> None:
    norm = moco.SplitBatchNorm2d(CHANNELS, 8).double()
    with pytest.raises(ValueError, match=rf"^{n} images in 8 .* lower bn_splits or raise the batch size$"):
        norm(images(n, hw=hw))
    assert norm.running_var.isfinite().all()


# Names and shapes


def only_norm(norm: nn.Module, kind: str) -> nn.Module:
    return next(convert(nn.Sequential(norm), kind).children())


@pytest.mark.parametrize("norm", [moco.SplitBatchNorm2d(5, 4), only_norm(nn.BatchNorm2d(5), "sync")])
def test_names_and_shapes_are_those_of_torchs_batch_norm(norm: nn.Module) -> None:
    theirs = nn.BatchNorm2d(5)
    assert [(n, t.shape, t.dtype) for n, t in norm.state_dict().items()] == [
        (n, t.shape, t.dtype) for n, t in theirs.state_dict().items()
    ]
    theirs.load_state_dict(norm.state_dict())
    assert [n for n, _ in norm.named_parameters()] == ["weight", "bias"]


def test_converting_carries_names_values_and_mode_over() -> None:
    for kind, expected in (("split", moco.SplitBatchNorm2d), ("sync", SyncBatchNorm)):
        backbone, projector = small_net()
        backbone[1].momentum, backbone[1].eps = 0.3, 1e-3
        projector[1] = nn.BatchNorm1d(5, affine=False)
        net = nn.Sequential(backbone, projector).eval()
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        converted = convert(net, kind, num_splits=4)
        torch.testing.assert_close(converted.state_dict(), before, rtol=0, atol=0)
        norms = [m for m in converted.modules() if isinstance(m, expected)]
        assert len(norms) == 2
        assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in converted.modules())
        assert (norms[0].momentum, norms[0].eps, norms[0].training) == (0.3, 1e-3, False)
        assert list(norms[1].parameters()) == []
        with torch.no_grad():
            assert converted.train()(images(8, dtype=torch.float32)).isfinite().all()


@pytest.mark.parametrize("kind", ["plain", "shuffle"])
def test_plain_and_shuffle_keep_torchs_batch_norm(kind: str) -> None:
    net = convert(nn.Sequential(*small_net()), kind)
    assert [type(m) for m in net.modules() if "Norm" in type(m).__name__] == [nn.BatchNorm2d, nn.BatchNorm1d]


def test_an_activation_that_a_network_has_fused_into_its_batch_norm_is_kept() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    for kind in ("split", "sync"):
        net = nn.Sequential(timm_layers.BatchNormAct2d(CHANNELS))
        converted = convert(net, kind, num_splits=2)
        assert converted(images(8, dtype=torch.float32)).min() == 0


# One process


def test_sync_on_one_process_is_torchs_batch_norm() -> None:
    ours = scaled(only_norm(nn.BatchNorm2d(CHANNELS), "sync"))
    theirs = scaled(nn.BatchNorm2d(CHANNELS))
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(images(6)), theirs.train(mode)(images(6)), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=0, atol=1e-12)


def test_averaging_over_one_process_changes_nothing() -> None:
    norm = scaled(nn.BatchNorm2d(CHANNELS))
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    average_running_statistics(norm)
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
