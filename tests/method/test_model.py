import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import moco
from moco.method.model import MoCo, QueueMoCo
from published import published_queue, published_v3
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

V1 = {"lr": 0.2, "weight_decay": 1e-2}
V3 = {"lr": 0.05, "weight_decay": 1e-2}


def sgd(model: MoCo) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(trained(model)), V1["lr"], momentum=0.9, weight_decay=V1["weight_decay"])


def pixels_model(queue: Tensor, *, temperature: float = 0.1, symmetric: bool = False) -> QueueMoCo:
    """Projections are the pixels; its queue is the one given."""
    keys = moco.KeyQueue(*queue.shape).to(queue.dtype)
    keys.keys.copy_(queue)
    return QueueMoCo(Pixels().to(queue.dtype), keys, temperature=temperature, symmetric=symmetric, shuffle=None)


def unit_rows(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x / x.norm(dim=1, keepdim=True)).to(dtype)


def as_images(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), 1, 2, 2)


def written_out(similarities: list[float], temperature: float) -> float:
    """Equation 1 of v1 for one query, its key's similarity first."""
    logits = [s / temperature for s in similarities]
    return math.log(math.fsum(math.exp(each - logits[0]) for each in logits))


# The published formulas, over ten steps


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("batchnorm", "devices"), [("plain", 1), ("split", 2), ("split", 3)])
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_v1_and_v2_train_as_published_in_float64(variant: str, batchnorm: str, devices: int, symmetric: bool) -> None:
    model = small_v1(batchnorm, variant=variant, splits=devices, symmetric=symmetric)
    batches = make_batches()
    published = published_queue(
        variant,
        weights(model),
        model.queue.keys.clone(),
        batches,
        devices=devices,
        shuffled=batchnorm == "split",
        symmetric=symmetric,
        temperature=0.2,
        momentum=cosine_momentum,
        **V1,
    )
    assert_same_training(train(model, batches, sgd(model), cosine_momentum), published)
    assert published.losses[0] != pytest.approx(published.losses[9], abs=0.01)


@pytest.mark.parametrize("resnet", [True, False])
def test_v3_trains_as_published_in_float64(resnet: bool) -> None:
    model = small_v3(resnet=resnet)
    batches = make_batches()
    published = published_v3(
        weights(model), batches, predictor_norm=not resnet, temperature=0.5, momentum=cosine_momentum, **V3
    )
    ours = train(model, batches, moco.LARS(trained(model), **V3), cosine_momentum)
    assert_same_training(ours, published)
    assert published.losses[0] != pytest.approx(published.losses[9], abs=0.01)


@pytest.mark.parametrize("momentum", [lambda step: 0.9, cosine_momentum])
def test_updating_after_the_step_gives_the_key_encoders_of_the_published_order(momentum) -> None:
    ours, theirs, batches = small_v1(), small_v1(), make_batches()
    trace, optimizer = train(ours, batches, sgd(ours), momentum), sgd(theirs)
    for step, (view1, view2) in enumerate(batches):
        # Published: the key encoder first, towards the query encoder of before this step; then loss, step, enqueue.
        theirs.update(view1.new_empty(0, 5), momentum=momentum(step))
        for name, p in theirs.key_encoder.named_parameters():
            torch.testing.assert_close(p, trace.key_encoders[step][name], rtol=0, atol=1e-12)
        out = theirs(view1, view2, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        theirs.queue.enqueue(out.keys)
    # What is left at the end is one update behind ours.
    theirs.update(batches[0][0].new_empty(0, 5), momentum=momentum(len(batches)))
    for p, q in zip(ours.key_encoder.parameters(), theirs.key_encoder.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


# The loss


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.floats(0.01, 5))
def test_info_nce_is_the_published_formula(similarities: list[float], temperature: float) -> None:
    row = torch.tensor([similarities], dtype=torch.float64)
    expected = written_out(similarities, temperature)
    assert moco.info_nce(row[:, 0], row[:, 1:], temperature).item() == pytest.approx(expected, abs=1e-12, rel=1e-12)


def test_a_query_never_meets_its_own_key_among_the_negatives() -> None:
    rows = unit_rows(3)
    model = pixels_model(-rows.mean(dim=0, keepdim=True).expand(3, 4))
    view = as_images(rows)
    before = copy.deepcopy(model.state_dict())
    first, again = model(view, view), model(view, view)
    assert first.loss < math.log(2)  # with its own key among the negatives, a query's loss is at least log 2
    assert first.accuracy == 1
    assert again.loss == first.loss
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)  # forward enqueued nothing
    model.update(first.keys, momentum=1.0)
    late = model(view, view)
    assert late.loss >= math.log(2)
    assert late.accuracy == 0


