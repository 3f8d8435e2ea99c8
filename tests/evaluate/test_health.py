import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from moco.config import DataConfig, EvaluateConfig
from moco.data import ArrayImages, FileImages, Splits, load_data, some_of
from moco.evaluate import health
from moco.evaluate.contract import Task
from moco.evaluate.health import alignment, measure, rank_me, two_crops, uniformity, verdict, view_features
from moco.method.backbones import build_backbone
from moco.method.encoder import ImageEncoder
from moco.views.specs import VIEWS
from moco.views.two_views import TwoViews


def vectors(number: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def units(number: int, dim: int, *, seed: int = 0) -> Tensor:
    return F.normalize(vectors(number, dim, seed=seed), dim=1)


def encoder(*, channels: int = 3, size: int = 8, seed: int = 0) -> ImageEncoder:
    torch.manual_seed(seed)
    backbone = build_backbone("resnet-tiny", stem="small", channels=channels)
    half = (0.5, 0.5, 0.5)
    return ImageEncoder(
        backbone, name="resnet-tiny", stem="small", channels=channels, mean=half, std=half, input_size=size
    )


def task(splits: Splits, *, projector: nn.Module | None = None, channels: int = 1) -> Task:
    settings = EvaluateConfig(accelerator="cpu", precision="fp32")
    frozen = encoder(channels=channels).eval().requires_grad_(False)
    return Task(frozen, projector, splits, settings, lambda what, done, total: None)


def unlabelled(number: int, *, side: int = 8) -> ArrayImages:
    pixels = torch.randint(0, 256, (number, 3, side, side), generator=torch.Generator().manual_seed(number)).byte()
    return ArrayImages(pixels, None, None, tuple(map(str, range(number))))


# The published formulas, written out by hand


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.5])
def test_alignment_is_the_mean_distance_of_views_to_a_power(alpha: float) -> None:
    x, y = units(9, 5), units(9, 5, seed=1)
    expected = np.mean([np.sqrt(((a - b) ** 2).sum()) ** alpha for a, b in zip(x.numpy(), y.numpy(), strict=True)])
    assert alignment(x, y, alpha=alpha) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("t", [0.5, 2.0, 400.0])
@pytest.mark.parametrize("at_once", [2**24, 60, 1])
def test_uniformity_is_the_log_of_the_mean_potential_of_all_pairs(
    t: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PAIRS_AT_ONCE", at_once)
    x = units(23, 6)
    rows = x.numpy().astype(np.longdouble)  # at t = 400 the potentials are under the smallest float64
    potentials = [np.exp(-t * ((rows[i] - rows[j]) ** 2).sum()) for i in range(23) for j in range(i)]
    assert uniformity(x, t=t) == pytest.approx(float(np.log(np.mean(potentials))), rel=1e-12)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40)])
def test_the_effective_rank_is_exp_of_the_entropy_of_singular_values(shape: tuple[int, int]) -> None:
    z = vectors(*shape)
    values = np.sqrt(np.sort(np.linalg.eigvalsh(z.numpy() @ z.numpy().T))[::-1][:7])
    shares = values / values.sum() + 1e-7
    assert rank_me(z) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-10)
    assert rank_me(3 * z) == pytest.approx(rank_me(z), rel=1e-12)


def test_the_figures_are_what_they_are_said_to_be_at_both_ends() -> None:
    same = units(1, 8).repeat(50, 1)
    assert uniformity(same) == pytest.approx(0, abs=1e-12) and rank_me(same) == pytest.approx(1, abs=1e-3)
    assert alignment(same, same) == 0
    assert rank_me(torch.eye(8, dtype=torch.float64)) == pytest.approx(8, rel=1e-4)
    even = units(3000, 256)
    assert uniformity(even) == pytest.approx(-4 + 8 / 256, abs=0.01)
    assert math.isnan(rank_me(torch.tensor([[1.0, math.nan], [0.0, 1.0]])))


# All figures of two views


def test_an_image_is_consistent_if_its_own_other_view_is_the_nearest() -> None:
    x = vectors(30, 16)
    near = x + 0.01 * vectors(30, 16, seed=1)
    assert measure(x, 5 * near)["consistency"] == 100  # lengths do not matter
    assert measure(x, near.roll(1, dims=0))["consistency"] == 0
    half = torch.cat([near[:15], near[15:].roll(1, dims=0)])
    assert measure(x, half)["consistency"] == 50


def test_figures_agree_with_loops_over_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PAIRS_AT_ONCE", 40)
    x, y = vectors(20, 6), vectors(20, 6, seed=1)
    x[:, 4], y[:, 4] = 0, 0
    found, a, b = measure(x, y), F.normalize(x, dim=1), F.normalize(y, dim=1)
    cosines = a @ b.T
    assert found["positive"] == pytest.approx(cosines.diagonal().mean().item(), rel=1e-12)
    others = [cosines[i, j].item() for i in range(20) for j in range(20) if i != j]
    assert found["negative"] == pytest.approx(np.mean(others), rel=1e-10)
    spreads = a.numpy().std(axis=0, ddof=1) * math.sqrt(6)
    assert found["spread"] == pytest.approx(spreads.mean(), rel=1e-12)
    assert found["spread_min"] == 0 and found["dead"] == pytest.approx(100 / 6)
    assert found["effective_rank"] == pytest.approx(rank_me(x)) and found["effective_rank"] < 5.01
    assert found["effective_rank_share"] == pytest.approx(100 / 6 * found["effective_rank"])
    assert (found["alignment"], found["uniformity"]) == (alignment(a, b), uniformity(a))


