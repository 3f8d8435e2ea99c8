import datetime
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moco
from distributed import Pair, Payload
from moco.config import ModelConfig
from moco.method.batchnorm import SplitBatchNorm2d, average_running_statistics, convert
from moco.method.model import BatchMoCo, QueueMoCo
from moco.method.variants import choose_batchnorm
from moco.parallel import collectives, consensus
from published import Trace, published_queue, published_v3
from small import (
    Pixels,
    assert_same_training,
    cosine_momentum,
    make_batches,
    small_v1,
    small_v3,
    train,
    trained,
    weights,
)

two_processes = pytest.mark.dist
LR, DECAY = 0.2, 1e-2
LARS_LR = 0.05


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Generator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"), __name__)
    yield pair
    pair.close()


@pytest.fixture(scope="module", params=[3, pytest.param(4, marks=pytest.mark.slow)])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Pair]:
    several = Pair(tmp_path_factory.mktemp("several"), __name__, request.param)
    yield several
    several.close()


def global_order(parts: list[Tensor]) -> Tensor:
    """Row i of rank r is row i * world_size + r."""
    return torch.stack(parts, dim=1).flatten(0, 1)


# Collectives


def test_collectives_are_the_identity_on_one_process() -> None:
    x = torch.randn(4, 2, requires_grad=True)
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    assert torch.equal(collectives.gather(x), x)
    assert not collectives.gather(x).requires_grad
    assert torch.equal(collectives.local(x), x)
    assert collectives.all_reduce_sum(x) is x
    order = [collectives.permutation(9, x.device, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1)]
    assert order[0] == order[1] != order[2]
    assert sorted(order[0]) == list(range(9))


def shared_batch() -> dict[str, Any]:
    rank = collectives.rank()
    torch.manual_seed(rank)
    rows = torch.arange(6).view(3, 2) + 10 * rank
    gathered = collectives.gather(rows)
    layout = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    total = collectives.all_reduce_sum(x * (rank + 1))
    (total * (rank + 1)).sum().backward()
    return {
        "rank": rank,
        "world": collectives.world_size(),
        "rows": rows,
        "gathered": gathered,
        "local": collectives.local(gathered),
        "layout": layout,
        "gathered_layout": collectives.gather(layout),
        "flags": collectives.gather(torch.tensor([rank == 0])),
        "total": total.detach(),
        "gradient": x.grad,
        "order": collectives.permutation(20, rows.device, None),
        "auto": [choose_batchnorm(ModelConfig(variant=variant)) for variant in ("v1", "v2", "v3")],
    }


@two_processes
def test_two_processes_share_an_interleaved_batch(pair: Pair) -> None:
    first, second = pair(shared_batch)
    assert [(each["rank"], each["world"]) for each in (first, second)] == [(0, 2), (1, 2)]
    assert first["gathered"].tolist() == [[0, 1], [10, 11], [2, 3], [12, 13], [4, 5], [14, 15]]
    assert torch.equal(first["gathered_layout"], global_order([first["layout"], second["layout"]]))
    for each in (first, second):
        assert torch.equal(each["gathered"], first["gathered"])
        assert torch.equal(each["local"], each["rows"])
        assert each["flags"].tolist() == [True, False]
        assert each["total"].tolist() == [3.0, 6.0]
        # d/dx of 1 * total + 2 * total, total = 1 * x of rank 0 + 2 * x of rank 1
        assert each["gradient"].tolist() == [3.0 * (each["rank"] + 1)] * 2
        assert torch.equal(each["order"], first["order"])  # though each had a seed of its own
        assert each["auto"] == ["shuffle", "shuffle", "sync"]


def exchanged() -> dict[str, Any]:
    rank, world = collectives.rank(), collectives.world_size()
    batch = torch.arange(20.0).view(10, 2, 1, 1).expand(10, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(4))
    mine = collectives.local(batch)
    there = collectives.exchange(mine, order)
    back = collectives.exchange(there, order, back=True)
    return {
        "there": torch.equal(there, batch[order][rank::world]),
        "back": torch.equal(back, mine),
        "layout": there.is_contiguous(memory_format=torch.channels_last),
        "agreed": list(consensus.agree((rank, 7 - rank))),
        "said": consensus.everyone(f"I am {rank}"),
        "first": consensus.first(lambda: {"rank": collectives.rank()}),
    }