def test_ids_keep_an_images_own_older_keys_out_of_the_negatives() -> None:
    rows, older = unit_rows(3), unit_rows(5, seed=1)
    model = pixels_model(older)
    model.queue.enqueue(older[:4], torch.tensor([7, 8, 7, 9]))  # the fifth key's image stays unknown
    out = model(as_images(rows), as_images(rows), ids=torch.tensor([7, 9, 4]))
    left = [[1, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4]]
    similar = [[float(row @ older[i]) for i in negatives] for row, negatives in zip(rows, left, strict=True)]
    expected = sum(written_out([1.0, *each], 0.1) for each in similar) / 3
    assert out.loss.item() == pytest.approx(expected, abs=1e-10)
    assert out.negative.item() == pytest.approx(sum(map(sum, similar)) / sum(map(len, similar)), abs=1e-12)
    assert out.ids.tolist() == [7, 9, 4]
    model.update(out.keys, momentum=1.0, ids=out.ids)
    assert model.queue.ids.tolist() == [9, 4, 7, 9, 7]  # the ring was at its last slot
    assert model.queue.pointer == 2
    again = model(as_images(rows), as_images(rows), ids=torch.tensor([7, 9, 4]))
    assert again.accuracy == 1  # each key of before is masked for its own image
    model.update(again.keys, momentum=1.0)
    assert model.queue.ids.tolist() == [9, 4, -1, -1, -1]


def test_what_is_watched_are_means_of_cosine_similarities() -> None:
    rows, keys, queue = unit_rows(6, seed=2), unit_rows(6, seed=3), unit_rows(9, seed=4)
    out = pixels_model(queue)(as_images(3 * rows), as_images(0.5 * keys))
    positive, negative = (rows * keys).sum(dim=1), rows @ queue.T
    torch.testing.assert_close(out.keys, keys)
    torch.testing.assert_close(out.positive, positive.mean())
    torch.testing.assert_close(out.negative, negative.mean())
    assert out.accuracy == (positive > negative.amax(dim=1)).double().mean()
    assert 0 < out.accuracy < 1


def test_a_symmetric_loss_is_the_sum_of_both_directions_against_one_queue() -> None:
    rows1, rows2, queue = unit_rows(3, seed=2), unit_rows(3, seed=3), unit_rows(7, seed=4)
    view1, view2, ids = as_images(rows1), as_images(rows2), torch.tensor([3, 1, 2])
    one_way, both_ways = pixels_model(queue), pixels_model(queue, symmetric=True)
    there, back, both = (
        one_way(view1, view2, ids=ids),
        one_way(view2, view1, ids=ids),
        both_ways(view1, view2, ids=ids),
    )
    torch.testing.assert_close(both.loss, there.loss + back.loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(both.keys, torch.cat([rows1, rows2]))  # those of view 1 first
    both_ways.update(both.keys, momentum=1.0, ids=both.ids)
    torch.testing.assert_close(both_ways.queue.keys, torch.cat([rows1, rows2, queue[6:]]))
    assert both_ways.queue.ids.tolist() == [3, 1, 2, 3, 1, 2, -1]
    assert both_ways.queue.pointer == 6


# The queue


@given(st.integers(1, 9), st.lists(st.integers(0, 23), min_size=1, max_size=6))
def test_the_queue_is_a_ring_for_any_number_of_keys(size: int, counts: list[int]) -> None:
    queue = moco.KeyQueue(size, 2)
    slots, written = [(*key, -1.0) for key in queue.keys.tolist()], 0
    for count in counts:
        new = torch.arange(written, written + count)
        queue.enqueue(torch.stack([new, -new], dim=1).float(), new)
        for number in new.tolist():
            slots[written % size] = (float(number), -float(number), float(number))
            written += 1
        assert [(*key, i) for key, i in zip(queue.keys.tolist(), queue.ids.tolist(), strict=True)] == slots
        assert queue.pointer == written % size


def test_the_queue_starts_as_unit_vectors_of_unknown_images_and_is_saved() -> None:
    torch.manual_seed(3)
    queue = moco.KeyQueue(50, 8)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(50))
    assert (queue.ids == -1).all()
    assert queue.pointer == 0
    assert queue.keys.std(dim=0).min() > 0.2
    assert list(queue.state_dict()) == ["keys", "ids", "pointer"]
    assert list(queue.parameters()) == []


