import doctest
from typing import Any

import pytest
import torch
from torch import nn

import moco
import moco.method.variants
from moco.config import ModelConfig
from moco.method.batchnorm import SplitBatchNorm2d, SyncBatchNorm
from moco.method.model import BatchMoCo, QueueMoCo
from moco.method.variants import VARIANTS, build_model, choose_batchnorm, loss_range
from small import SmallBackbone, make_batches


def on_paper(variant: str, backbone: str | nn.Module, **changes: Any) -> Any:
    """The model without the time it takes to draw its weights."""
    with torch.device("meta"):
        return moco.create_model(variant, backbone=backbone, **changes)


def small(variant: str, **changes: Any) -> Any:
    queue_size = None if variant == "v3" else 32
    return moco.create_model(variant, backbone=SmallBackbone(), dim=5, hidden_dim=8, queue_size=queue_size, **changes)


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# Sizes


@pytest.mark.parametrize(
    ("variant", "backbone", "changes", "parameters", "tensors"),
    [
        ("v1", "resnet50", {}, 23_770_304, 320),
        ("v2", "resnet50", {}, 27_966_656, 322),
        ("v1", "resnet18", {"stem": "small"}, 11_234_496, None),
        ("v1", "resnet50", {"stem": "small", "head": "mlp_bn"}, 24_615_616, None),
        ("v3", "resnet50", {}, 32_953_408, None),
        ("v3", "vit_small_patch16_224", {}, 41_080_704, None),
        ("v3", "vit-small-v3", {}, 41_080_704, None),
        ("v3", "vit-base-v3", {}, 106_786_560, None),
    ],
)
def test_encoders_have_the_published_number_of_parameters(
    variant: str, backbone: str, changes: dict, parameters: int, tensors: int | None
) -> None:
    model = on_paper(variant, backbone, **changes)
    for encoder in (model.query_encoder, model.key_encoder):
        assert num_parameters(encoder) == parameters
        assert tensors is None or len(encoder.state_dict()) == tensors
    if isinstance(model, BatchMoCo):
        assert num_parameters(model.predictor) == 2_105_344
    else:
        assert {n: tuple(t.shape) for n, t in model.queue.state_dict().items()} == {
            "keys": (65_536, 128),
            "ids": (65_536,),
            "pointer": (),
        }


def test_tensors_stand_under_the_names_of_the_interface() -> None:
    names = set(on_paper("v2", "resnet18").state_dict())
    for encoder in ("query_encoder", "key_encoder"):
        assert f"{encoder}.backbone.layer4.1.bn2.running_var" in names
        assert {f"{encoder}.projector.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")} <= names
    assert {n.split(".")[0] for n in names} == {"query_encoder", "key_encoder", "queue"}
    assert {n.split(".")[0] for n in on_paper("v3", "resnet18").state_dict()} == {
        "query_encoder",
        "key_encoder",
        "predictor",
    }


# The loss of an encoder that knows nothing, and of a perfect one


@pytest.mark.parametrize(
    ("settings", "batch_size", "chance", "floor"),
    [
        ({"variant": "v1", "queue_size": 65536, "temperature": 0.07}, 256, 11.09, 0.04),
        ({"variant": "v2", "queue_size": 65536, "temperature": 0.2}, 256, 11.09, 6.09),
        ({"variant": "v1", "queue_size": 4096, "temperature": 0.1}, 512, 8.32, 0.17),
        ({"variant": "v2", "queue_size": 4096, "temperature": 0.5}, 256, 8.32, 6.32),
        ({"variant": "v3", "queue_size": 0, "temperature": 1.0}, 4096, 33.27, 29.27),
        ({"variant": "v3", "queue_size": 0, "temperature": 0.2}, 4096, 6.65, 2.68),
        ({"variant": "v3", "queue_size": 0, "temperature": 0.2}, 1024, 5.55, 1.65),
        ({"variant": "v1", "queue_size": 4096, "temperature": 0.1, "symmetric": True}, 512, 16.64, 0.34),
    ],
)
def test_chance_and_floor_of_the_loss(settings: dict, batch_size: int, chance: float, floor: float) -> None:
    found = loss_range(ModelConfig.model_validate(settings), batch_size)
    assert found == (pytest.approx(chance, abs=0.006), pytest.approx(floor, abs=0.006))


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_loss_is_at_the_floor_when_every_negative_is_orthogonal(symmetric: bool) -> None:
    config = ModelConfig(variant="v1", dim=6, queue_size=32, temperature=0.2, symmetric=symmetric, batchnorm="plain")
    model: Any = build_model(config, backbone=SmallBackbone())
    with torch.no_grad():  # every query and key is the first axis, every key in the queue the second
        for encoder in (model.query_encoder, model.key_encoder):
            encoder.projector.weight.zero_()
            encoder.projector.bias.copy_(torch.eye(6)[0])
        model.queue.keys.copy_(torch.eye(6)[1].expand(32, 6))
    out = model(torch.rand(8, 3, 9, 9), torch.rand(8, 3, 9, 9))
    chance, floor = loss_range(config, 8)
    assert out.loss.item() == pytest.approx(floor, abs=1e-5)
    with torch.no_grad():
        model.queue.keys.copy_(torch.eye(6)[0].expand(32, 6))  # nothing tells a key from the others
    assert model(torch.rand(8, 3, 9, 9), torch.rand(8, 3, 9, 9)).loss.item() == pytest.approx(chance, abs=1e-5)


