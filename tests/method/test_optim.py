import copy
import doctest
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import moco.method.optim
from moco.config import OptimConfig
from moco.method.optim import LARS, build_optimizer, key_momentum, learning_rate, resolved_lr, set_lr

NAMES = ("sgd", "lars", "adam", "adamw")


def small_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)).to(dtype)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        net(x.to(next(net.parameters()).dtype)).square().mean().backward()
        optimizer.step()


def config(**changes: object) -> OptimConfig:
    return OptimConfig.model_validate(changes)


def rates(settings: OptimConfig, epochs: int, batch_size: int = 256, steps_per_epoch: int = 4) -> list[float]:
    span = {"steps_per_epoch": steps_per_epoch, "epochs": epochs, "batch_size": batch_size}
    return [learning_rate(settings, step, **span) for step in range(steps_per_epoch * epochs)]


# LARS


def written_out_lars(
    weights: list[list[float]], axes: list[int], gradient: Callable[[int, int], list[float]], steps: int, decay: float
) -> list[list[float]]:
    """The published update (arXiv:2104.02057) on plain Python floats, which are float64."""
    weights = [list(w) for w in weights]
    buffers = [[0.0] * len(w) for w in weights]
    for step in range(steps):
        for i, w in enumerate(weights):
            g = gradient(step, i)
            if axes[i] > 1:
                g = [gj + decay * wj for gj, wj in zip(g, w, strict=True)]
                w_norm, g_norm = math.hypot(*w), math.hypot(*g)
                trust = 0.001 * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
                g = [trust * gj for gj in g]
            buffers[i] = [0.9 * bj + gj for bj, gj in zip(buffers[i], g, strict=True)]
            weights[i] = [wj - 0.3 * bj for wj, bj in zip(w, buffers[i], strict=True)]
    return weights


@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_lars_equals_the_written_out_update_in_float64(decay: float) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (2, 3, 3, 3), (5,), (), (3, 2), (2, 2)]
    start = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    start[4].zero_()  # a weight of length 0, whose ratio is 1 at first
    gradients = torch.randn(10, len(shapes), 54, generator=random, dtype=torch.float64)
    gradients[:3, 5] = 0  # a gradient of length 0
    params = [nn.Parameter(w.clone()) for w in start]
    optimizer = LARS(params, lr=0.3, weight_decay=decay)
    for step in range(10):
        for i, p in enumerate(params):
            p.grad = gradients[step, i, : p.numel()].reshape(p.shape)
        optimizer.step()
    expected = written_out_lars(
        [w.flatten().tolist() for w in start],
        [w.ndim for w in start],
        lambda step, i: gradients[step, i, : start[i].numel()].tolist(),
        10,
        decay,
    )
    for p, values in zip(params, expected, strict=True):
        torch.testing.assert_close(p.flatten(), torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_lars_takes_no_learning_rate_into_its_buffer() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = LARS([weight], lr=0.0)
    optimizer.step()
    assert torch.equal(weight, torch.ones(2, 2))
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], torch.full((2, 2), 0.001))


def test_lars_never_reads_a_value_on_the_host() -> None:
    # Meta tensors have no values: whatever asks for one raises.
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in [(3, 2), (2, 3, 3, 3), (4,)]]
    for p in params:
        p.grad = torch.empty_like(p)
    LARS(params, lr=0.1, weight_decay=1e-6).step()


def test_lars_scales_half_precision_weights_in_float32() -> None:
    # The length of 300 entries of 30000 is past float16's largest number.
    weight = nn.Parameter(torch.full((1, 300), 30000.0, dtype=torch.float16))
    weight.grad = torch.full((1, 300), 30000.0, dtype=torch.float16)
    LARS([weight], lr=100.0).step()
    torch.testing.assert_close(weight, torch.full((1, 300), 27000.0, dtype=torch.float16))


def test_lars_leaves_gradients_and_parameters_without_one_alone() -> None:
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    used.grad = torch.ones(2, 2)
    LARS([used, unused], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(used.grad, torch.ones(2, 2))
    assert torch.equal(unused, torch.ones(2, 2))
    assert not torch.equal(used, torch.ones(2, 2))


def test_lars_keeps_groups_apart() -> None:
    first, second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    first.grad, second.grad = torch.ones(2, 2), torch.ones(2, 2)
    LARS([{"params": [first]}, {"params": [second], "lr": 2.0}], lr=1.0).step()
    torch.testing.assert_close(first, torch.full((2, 2), 1 - 0.001))
    torch.testing.assert_close(second, torch.full((2, 2), 1 - 0.002))


def test_lars_returns_the_loss_of_a_closure_that_computes_gradients() -> None:
    weight = nn.Parameter(torch.ones(2, 2))

    def closure() -> float:
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert LARS([weight], lr=1.0).step(closure) == 4.0
    assert not torch.equal(weight, torch.ones(2, 2))


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "trust_coefficient"])
def test_lars_refuses_a_negative_setting_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-1.0"):
        LARS([nn.Parameter(torch.ones(2))], **{"lr": 0.1, name: -1.0})