@two_processes
def test_rows_go_where_they_are_wanted_and_ranks_agree(pair: Pair) -> None:
    for answer in pair(exchanged):
        assert answer["there"] and answer["back"] and answer["layout"]
        assert answer["agreed"] == [1, 7]
        assert answer["said"] == ["I am 0", "I am 1"]
        assert answer["first"] == {"rank": 0}
    alone = exchanged()
    assert alone["there"] and alone["back"]
    assert (alone["agreed"], alone["said"], alone["first"]) == ([0, 7], ["I am 0"], {"rank": 0})


def among_several() -> dict[str, Any]:
    n, (rank, world) = 24, (collectives.rank(), collectives.world_size())
    torch.manual_seed(rank)
    batch = torch.arange(2.0 * n).view(n, 2, 1, 1).expand(n, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    mine, numbers = collectives.local(batch), torch.arange(n)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(5)]
    orders = [collectives.global_permutation(n, mine.device, seed) for seed in seeds]
    # Nothing travels; all goes to the next rank; the old ranks' rows one behind the other.
    orders += [numbers, numbers.roll(1), numbers.view(-1, world).T.flatten()]
    images = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    images += numbers.view(n, 1, 1, 1)
    synced = convert(nn.Sequential(nn.BatchNorm2d(3)), "sync").double()(collectives.local(images)).detach()
    whole = nn.BatchNorm2d(3).double()(images).detach()
    return {
        "world": world,
        "mine": mine.flatten(1)[:, 0].tolist(),
        "gathered": torch.equal(collectives.gather(mine), batch),
        "local": torch.equal(collectives.local(collectives.gather(mine)), mine),
        "there": [torch.equal(collectives.exchange(mine, order), batch[order][rank::world]) for order in orders],
        "back": [
            torch.equal(collectives.exchange(collectives.exchange(mine, order), order, back=True), mine)
            for order in orders
        ],
        "orders": torch.stack([*orders, collectives.permutation(n, mine.device, None)]),
        "norm": float((synced - collectives.local(whole)).abs().max()),
    }


@two_processes
def test_more_than_two_processes_deal_out_and_exchange_rows_as_two_do(several: Pair) -> None:
    answers = several(among_several)
    world = len(answers)
    for rank, each in enumerate(answers):
        assert each["world"] == world
        assert each["mine"] == [2 * row for row in range(rank, 24, world)]
        assert each["gathered"] and each["local"]
        assert all(each["there"]) and all(each["back"]) and len(each["there"]) == 8
        assert torch.equal(each["orders"], answers[0]["orders"])  # the last, too, though each had a seed of its own
        assert torch.equal(each["orders"].sort(dim=1).values, torch.arange(24).expand(9, 24))
        assert each["norm"] < 1e-11


def told_apart() -> list[Any]:
    """As where tensors travel from GPU to GPU."""
    used = list[Any]()

    def recorded(name: str) -> Any:
        sent = getattr(torch.distributed, name)

        def send(*arguments: Any, group: Any = None, **named: Any) -> Any:
            used.append(group)
            return sent(*arguments, group=group, **named)

        return send

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(consensus, "_words", None)  # and back to it
        with pytest.MonkeyPatch.context() as before:
            before.setattr("torch.distributed.get_backend", lambda: "nccl")
            consensus.talk_apart(datetime.timedelta(seconds=30))
        for name in ("all_reduce", "all_gather_object", "broadcast_object_list"):
            patched.setattr(torch.distributed, name, recorded(name))
        answers = [
            consensus.everyone(str(collectives.rank())),
            consensus.agree((collectives.rank(),)),
            consensus.first(collectives.rank),
        ]
        collectives.all_reduce_sum(torch.ones(1))
        return [*answers, [each is consensus._words for each in used], consensus._words is None]