def test_the_loss_of_v3_without_knowledge_is_chance() -> None:
    config = ModelConfig(variant="v3", dim=6, queue_size=0, temperature=0.2, hidden_dim=8)
    model: Any = build_model(config, backbone=SmallBackbone(vit=True))
    with torch.no_grad():
        model.key_encoder.projector[6].weight.zero_()  # all keys alike
        model.key_encoder.projector[7].register_forward_hook(lambda module, inputs, output: output + 1)
    out = model(torch.rand(8, 3, 9, 9), torch.rand(8, 3, 9, 9))
    assert out.loss.item() == pytest.approx(loss_range(config, 8)[0], abs=1e-4)


# One contract for all


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_takes_a_step(variant: str) -> None:
    torch.manual_seed(0)
    model = small(variant, bn_splits=2)
    view1, view2 = (view.float() for view in make_batches(1)[0])
    out = model(view1, view2)
    assert out.loss.shape == ()
    assert out.keys.shape == (16 if model.symmetric else 8, 5)
    torch.testing.assert_close(out.keys.norm(dim=1), torch.ones(len(out.keys)))
    out.loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (not name.startswith("key_encoder")), name
    before = [p.clone() for p in model.key_encoder.parameters()]
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    model.update(out.keys, momentum=0.5)
    moved = zip(model.key_encoder.parameters(), before, strict=True)
    assert any(not torch.equal(p, q) for p, q in moved)
    features = model.query_encoder.eval().features(view1)
    assert features.shape == (8, 6)


def test_what_is_not_given_is_the_papers() -> None:
    v1, v2, v3 = (on_paper(variant, SmallBackbone()) for variant in ("v1", "v2", "v3"))
    assert (v1.temperature, v2.temperature, v3.temperature) == (0.07, 0.2, 1.0)
    assert (v1.symmetric, v2.symmetric, v3.symmetric) == (False, False, True)
    assert isinstance(v1.query_encoder.projector, nn.Linear)
    assert [type(m) for m in v2.query_encoder.projector] == [nn.Linear, nn.ReLU, nn.Linear]
    assert (v1.query_encoder.projector.out_features, v3.predictor[-1].out_features) == (128, 256)
    assert isinstance(v1, QueueMoCo) and isinstance(v3, BatchMoCo)
    assert on_paper("v1", SmallBackbone(), temperature=0.3).temperature == 0.3


def test_v3_starts_each_residual_block_as_the_identity_and_v1_does_not() -> None:
    torch.manual_seed(0)
    for variant, start in (("v1", 1), ("v3", 0)):
        queue_size = None if variant == "v3" else 16
        model: Any = moco.create_model(variant, backbone="resnet18", hidden_dim=16, queue_size=queue_size)
        for encoder in (model.query_encoder, model.key_encoder):
            assert (encoder.backbone.layer3[1].bn2.weight == start).all()


@pytest.mark.parametrize("name", ["vit-small-v3", "vit-conv-small-v3"])
def test_the_transformers_of_v3_have_its_deeper_heads(name: str) -> None:
    model = on_paper("v3", name)
    assert [m.in_features for m in model.query_encoder.projector if isinstance(m, nn.Linear)] == [384, 4096, 4096]
    assert isinstance(model.predictor[-1], SyncBatchNorm) and model.predictor[-1].weight is None


def test_resnets_have_a_shallower_projector_and_a_bare_predictor_in_v3() -> None:
    resnet, other = (on_paper("v3", SmallBackbone(vit=vit)) for vit in (False, True))
    linear = [sum(isinstance(m, nn.Linear) for m in model.query_encoder.projector) for model in (resnet, other)]
    assert linear == [2, 3]
    assert isinstance(resnet.predictor[-1], nn.Linear)
    assert isinstance(other.predictor[-1], SyncBatchNorm) and other.predictor[-1].weight is None


@pytest.mark.parametrize(
    ("kind", "norm", "shuffle"),
    [
        ("auto", SplitBatchNorm2d, "device"),
        ("split", SplitBatchNorm2d, "device"),
        ("shuffle", nn.BatchNorm2d, "ranks"),
        ("sync", SyncBatchNorm, None),
        ("plain", nn.BatchNorm2d, None),
    ],
)
def test_the_batch_norm_asked_for_is_in_both_encoders(kind: str, norm: type, shuffle: str | None) -> None:
    model = small("v2", batchnorm=kind, bn_splits=4)
    assert model.shuffle == shuffle
    for encoder in (model.query_encoder, model.key_encoder):
        norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d | SplitBatchNorm2d | SyncBatchNorm)]
        assert [type(m) for m in norms] == [norm, norm]
        assert all(m.num_splits == 4 for m in norms if isinstance(m, SplitBatchNorm2d))


def test_auto_batch_norm_is_split_for_a_queue_and_sync_for_v3_on_one_process() -> None:
    assert [choose_batchnorm(ModelConfig(variant=variant)) for variant in VARIANTS] == ["split", "split", "sync"]
    assert choose_batchnorm(ModelConfig(batchnorm="plain")) == "plain"


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "v4"}, "^unknown variant 'v4': expected one of v1, v2, v3$"),
        ({"backbone": "resnet_50"}, "^unknown backbone 'resnet_50': .*resnet50"),
        ({"backbone": nn.Flatten()}, "^backbone Flatten must have an integer `num_features`"),
        ({"queue_size": 0}, "^queue_size is 0; v2 takes its negatives from a queue"),
        ({"dim": 0}, "^dim is 0; expected greater than 0$"),
        ({"batchnorm": "spilt"}, "^batchnorm is 'spilt'; .*did you mean split"),
        ({"head": "deep"}, "^head is 'deep'; expected "),
    ],
)
def test_impossible_settings_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"backbone": SmallBackbone()} | changes
    with pytest.raises(ValueError, match=message):
        moco.create_model(**settings)


def test_the_examples_run() -> None:
    outcome = doctest.testmod(moco.method.variants)
    assert outcome.attempted > 2
    assert outcome.failed == 0