# The key encoder


def test_the_key_encoder_starts_equal_and_has_no_gradient() -> None:
    model = small_v1()
    for p, q in zip(model.key_encoder.parameters(), model.query_encoder.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.data_ptr() != q.data_ptr()
        assert not p.requires_grad
    out = model(*make_batches(1)[0])
    out.loss.backward()
    assert all(p.grad is None for p in model.key_encoder.parameters())
    assert all(p.grad is not None and p.grad.any() for p in trained(model))
    assert not any(each.requires_grad for each in out[1:] if each is not None)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update_moves_parameters_and_never_buffers(momentum: float, dtype: torch.dtype) -> None:
    model = small_v1().to(dtype)
    view1, view2 = (view.to(dtype) for view in make_batches(1)[0])
    out = model(view1, view2 + 1)
    for p in trained(model):
        p.data.add_(torch.randn_like(p))
    before = copy.deepcopy(model)
    model.update(out.keys, momentum=momentum)
    pairs = zip(before.key_encoder.parameters(), before.query_encoder.parameters(), strict=True)
    for p, (old, query) in zip(model.key_encoder.parameters(), pairs, strict=True):
        expected = momentum * old.double() + (1 - momentum) * query.double()
        torch.testing.assert_close(p.double(), expected, rtol=0, atol=1e-15 if dtype == torch.float64 else 1e-6)
    for p, q in zip(model.query_encoder.parameters(), before.query_encoder.parameters(), strict=True):
        assert torch.equal(p, q)
    buffers = dict(model.query_encoder.named_buffers())
    for name, buffer in model.key_encoder.named_buffers():
        assert torch.equal(buffer, before.key_encoder.get_buffer(name))
        if name.endswith("running_mean"):
            assert not torch.equal(buffer, buffers[name])  # each has its own, of its own views


# Batch norm and the order of the images


def test_permuting_the_key_images_changes_nothing_for_ordinary_batch_norm() -> None:
    view1, view2 = make_batches(1, size=16)[0]
    plain, shuffled = small_v1(), small_v1()
    shuffled.shuffle = "device"
    generator = torch.Generator().manual_seed(0)
    one, other = plain(view1, view2), shuffled(view1, view2, generator=generator)
    torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=1e-12)
    torch.testing.assert_close(one.loss, other.loss, rtol=0, atol=1e-12)


def test_split_batch_norm_comes_with_a_permutation_that_the_generator_decides() -> None:
    view1, view2 = make_batches(1, size=16)[0]
    keys = [small_v1("split")(view1, view2, generator=torch.Generator().manual_seed(seed)).keys for seed in (0, 0, 1)]
    assert torch.equal(keys[0], keys[1])
    assert not torch.allclose(keys[0], keys[2], rtol=0, atol=1e-3)  # other images shared each group
    assert not torch.allclose(keys[0], small_v1("split").key_encoder(view2), rtol=0, atol=1e-3)


# Precision


@pytest.mark.parametrize("build", [small_v1, small_v3])
def test_loss_and_keys_are_float32_under_bf16_and_stay_float64(build) -> None:
    view1, view2 = make_batches(1)[0]
    model = build()
    wide = model(view1, view2)
    assert {wide.loss.dtype, wide.keys.dtype, wide.positive.dtype, wide.negative.dtype} == {torch.float64}
    single = build().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert single.query_encoder(view1.float()).dtype == torch.bfloat16
        out = single(view1.float(), view2.float())
    assert {out.loss.dtype, out.keys.dtype, out.positive.dtype, out.negative.dtype} == {torch.float32}
    out.loss.backward()
    assert {p.grad.dtype for p in trained(single) if p.grad is not None} == {torch.float32}


def test_logits_of_bf16_projections_are_those_of_float32() -> None:
    rows, keys, queue = (unit_rows(n, seed, torch.float32) for n, seed in ((6, 0), (6, 1), (9, 2)))
    model = pixels_model(queue, temperature=0.07)
    exact = pixels_model(queue.double(), temperature=0.07)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(as_images(rows), as_images(keys))
    rounded = exact(as_images(rows.bfloat16().double()), as_images(keys.bfloat16().double()))
    assert out.loss.item() == pytest.approx(rounded.loss.item(), abs=1e-5)  # bf16 logits would be off by 1e-2