@two_processes
def test_words_may_travel_apart_from_tensors(pair: Pair) -> None:
    assert pair(told_apart) == [[["0", "1"], (1,), 0, [True, True, True, False], False]] * 2


def failed(first: bool) -> str:
    try:
        if first:
            consensus.first(lambda: torch.zeros(2).reshape(3))
        elif collectives.rank():
            consensus.together(lambda: Path("/no room\n").read_text())
        else:
            consensus.together(lambda: "")
    except (RuntimeError, OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@two_processes
def test_what_goes_wrong_on_one_rank_is_said_on_all(pair: Pair) -> None:
    told, own = pair(failed, False)
    assert own.startswith("FileNotFoundError: [Errno 2]")
    assert told == "ValueError: process 1 stopped: [Errno 2] No such file or directory: '/no room\\n'"
    own, told = pair(failed, True)
    assert own.startswith("RuntimeError: shape") and told.startswith("RuntimeError: process 0 stopped: shape")


# Batch norm


def norm_net(kind: str, *, affine: bool = True) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.BatchNorm1d(16, affine=affine),
    ).double()
    for p in net.parameters():
        if p.ndim == 1:
            nn.init.uniform_(p, 0.5, 1.5)  # near none, the next layer would magnify rounding
    return convert(net, kind)