# All optimizers


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_are_left_out(name: str) -> None:
    net = small_net()
    net[0].requires_grad_(False)
    optimizer = build_optimizer(config(name=name, base_lr=0.1), net.parameters(), batch_size=256)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == 4
    assert all(p.requires_grad for p in held)


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_starts_at_the_resolved_rate(name: str) -> None:
    settings = config(name=name, base_lr=0.03, weight_decay=0.25)
    (group,) = build_optimizer(settings, small_net().parameters(), batch_size=512).param_groups
    assert group["lr"] == 0.06
    assert group["weight_decay"] == 0.25


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_reaches_biases_and_norms_except_with_lars(name: str) -> None:
    net = small_net()
    optimizer = build_optimizer(config(name=name, base_lr=0.1, weight_decay=0.1), net.parameters(), batch_size=256)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    before, after = dict(small_net().named_parameters()), dict(net.named_parameters())
    for key in ("4.weight", "4.bias", "1.weight"):
        if name == "lars" and key != "4.weight":
            assert torch.equal(after[key], before[key])
        else:
            assert torch.equal((before[key] - after[key]).sign(), before[key].sign())


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("sgd", lambda params: torch.optim.SGD(params, 0.1, momentum=0.8, weight_decay=0.01, foreach=False)),
        ("adam", lambda params: torch.optim.Adam(params, 0.1, weight_decay=0.01, foreach=False)),
        ("adamw", lambda params: torch.optim.AdamW(params, 0.1, weight_decay=0.01, foreach=False)),
    ],
)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_fused_optimizer_equals_the_plain_one(
    name: str, plain: Callable[..., torch.optim.Optimizer], dtype: torch.dtype, rounding: float
) -> None:
    fast, slow = small_net(dtype), small_net(dtype)
    settings = config(name=name, base_lr=0.1, momentum=0.8, weight_decay=0.01)
    optimizer = build_optimizer(settings, fast.parameters(), batch_size=256)
    assert optimizer.param_groups[0]["fused"]
    train(fast, optimizer, range(5))
    train(slow, plain(slow.parameters()), range(5))
    # A convolution's bias before batch norm has no gradient but rounding, which Adam magnifies.
    for (key, a), (_, b) in zip(fast.named_parameters(), slow.named_parameters(), strict=True):
        if key != "0.bias":
            torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("name", NAMES)
def test_a_reloaded_optimizer_continues_bit_for_bit(name: str) -> None:
    settings = config(name=name, base_lr=0.1, weight_decay=0.01)
    whole, first = small_net(), small_net()
    train(whole, build_optimizer(settings, whole.parameters(), batch_size=256), range(6))

    stopped = build_optimizer(settings, first.parameters(), batch_size=256)
    train(first, stopped, range(3))
    second = copy.deepcopy(first)
    resumed = build_optimizer(settings, second.parameters(), batch_size=256)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    assert_same_state(resumed.state_dict(), stopped.state_dict())
    train(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def assert_same_state(left: dict, right: dict) -> None:
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    assert len(left["state"]) > 0
    for index, state in left["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right["state"][index][key]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("saved_in_channels_last", [True, False])
def test_a_run_resumes_in_another_memory_layout(name: str, saved_in_channels_last: bool) -> None:
    layouts = [torch.contiguous_format, torch.channels_last]
    saved, loaded = reversed(layouts) if saved_in_channels_last else layouts
    settings = config(name=name, base_lr=0.1, weight_decay=0.01)
    start = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))

    def step(p: nn.Parameter, optimizer: torch.optim.Optimizer, seed: int) -> None:
        p.grad = torch.empty_like(p).copy_(torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(seed)))
        optimizer.step()

    weight = nn.Parameter(start.clone(memory_format=saved))
    optimizer = build_optimizer(settings, [weight], batch_size=256)
    step(weight, optimizer, 1)
    moved = nn.Parameter(weight.detach().clone(memory_format=loaded))
    resumed = build_optimizer(settings, [moved], batch_size=256)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(weight, optimizer, 2)
    step(moved, resumed, 2)
    torch.testing.assert_close(moved, weight)


