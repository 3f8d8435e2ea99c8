import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import moco
from moco.evaluate import linear_fast as module
from moco.evaluate.linear_fast import Settings, fit, held_back, linear, on_axes, principal_axes, probe

CLASSES = 4


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels of handwritten digits, some of which never change, and their classes."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float(), torch.from_numpy(labels).long()


def blobs(n: int, *, seed: int, dim: int = 6, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(n) % CLASSES
    return centres[labels] + noise * torch.randn(n, dim, generator=g), labels


def embeddings(vectors: torch.Tensor, labels: torch.Tensor | None) -> moco.Embeddings:
    names = tuple(map(str, range(len(vectors))))
    return moco.Embeddings(vectors.numpy(), names, None if labels is None else labels.numpy(), None)


def standardised(vectors: torch.Tensor) -> np.ndarray:
    wide = vectors.double().numpy()
    spread = wide.std(axis=0)
    return (wide - wide.mean(axis=0)) / np.where(spread > 0, spread, 1)


@pytest.mark.parametrize("decay", [1e-1, 1e-2])
def test_a_pair_reaches_the_optimum_that_sklearn_finds(decay):
    vectors, labels = digits()
    settings = Settings(lr=1.0, weight_decay=decay, epochs=300, batch_size=len(vectors))
    got = probe(vectors, labels, vectors, settings=settings).scores.softmax(dim=1)
    # mean loss + decay / 2 * |w|^2, which sklearn writes as C * summed loss + 1 / 2 * |w|^2
    solver = LogisticRegression(C=1 / (decay * len(vectors)), tol=1e-8, max_iter=1000)
    want = solver.fit(standardised(vectors), labels.numpy()).predict_proba(standardised(vectors))
    torch.testing.assert_close(got.double(), torch.from_numpy(want), rtol=0, atol=2e-3)


def test_the_chosen_classifier_is_as_good_as_sklearns():
    vectors, labels = digits()
    test = torch.arange(len(vectors)) % 3 == 0
    got = linear(embeddings(vectors[~test], labels[~test]), embeddings(vectors[test], labels[test]))
    theirs = LogisticRegression(max_iter=2000).fit(vectors[~test].numpy(), labels[~test].numpy())
    assert got["top1"] > 100 * theirs.score(vectors[test].numpy(), labels[test].numpy()) - 1
    assert got["top1"] < got["top5"] <= 100 and 90 < got["validation_top1"] <= 100


def test_classes_that_lie_apart_are_told_apart_whatever_the_scale_of_the_features():
    train, test = (blobs(400, seed=seed, noise=0.3) for seed in (0, 1))
    for scale in (1e-4, 1.0, 1e4):
        found = linear(embeddings(scale * train[0], train[1]), embeddings(scale * test[0], test[1]), epochs=20)
        assert found["top1"] == found["validation_top1"] == 100


def test_the_test_labels_choose_nothing():
    (train, labels), (test, wanted) = blobs(300, seed=0, noise=4), blobs(200, seed=1, noise=4)
    shuffled = wanted[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    own, other = (linear(embeddings(train, labels), embeddings(test, each), epochs=20) for each in (wanted, shuffled))
    chosen = ("lr", "weight_decay", "validation_top1")
    assert [own[name] for name in chosen] == [other[name] for name in chosen]
    assert own["top1"] > other["top1"] + 10


def test_pairs_that_learn_at_once_learn_what_each_learns_alone():
    vectors, labels = blobs(200, seed=0, noise=3)
    inputs, rows = on_axes(principal_axes(vectors, torch.device("cpu")), vectors), torch.arange(0, 200, 2)
    pairs, settings = [(1.0, 1e-3), (0.1, 1e-3), (0.3, 0.5)], Settings(epochs=5, batch_size=32)
    at_once = fit(inputs, labels, rows, pairs, num_classes=CLASSES, settings=settings)
    for together, pair in zip(at_once, pairs, strict=True):
        alone = fit(inputs, labels, rows, [pair], num_classes=CLASSES, settings=settings)[0]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (at_once[0] - at_once[1]).abs().max() > 1e-2


def test_steps_are_those_of_sgd_on_the_loss_by_autograd():
    vectors, labels = blobs(60, seed=0, noise=3)
    axes, (lr, decay) = principal_axes(vectors, torch.device("cpu")), (0.5, 0.1)
    settings = Settings(epochs=4, batch_size=60)
    got = fit(on_axes(axes, vectors), labels, torch.arange(60), [(lr, decay)], num_classes=CLASSES, settings=settings)[
        0
    ]
    weights, velocity = torch.zeros(7, CLASSES, requires_grad=True), torch.zeros(7, CLASSES)
    penalised = torch.tensor([decay] * 6 + [0.0])[:, None]
    for step in range(4):
        loss = torch.nn.functional.cross_entropy(axes(vectors) @ weights, labels)
        (slope,) = torch.autograd.grad(loss + (penalised * weights**2).sum() / 2, weights)
        velocity = 0.9 * velocity + slope * lr / (axes.curvature[:, None] / 2 + penalised)
        weights = (weights - velocity * (1 + math.cos(math.pi * step / 4)) / 2).detach().requires_grad_()
    torch.testing.assert_close(got, weights.detach(), rtol=1e-4, atol=1e-5)


def test_little_memory_changes_nothing(monkeypatch):
    (train, labels), (test, _) = blobs(200, seed=0, noise=3), blobs(50, seed=1)
    settings = Settings(epochs=3)
    roomy = probe(train, labels, test, settings=settings)
    monkeypatch.setattr(module, "SWEEP_BYTES", 1)  # one pair at a time
    for name, value in (
        ("HELD_IN_MEMORY", 0),
        ("ROWS_AT_ONCE", 7),
    ):  # rows are turned when needed; blocks of 7
        monkeypatch.setattr(module, name, value)
        tight = probe(train, labels, test, settings=settings)
        assert tight[1:] == roomy[1:]
        torch.testing.assert_close(tight.scores, roomy.scores, rtol=1e-4, atol=1e-4)


def test_a_rate_at_which_learning_diverges_is_not_chosen(monkeypatch):
    monkeypatch.setattr(module, "RATES", (1e30, 0.3))
    found = probe(*blobs(200, seed=0, noise=3), blobs(50, seed=1)[0])
    assert found.lr == 0.3 and found.scores.isfinite().all()


def test_a_tenth_of_each_class_is_held_back_and_none_of_a_class_of_one():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 3 + [3])
    held = held_back(labels, seed=0)
    assert torch.bincount(labels[held], minlength=4).tolist() == [5, 2, 1, 0]
    assert torch.equal(held, held_back(labels, seed=0)) and not torch.equal(held, held_back(labels, seed=1))


def test_one_image_of_each_class_is_enough():
    found = probe(*blobs(CLASSES, seed=0), blobs(40, seed=1)[0])
    assert math.isnan(found.validation_top1)
    assert (found.scores.argmax(dim=1) == torch.arange(40) % CLASSES).double().mean() > 0.6


def test_more_features_than_images_are_no_trouble():
    (train, labels), (test, wanted) = blobs(60, seed=0, dim=300), blobs(200, seed=1, dim=300)
    assert linear(embeddings(train, labels), embeddings(test, wanted))["top1"] == 100


def test_axes_are_standardised_uncorrelated_and_leave_out_what_never_changes():
    vectors, _ = digits()
    changing = int((vectors.amax(dim=0) > vectors.amin(dim=0)).sum())
    vectors = torch.cat([vectors, torch.full((len(vectors), 1), 7.7)], dim=1)
    axes = principal_axes(vectors, torch.device("cpu"))
    turned = axes(vectors).double()
    squares = turned.T @ turned / len(turned)
    torch.testing.assert_close(squares, axes.curvature.double().diag(), rtol=0, atol=1e-3)
    assert axes.curvature[:-1].sum().item() == pytest.approx(changing, abs=1e-3)
    assert torch.equal(turned[:, -1], torch.ones(len(turned), dtype=torch.float64))


def test_the_same_seed_gives_the_same_and_another_holds_back_others():
    train, test = blobs(300, seed=0, noise=5), embeddings(*blobs(200, seed=1, noise=5))
    first, again, other = (linear(embeddings(*train), test, epochs=2, seed=seed) for seed in (3, 3, 4))
    assert first == again != other


def test_what_is_given_is_not_chosen():
    found = linear(embeddings(*blobs(80, seed=0)), embeddings(*blobs(40, seed=1)), lr=0.2, weight_decay=0.05, epochs=2)
    assert (found["lr"], found["weight_decay"]) == (0.2, 0.05)


def test_embeddings_that_cannot_be_probed_are_refused_in_one_line():
    vectors, labels = blobs(40, seed=0)
    good = embeddings(vectors, labels)
    for train, test, message in [
        (embeddings(vectors, None), good, "the train images have no labels"),
        (good, embeddings(vectors, None), "the test images have no labels"),
        (good, embeddings(vectors[:, :5], labels), "training features have 6 dimensions, test features 5"),
        (embeddings(vectors / 0, labels), good, "some training features are NaN or infinite"),
        (good, embeddings(vectors / 0, labels), "some test features are NaN or infinite"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            linear(train, test)
        assert "\n" not in str(caught.value)