def said(make: Callable[[Tensor], Tensor], *, dim: int = 64) -> str:
    x = make(vectors(500, dim))
    return verdict(measure(x, x + 0.001 * vectors(500, dim, seed=1)), num_images=500, num_dims=dim)


def test_the_verdict_names_a_collapse_and_what_to_do() -> None:
    assert said(lambda x: x).startswith("not collapsed: effective rank 6") and "100.0 %" in said(lambda x: x)
    point = said(lambda x: 1 + 0.01 * x)
    assert point.startswith("collapsed") and "spread 0.0" in point and "--optim.base_lr" in point
    line = said(lambda x: x[:, :1] * torch.ones(64, dtype=x.dtype))
    assert line.startswith("collapsed") and "effective rank 1.0" in line
    plane = said(lambda x: x[:, :3] @ vectors(3, 64, seed=2))
    assert plane.startswith("few dimensions are used") and "of 64" in plane and "--model.temperature" in plane
    assert said(lambda x: x * math.nan).startswith("broken")


def test_the_verdict_says_what_the_rank_cannot_tell() -> None:
    assert "compare the rank only" not in said(lambda x: x)
    assert "compare the rank only" in said(lambda x: x, dim=256)
    silent = said(lambda x: x * (torch.arange(64) >= 16))
    assert "25 % of the dimensions are the same for every image" in silent


# Features of two views


def test_features_of_two_views_are_the_encoders_of_these_views() -> None:
    watched, images = encoder().train(), unlabelled(21, side=12)
    before = {name: value.clone() for name, value in watched.state_dict().items()}
    views, state = TwoViews(VIEWS["cifar"](), 8, seed=3), torch.random.get_rng_state()
    found = view_features(watched, images, views, epoch=4, batch_size=8, precision="fp32")
    assert watched.training and torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in watched.state_dict().items())
    pair = views(images.images, torch.arange(21), epoch=4)
    with torch.no_grad():
        for vectors, view in zip(found, pair, strict=True):
            torch.testing.assert_close(vectors, watched.eval()(view), rtol=1e-4, atol=1e-5)
    again = view_features(watched, images, views, epoch=5, precision="fp32")
    assert not torch.allclose(again[0], found[0])


def files(folder: Path, number: int) -> FileImages:
    for place in range(number):
        pixels = np.random.default_rng(place).integers(0, 256, (20 + place, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.png")
    found = load_data(DataConfig(source=str(folder), memory=1e-9)).train
    assert isinstance(found, FileImages)
    return found


def test_files_are_cropped_like_in_training_and_an_unreadable_one_is_black(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, views = files(tmp_path, 5), TwoViews(VIEWS["v2"](), 8, seed=1)
    broken = tmp_path / "3.png"
    broken.write_bytes(broken.read_bytes()[:600])
    crops = two_crops(images, torch.tensor([4, 3]), views, epoch=2)
    assert torch.equal(crops[0], views.crop(images.decode(4), 4, 2)) and not crops[1].any()
    assert "1 of 2 images are black" in caplog.text
    whole = view_features(encoder(), images, views, epoch=2, batch_size=2, precision="fp32")
    held = two_crops(images, torch.arange(5), views, epoch=2)
    for from_files, from_crops in zip(whole, view_features(encoder(), held, views, epoch=2), strict=True):
        torch.testing.assert_close(from_files, from_crops, rtol=0.02, atol=0.02)  # the latter perhaps in bf16


def test_images_are_chosen_evenly() -> None:
    images = unlabelled(100)
    assert some_of(images, 100) is images
    chosen = some_of(images, 12).paths
    assert len(chosen) == 12 and chosen[0] == "0" and chosen[-1] == "99" and len(set(chosen)) == 12


# The protocol


def test_health_needs_no_labels_and_gives_the_same_figures_again() -> None:
    digits = load_data(DataConfig(source="digits", channels=1)).train
    assert isinstance(digits, ArrayImages)
    nameless = ArrayImages(digits.images[:200], None, None, digits.paths[:200])
    first, again = (health.evaluate(task(Splits(nameless, None))) for _ in range(2))
    assert first.figures == again.figures and first.scores is None
    assert first.figures["effective_rank"] > 2 and 0 < first.figures["alignment"] < 4
    assert "200 training images" in first.notes[0] and "without blur" in first.notes[0]
    assert len(first.notes) == 2 and first.notes[1].startswith("Features: ")


def test_projections_are_measured_where_there_is_a_projector() -> None:
    outcome = health.evaluate(task(Splits(unlabelled(40), None), projector=nn.Linear(128, 16), channels=3))
    plain = {name for name in outcome.figures if not name.startswith("projection_")}
    assert {f"projection_{name}" for name in plain} | plain == outcome.figures.keys()
    assert outcome.figures["projection_effective_rank"] <= 16.1
    assert outcome.notes[2].startswith("Projections: ")


def test_no_more_images_are_looked_at_than_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MAX_IMAGES", 10)
    outcome = health.evaluate(task(Splits(unlabelled(40), None), channels=3))
    assert "10 training images" in outcome.notes[0] and outcome.figures["effective_rank"] < 10.1
    with pytest.raises(ValueError, match="^there is only one training image; .*--data$"):
        health.evaluate(task(Splits(unlabelled(1), None), channels=3))