@pytest.mark.parametrize("name", NAMES)
def test_set_lr_reaches_every_group(name: str) -> None:
    optimizer = build_optimizer(config(name=name), small_net().parameters(), batch_size=256)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    set_lr(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_set_lr_writes_into_a_rate_that_is_a_tensor() -> None:
    rate = torch.tensor(0.5)
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD([weight], lr=rate, fused=True)
    set_lr(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate
    optimizer.step()
    assert torch.equal(weight, torch.full((2,), 0.75))


# Learning rates


def test_the_linear_rule_scales_the_rate_with_the_batch() -> None:
    assert resolved_lr(config(base_lr=0.03), 256) == 0.03
    assert resolved_lr(config(base_lr=0.03), 512) == 0.06
    assert resolved_lr(config(base_lr=0.03), 128) == 0.015
    assert resolved_lr(config(base_lr=0.6), 4096) == pytest.approx(9.6)
    assert resolved_lr(config(base_lr=0.03, lr_scaling="none"), 512) == 0.03


def test_moco_v1_drops_the_rate_at_epochs_120_and_160_counted_from_0() -> None:
    settings = config(base_lr=0.03, schedule="step", milestones=(120, 160), per="epoch")
    table = rates(settings, epochs=200)[::4]
    assert table[:120] == [0.03] * 120
    assert table[120:160] == pytest.approx([0.003] * 40)
    assert table[160:] == pytest.approx([0.0003] * 40)


def test_a_step_schedule_counted_from_1_drops_one_epoch_earlier() -> None:
    settings = config(
        base_lr=0.06, lr_scaling="none", schedule="step", milestones=(120, 160), per="epoch", first_epoch=1
    )
    table = rates(settings, epochs=200)[::4]
    assert table[118] == 0.06
    assert table[119] == pytest.approx(0.006)
    assert table[158:160] == pytest.approx([0.006, 0.0006])


def test_a_linear_probe_drops_the_rate_at_epochs_60_and_80() -> None:
    settings = config(base_lr=30.0, schedule="step", milestones=(60, 80), per="epoch")
    table = rates(settings, epochs=100)[::4]
    assert [table[e] for e in (0, 59, 60, 79, 80, 99)] == pytest.approx([30, 30, 3, 3, 0.3, 0.3])


def test_moco_v2_follows_a_cosine_of_whole_epochs_counted_from_0() -> None:
    table = rates(config(base_lr=0.03, per="epoch"), epochs=200)
    assert table[::4] == table[3::4]
    assert table[::4] == pytest.approx([0.015 * (1 + math.cos(math.pi * e / 200)) for e in range(200)])
    assert table[0] == 0.03
    assert table[100 * 4] == pytest.approx(0.015)
    assert table[-1] == pytest.approx(1.8505e-6, rel=1e-4)


def test_the_official_notebook_counts_epochs_from_1_and_ends_at_rate_0() -> None:
    settings = config(base_lr=0.03, per="epoch", first_epoch=1)
    table = rates(settings, epochs=200, batch_size=512)
    assert table[0] == table[3]
    assert round(table[0], 6) == 0.059996
    assert table[-4:] == [0.0] * 4
    assert table[-5] > 0


def test_moco_v3_warms_up_and_descends_at_fractional_epochs() -> None:
    settings = config(name="lars", base_lr=0.6, warmup_epochs=10)
    table = rates(settings, epochs=100, batch_size=4096, steps_per_epoch=5)
    assert table[0] == 0
    assert table[1] == pytest.approx(9.6 * 0.2 / 10)
    assert table[49] == pytest.approx(9.6 * 9.8 / 10)
    assert table[50] == pytest.approx(9.6)
    assert table[277] == pytest.approx(4.8 * (1 + math.cos(math.pi * (55.4 - 10) / 90)))
    assert 0 < table[-1] < table[-2]


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_every_schedule_rises_linearly_over_a_fractional_warm_up(schedule: str) -> None:
    table = rates(config(base_lr=0.1, schedule=schedule, warmup_epochs=1.5), epochs=4)
    assert table[:7] == pytest.approx([0.1 * step / 6 for step in range(7)])


def test_a_constant_rate_stays() -> None:
    settings = config(name="adam", base_lr=1e-3, lr_scaling="none", schedule="constant")
    assert set(rates(settings, epochs=3)) == {1e-3}


def test_first_epoch_does_not_shift_a_schedule_per_step() -> None:
    assert rates(config(first_epoch=1), epochs=3) == rates(config(first_epoch=0), epochs=3)


@pytest.mark.parametrize("warmup", [2.0, 5.0])
def test_a_warm_up_as_long_as_the_run_is_no_error(warmup: float) -> None:
    table = rates(config(base_lr=0.1, warmup_epochs=warmup, per="epoch", first_epoch=1), epochs=2)
    assert table[::4] == pytest.approx([0.1 * 1 / warmup, 0.1 * 2 / warmup])


def test_a_cosine_does_not_rise_again_past_its_end() -> None:
    assert learning_rate(config(), 99, steps_per_epoch=4, epochs=3, batch_size=256) == 0


# The key encoder's momentum


def test_the_cosine_momentum_rises_from_its_start_to_1() -> None:
    table = [key_momentum(0.99, "cosine", step, total_steps=40) for step in range(41)]
    assert table[0] == pytest.approx(0.99)
    assert table[10] == pytest.approx(1 - 0.5 * (1 + math.cos(math.pi / 4)) * 0.01)
    assert table[20] == pytest.approx(0.995)
    assert table[40] == 1.0
    assert table == sorted(table)
    assert key_momentum(0.99, "cosine", 41, total_steps=40) == 1.0


def test_the_constant_momentum_stays() -> None:
    assert {key_momentum(0.999, "constant", step, total_steps=4) for step in range(5)} == {0.999}


def test_the_documented_examples_hold() -> None:
    results = doctest.testmod(moco.method.optim)
    assert results.attempted > 0
    assert results.failed == 0