def norm_images(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (5 + 2 * torch.randn(10, 3, 4, 4, generator=random, dtype=torch.float64)).to(dtype)


def through_sync(affine: bool) -> dict[str, Any]:
    net, x = norm_net("sync", affine=affine), collectives.local(norm_images(0)).clone().requires_grad_()
    out = net(x)
    (out * collectives.local(norm_images(1).flatten(1)[:, :16])).sum().backward()
    return {
        "out": out.detach(),
        "x": x.grad,
        "gradients": [collectives.all_reduce_sum(p.grad) for p in net.parameters() if p.grad is not None],
        "buffers": [b for b in net.buffers() if b.is_floating_point()],
        "eval": net.eval()(norm_images(2)).detach(),
        "bf16": convert(nn.Sequential(nn.BatchNorm2d(3)), "sync")(
            collectives.local(norm_images(0, torch.bfloat16))
        ).detach(),
    }


@two_processes
@pytest.mark.parametrize("affine", [True, False])
def test_sync_batch_norm_over_two_processes_is_that_of_the_full_batch(pair: Pair, affine: bool) -> None:
    answers = pair(through_sync, affine)
    net, x = norm_net("plain", affine=affine), norm_images(0).requires_grad_()
    out = net(x)
    (out * norm_images(1).flatten(1)[:, :16]).sum().backward()
    torch.testing.assert_close(global_order([each["out"] for each in answers]), out.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(global_order([each["x"] for each in answers]), x.grad, rtol=0, atol=1e-11)
    buffers, gradients = [b for b in net.buffers() if b.is_floating_point()], [p.grad for p in net.parameters()]
    for each in answers:
        torch.testing.assert_close(each["gradients"], gradients, rtol=0, atol=1e-11)
        torch.testing.assert_close(each["buffers"], buffers, rtol=0, atol=1e-11)
        torch.testing.assert_close(each["eval"], net.eval()(norm_images(2)).detach(), rtol=0, atol=1e-11)
    rounded = nn.BatchNorm2d(3).double()(norm_images(0, torch.bfloat16).double()).bfloat16()
    torch.testing.assert_close(
        global_order([each["bf16"] for each in answers]), rounded.detach(), rtol=2**-7, atol=1e-3
    )


def kept_by_sync(channels_last: bool) -> dict[str, Any]:
    norm = convert(nn.Sequential(nn.BatchNorm2d(24)), "sync")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(8, 24, 6, 5).bfloat16().contiguous(memory_format=layout).requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with Payload() as handed:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = norm(x)
        forward = len(handed.calls)
        out.backward(torch.ones(8, 24, 6, 5, dtype=torch.bfloat16))  # not in the layout of the images
    assert x.grad is not None
    return {
        "kept": sum(kept.values()),
        "images": x.nbytes,
        "forward": handed.calls[:forward],
        "backward": handed.calls[forward:],
        "dtypes": [each.dtype for each in (out, x.grad)],
        "layout": all(each.is_contiguous(memory_format=layout) for each in (out, x.grad)),
    }


@two_processes
@pytest.mark.parametrize("channels_last", [True, False])
def test_sync_batch_norm_keeps_its_input_alone_and_hands_over_twice(pair: Pair, channels_last: bool) -> None:
    for each in pair(kept_by_sync, channels_last):
        assert each["kept"] == each["images"] + 3 * 4 * 24  # mean, 1/std and scale beside it, in fp32
        assert each["forward"] == [("_allgather_base_", 2 * 4 * 24)]
        assert each["backward"] == [("allreduce_", 2 * 4 * 24)]
        assert each["dtypes"] == [torch.bfloat16] * 2 and each["layout"]


def far_from_zero(seed: int) -> Tensor:
    return norm_images(seed, torch.float32) + 10_000


def through_far_sync() -> dict[str, Any]:
    norm, x = (
        convert(nn.Sequential(nn.BatchNorm2d(3)), "sync"),
        collectives.local(far_from_zero(0)).clone().requires_grad_(),
    )
    out = norm(x)
    (out * collectives.local(norm_images(1, torch.float32))).sum().backward()
    return {"out": out.detach(), "x": x.grad, "variance": norm.get_buffer("0.running_var")}


@two_processes
def test_sync_batch_norm_cancels_no_digits_far_from_zero(pair: Pair) -> None:
    answers = pair(through_far_sync)
    norm, x = nn.BatchNorm2d(3).double(), far_from_zero(0).double().requires_grad_()
    out = norm(x)
    (out * norm_images(1)).sum().backward()
    for name, expected in (("out", out.detach()), ("x", x.grad)):
        ours = global_order([each[name] for each in answers]).double()
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-3)  # a float32 near 10,000 is known to 1e-3
    for each in answers:
        torch.testing.assert_close(each["variance"].double(), norm.running_var, rtol=1e-5, atol=0)


# Training


def as_trace(answer: dict[str, Any]) -> Trace:
    return Trace(**answer["trace"])


def train_v1(batchnorm: str, symmetric: bool, queue_size: int, variant: str = "v1") -> dict[str, Any]:
    model = small_v1(batchnorm, variant=variant, symmetric=symmetric, queue_size=queue_size)
    optimizer = torch.optim.SGD(trained(model), LR, momentum=0.9, weight_decay=DECAY)
    trace = train(model, make_batches(), optimizer, cosine_momentum)
    average_running_statistics(model)
    return {"trace": asdict(trace), "state": model.state_dict()}


def train_v3(resnet: bool) -> dict[str, Any]:
    model = small_v3(resnet=resnet)
    trace = train(model, make_batches(), moco.LARS(trained(model), LARS_LR, weight_decay=DECAY), cosine_momentum)
    return {"trace": asdict(trace), "state": model.state_dict()}


@two_processes
@pytest.mark.parametrize(("symmetric", "queue_size"), [(False, 20), (True, 24)])
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_v1_and_v2_on_two_processes_train_as_published_in_float64(
    pair: Pair, variant: str, symmetric: bool, queue_size: int
) -> None:
    answers = pair(train_v1, "shuffle", symmetric, queue_size, variant)
    model = small_v1(variant=variant, queue_size=queue_size)
    published = published_queue(
        variant,
        weights(model),
        model.queue.keys.clone(),
        make_batches(),
        devices=2,
        shuffled=True,
        symmetric=symmetric,
        temperature=0.2,
        momentum=cosine_momentum,
        lr=LR,
        weight_decay=DECAY,
    )
    for answer in answers:
        assert_same_training(as_trace(answer), published)
    assert torch.equal(answers[0]["state"]["queue.keys"], answers[1]["state"]["queue.keys"])


@two_processes
@pytest.mark.parametrize("resnet", [True, False])
def test_v3_on_two_processes_trains_as_published_in_float64(pair: Pair, resnet: bool) -> None:
    published = published_v3(
        weights(small_v3(resnet=resnet)),
        make_batches(),
        predictor_norm=not resnet,
        temperature=0.5,
        momentum=cosine_momentum,
        lr=LARS_LR,
        weight_decay=DECAY,
    )
    for answer in pair(train_v3, resnet):
        assert_same_training(as_trace(answer), published)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_leaves(made) if isinstance(each, Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return made


def largest_of_v3(n: int) -> dict[str, Any]:
    views = torch.randn(2, n, 1, 2, 2, generator=torch.Generator().manual_seed(collectives.rank()))
    model = BatchMoCo(Pixels(), nn.Identity(), 0.5)
    with Largest() as largest:
        out = model(views[0], views[0])
    return {"numbers": largest.numbers, "positive": out.positive, "negative": out.negative, "view": views[0]}


@two_processes
def test_v3_compares_a_ranks_queries_with_all_keys_and_no_more(pair: Pair) -> None:
    n = 20
    answers = pair(largest_of_v3, n)
    everything = torch.nn.functional.normalize(global_order([each["view"] for each in answers]).flatten(1))
    for rank, each in enumerate(answers):
        assert each["numbers"] <= n * (2 * n + 1)  # similarities to the positive and to all keys
        assert each["positive"] == pytest.approx(1)
        others = (everything @ everything.T).fill_diagonal_(0)[rank::2]
        assert each["negative"] == pytest.approx(float(others.sum() / (n * (2 * n - 1))), abs=1e-6)


@two_processes
@pytest.mark.parametrize("symmetric", [False, True])
def test_one_process_with_two_groups_is_two_processes_that_exchange_images(pair: Pair, symmetric: bool) -> None:
    answers = pair(train_v1, "shuffle", symmetric, 20)
    alone = train_v1("split", symmetric, 20)
    first, second = answers
    for answer in answers:
        assert_same_training(as_trace(answer), as_trace(alone))
        for name, value in answer["state"].items():  # running statistics, of both encoders, too
            if not name.endswith("num_batches_tracked"):  # counted by torch's batch norm alone
                torch.testing.assert_close(value, alone["state"][name], rtol=0, atol=1e-10)
                assert torch.equal(value, first["state"][name])
    assert first["state"]["queue.pointer"] == second["state"]["queue.pointer"] == (80 * (1 + symmetric)) % 20


def shuffled_without_generator() -> dict[str, Any]:
    torch.manual_seed(0)
    queue = moco.KeyQueue(5, 4)
    torch.manual_seed(collectives.rank())
    model = QueueMoCo(Pixels(), queue, temperature=0.1, symmetric=True, shuffle="ranks")
    rows = torch.eye(4)[: 2 * collectives.rank() + 2][-2:].view(2, 1, 2, 2)  # two of the four unit vectors to each
    ids = torch.tensor([100, 200]) + collectives.rank()
    out = model(rows, rows, ids=ids)
    model.update(out.keys, momentum=0.9, ids=out.ids)
    return {"positive": out.positive.detach(), "keys": out.keys, "ids": out.ids, "queue": queue.state_dict()}


@two_processes
def test_ranks_agree_on_the_permutation_when_none_was_given_a_generator(pair: Pair) -> None:
    first, second = pair(shuffled_without_generator)
    for answer in (first, second):
        assert answer["positive"] == 1  # each query has met its own image's key
        assert answer["keys"].tolist() == torch.eye(4)[[0, 2, 1, 3]].repeat(2, 1).tolist()
        assert answer["ids"].tolist() == [100, 101, 200, 201] * 2
        torch.testing.assert_close(answer["queue"], first["queue"], rtol=0, atol=0)


def test_the_two_ways_of_one_law_do_have_groups_in_them() -> None:
    assert any(isinstance(m, SplitBatchNorm2d) for m in small_v1("split").modules())
    assert not any(isinstance(m, SplitBatchNorm2d) for m in small_v1("shuffle").modules())
    assert small_v1("shuffle").shuffle == "ranks"
