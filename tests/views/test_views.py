import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torchvision.transforms import RandomResizedCrop

from moco import TwoViews
from moco.config import ViewsConfig
from moco.views.parameters import crop_box, random_numbers, view_parameters
from moco.views.specs import CIFAR10, IMAGENET, VIEWS, ViewSpec, view_specs

N = 24_000
# Everything off but what a test is about; the statistics leave the values as they are.
PLAIN = ViewSpec(
    crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, jitter_p=0, grey_p=0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)
# In the order of the published code. There the flip comes last, in the CIFAR notebook right after the crop.
PUBLISHED = {
    "v1": (("crop", "grey", "jitter", "flip"),) * 2,
    "v2": (("crop", "jitter", "grey", "blur", "flip"),) * 2,
    "v3": (("crop", "jitter", "grey", "blur", "flip"), ("crop", "jitter", "grey", "blur", "solarize", "flip")),
    "cifar": (("crop", "flip", "jitter", "grey"),) * 2,
    "digits": (("crop", "jitter"),) * 2,
}
ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def pictures(n: int, channels: int, height: int, width: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(n)
    coarse = torch.randint(0, 256, (n, channels, height // 4, width // 4), generator=g, dtype=torch.uint8)
    return tv.resize(coarse, [height, width])


def uniform(*, n: int = N, seed: int = 0, epoch: int = 0, view: int = 0) -> torch.Tensor:
    return random_numbers(torch.arange(n), seed=seed, epoch=epoch, view=view)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the largest difference of the two distribution functions."""
    grid = np.concatenate([a, b])
    parts = [np.searchsorted(np.sort(x), grid, side="right") / len(x) for x in (a, b)]
    return float(np.abs(parts[0] - parts[1]).max())


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest between a column of `a` and one of `b`."""
    a, b = ((x - x.mean(dim=0)) / x.std(dim=0) for x in (a, b))
    return (a.T @ b / len(a)).abs().max().item()


def by_torchvision(image, p, i, operations, size):
    """One view of one image, by torchvision's functional forms with the parameters of the i-th."""
    for operation in operations:
        if operation == "crop":
            box = (int(p.top[i]), int(p.left[i]), int(p.height[i]), int(p.width[i]))
            image = tv.resized_crop(image, *box, [size, size], antialias=True)
        elif operation == "flip" and p.flip[i]:
            image = tv.horizontal_flip(image)
        elif operation == "grey" and p.grey[i]:
            image = tv.rgb_to_grayscale(image, num_output_channels=3)
        elif operation == "jitter" and p.jitter[i]:
            for part in p.order[i].tolist():
                image = ADJUST[part](image, float(p.strength[i, part]))
        elif operation == "blur" and p.sigma[i] > 0:
            image = tv.gaussian_blur(image, [13, 13], [float(p.sigma[i])] * 2)
        elif operation == "solarize" and p.solarize[i]:
            image = tv.solarize(image, 128 / 255)
    return image


@pytest.mark.parametrize("name", VIEWS)
def test_every_recipe_equals_torchvision_in_the_published_order(name):
    specs, ids, size = VIEWS[name](), torch.arange(100, 160), 32
    images = pictures(len(ids), 3, 40, 48)
    both = TwoViews(specs, size, seed=5)(images, ids, epoch=7)
    for number, (views, spec, operations) in enumerate(zip(both, specs, PUBLISHED[name], strict=True)):
        p = view_parameters(random_numbers(ids, seed=5, epoch=7, view=number), spec, 40, 48)
        for i, image in enumerate(images.float() / 255):
            want = tv.normalize(by_torchvision(image, p, i, operations, size), list(spec.mean), list(spec.std))
            torch.testing.assert_close(views[i], want, atol=1 / 255 / min(spec.std), rtol=0)  # 1/255 in pixels


def test_recipes_have_the_published_strengths_and_probabilities():
    def facts(spec: ViewSpec):
        return spec.jitter, spec.jitter_p, spec.grey_p, spec.grey_first, spec.blur_p, spec.solarize_p, spec.flip

    v3 = (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, False
    published = {
        "v1": (((0.4, 0.4, 0.4, 0.4), 1.0, 0.2, True, 0.0, 0.0, 0.5),) * 2,
        "v2": (((0.4, 0.4, 0.4, 0.1), 0.8, 0.2, False, 0.5, 0.0, 0.5),) * 2,
        "v3": ((*v3, 1.0, 0.0, 0.5), (*v3, 0.1, 0.2, 0.5)),
        "cifar": (((0.4, 0.4, 0.4, 0.1), 0.8, 0.2, False, 0.0, 0.0, 0.5),) * 2,
    }
    for name, want in published.items():
        specs = VIEWS[name]()
        assert tuple(map(facts, specs)) == want, name
        for spec in specs:
            assert spec.crop_scale == ((0.08 if name == "cifar" else 0.2), 1.0) and spec.crop_ratio == (3 / 4, 4 / 3)
            assert (spec.mean, spec.std) == (CIFAR10 if name == "cifar" else IMAGENET) and spec.blur_sigma == (0.1, 2.0)


@pytest.mark.parametrize(
    "height, width, scale", [(32, 32, (0.08, 1.0)), (48, 64, (0.2, 1.0)), (20, 100, (0.2, 1.0)), (90, 30, (0.2, 1.0))]
)
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    n, spec = 20_000, replace(PLAIN, crop_scale=scale, crop_ratio=(3 / 4, 4 / 3))
    ours = torch.stack(crop_box(uniform(n=n), spec, height, width), dim=1).numpy()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(1, height, width)
        theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)])
    assert (ours >= (0, 0, 1, 1)).all() and (ours[:, :2] + ours[:, 2:] <= (height, width)).all()

    def measures(boxes):
        top, left, h, w = boxes.T.astype(float)
        share = np.stack([(top + 0.5) / (height - h + 1), (left + 0.5) / (width - w + 1)])
        return {"area": h * w, "log_ratio": np.log(w / h), "top": top, "left": left, "y": share[0], "x": share[1]}

    for name, a in measures(ours).items():
        b = measures(theirs)[name]
        # Equal distributions go beyond this distance, and beyond 5 sigma of a mean, once in a million.
        assert distance(a, b) < 2.7 * math.sqrt(2 / n), name
        assert abs(a.mean() - b.mean()) <= 5 * b.std() * math.sqrt(2 / n), name
        assert abs(a.var() - b.var()) <= 0.06 * b.var(), name


@pytest.mark.parametrize("height, width, box", [(20, 200, (0, 86, 20, 27)), (90, 9, (39, 0, 12, 9))])
def test_a_crop_that_never_fits_falls_back_to_torchvisions(height, width, box):
    spec = replace(PLAIN, crop_ratio=(3 / 4, 4 / 3))
    assert RandomResizedCrop.get_params(torch.empty(1, height, width), [1.0, 1.0], [3 / 4, 4 / 3]) == box
    for got, want in zip(crop_box(uniform(n=50), spec, height, width), box, strict=True):
        assert torch.equal(got, torch.full((50,), want))


def test_operations_happen_as_often_as_they_should():
    spec = ViewSpec(flip=0.5, jitter_p=0.8, grey_p=0.2, blur_p=0.1, solarize_p=0.3)
    p = view_parameters(uniform(), spec, 32, 32)
    for happened, often in ((p.flip, 0.5), (p.jitter, 0.8), (p.grey, 0.2), (p.sigma > 0, 0.1), (p.solarize, 0.3)):
        assert abs(happened.double().mean() - often) < 4 * math.sqrt(often * (1 - often) / N)
    for always in (0.0, 1.0):
        p = view_parameters(uniform(), replace(spec, flip=always, jitter_p=always, blur_p=always), 32, 32)
        assert (p.flip == bool(always)).all() and (p.jitter == bool(always)).all() and ((p.sigma > 0) == always).all()


def test_factors_and_sigmas_are_uniform_over_their_ranges():
    p = view_parameters(uniform(), ViewSpec(jitter=(0.4, 0.3, 0.2, 0.1), blur_p=0.5), 32, 32)
    ranges = [(0.6, 1.4), (0.7, 1.3), (0.8, 1.2), (-0.1, 0.1), (0.1, 2.0)]
    for values, (low, high) in zip([*p.strength.T, p.sigma[p.sigma > 0]], ranges, strict=True):
        assert low <= values.min() and values.max() <= high
        even = low + (high - low) * (np.arange(len(values)) + 0.5) / len(values)
        assert distance(values.numpy(), even) < 2.7 / math.sqrt(len(values))


def test_all_24_orders_of_the_jitter_are_equally_likely():
    order = view_parameters(uniform(), ViewSpec(), 32, 32).order
    assert torch.equal(order.sort(dim=1).values, torch.arange(4).expand(N, 4))
    counts = order.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 24 and (counts - N / 24).abs().max() < 4.5 * math.sqrt(N / 24)


def test_random_numbers_are_splitmix64_of_seed_epoch_view_and_id():
    """Steele, Lea and Flood 2014, in whole numbers. Fixed for good: a resumed run has to see the views it left."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, epoch, view, id in ((0, 0, 0, 0), (1, 2, 1, 3), (2**62 + 5, 800, 1, 1_281_166)):
        state = 0
        for word in (seed, epoch, view, id):
            state = mix((state + word + golden) % 2**64)
        want = [(mix((state + n * golden) % 2**64) >> 11) / 2**53 for n in range(1, 37)]
        assert random_numbers(torch.tensor([id]), seed=seed, epoch=epoch, view=view)[0].tolist() == want


def test_random_numbers_are_uniform_in_all_their_bits():
    u = uniform()
    even = (np.arange(N) + 0.5) / N
    assert max(distance(column.numpy(), even) for column in u.T) < 2.7 / math.sqrt(N)
    assert len(u.unique()) == u.numel()
    for bit in range(53):
        ones = (((u * 2**53).long() >> bit) & 1).double().mean(dim=0)
        assert (ones - 0.5).abs().max() < 5.5 * 0.5 / math.sqrt(N), bit


def test_random_numbers_are_uncorrelated_between_columns_ids_epochs_views_and_seeds():
    u, limit = uniform(), 5.5 / math.sqrt(N)
    assert (torch.corrcoef(u.T) - torch.eye(u.shape[1])).abs().max() < limit
    for lag in (1, 2, 256, 1000):
        assert correlation(u[lag:], u[:-lag]) < limit * math.sqrt(N / (N - lag)), lag
    seed, epoch, view = uniform(seed=1), uniform(epoch=1), uniform(view=1)
    for one, other in ((u, seed), (u, epoch), (u, view), (u, uniform(seed=2**40)), (seed, epoch), (epoch, view)):
        assert correlation(one, other) < limit


@pytest.mark.parametrize("name, size", [("cifar", 32), ("v1", 32), ("v2", 48), ("v3", 32), ("digits", 16)])
def test_views_of_an_image_are_equal_whatever_else_is_in_the_batch(name, size):
    n, views = 24, TwoViews(VIEWS[name](), size, seed=3)
    images, ids = pictures(n, 3, size, size + 8), 977 * torch.arange(n)
    whole = views(images, ids, epoch=2)
    shuffle = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    permuted = views(images[shuffle], ids[shuffle], epoch=2)
    parts = [views(i, j, epoch=2) for i, j in zip(images.split([5, 1, 18]), ids.split([5, 1, 18]), strict=True)]
    behind = views(torch.cat([images[10:13] // 2, images]), torch.cat([ids[:3] + 1, ids]), epoch=2)
    for number in (0, 1):
        assert torch.equal(permuted[number], whole[number][shuffle])
        assert torch.equal(torch.cat([part[number] for part in parts]), whole[number])
        assert torch.equal(behind[number][3:], whole[number])


def test_views_differ_across_views_epochs_seeds_and_ids():
    images, ids = pictures(1, 3, 32, 32).expand(4, -1, -1, -1), torch.arange(4)
    make = TwoViews(VIEWS["cifar"](), 32, seed=0)
    first, second = make(images, ids, epoch=0)
    others = [second, make(images, ids, epoch=1)[0], TwoViews(make.specs, 32, seed=1)(images, ids, epoch=0)[0]]
    for other in (*others, first.roll(1, dims=0)):
        assert ((first - other).abs().mean(dim=(1, 2, 3)) > 0.05).all()
    assert all(map(torch.equal, make(images, ids, epoch=0), (first, second)))


@pytest.mark.parametrize("height, width, size", [(60, 90, 48), (40, 40, 64)])
def test_cropping_in_a_reader_and_finishing_in_batch_is_the_same_but_for_rounding(height, width, size):
    ids = torch.arange(40, 60)
    images = pictures(len(ids), 3, height, width)
    still = replace(PLAIN, crop_scale=(0.2, 1), crop_ratio=(3 / 4, 4 / 3), flip=0.5, grey_p=0.2)
    pairs = [(still, replace(still, blur_p=0.5, solarize_p=0.2)), VIEWS["v3"]()]
    for specs, limit in zip(pairs, (1.5, None), strict=True):
        views = TwoViews(specs, size, seed=1)
        crops = torch.stack([views.crop(image, int(id), 3) for image, id in zip(images, ids, strict=True)])
        assert crops.dtype == torch.uint8 and crops.shape == (len(ids), 2, 3, size, size)
        for a, b in zip(views.finish(crops, ids, epoch=3), views(images, ids, epoch=3), strict=True):
            if limit:
                assert 255 * (a - b).abs().max() <= limit
            else:  # the jitter enlarges what was rounded, in few pixels
                assert (a - b).abs().mean() < 0.6 / 255 / min(specs[0].std)
                assert abs(a.mean() - b.mean()) < 0.002 and abs(a.std() - b.std()) < 0.002


def test_colour_steps_aside_for_other_than_three_channels():
    ids = torch.arange(16)
    specs = replace(PLAIN, jitter_p=1.0, grey_p=1.0), replace(PLAIN, jitter=(0, 0, 0.4, 0.4), jitter_p=1.0, grey_p=1.0)
    four = pictures(16, 4, 16, 16)
    for view in TwoViews(specs, 16)(four, ids, epoch=0):
        assert torch.equal(view, four.float() / 255)
    one = pictures(16, 1, 16, 16)
    bright, same = TwoViews(specs, 16)(one, ids, epoch=0)
    torch.testing.assert_close(same, one.float() / 255)
    p = view_parameters(random_numbers(ids, seed=0, epoch=0, view=0), specs[0], 16, 16)
    want = torch.stack([by_torchvision(image, p, i, ("jitter",), 16) for i, image in enumerate(one.float() / 255)])
    torch.testing.assert_close(bright, want, atol=1e-5, rtol=0)
    for images, name in itertools.product((one, four), VIEWS):
        for view in TwoViews(VIEWS[name](), 24)(images, ids, epoch=0):
            assert view.shape == (*images.shape[:2], 24, 24) and view.isfinite().all()


def test_a_recipe_can_be_a_function_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_views_of_1911.py").write_text(
        "from moco.views.two_views import ViewSpec as V\npair, one = lambda: (V(flip=0.25), V(blur_p=1)), lambda: V()"
    )
    monkeypatch.syspath_prepend(tmp_path)
    pair = ViewSpec(flip=0.25), ViewSpec(blur_p=1)
    assert view_specs(ViewsConfig(recipe="my_views_of_1911:pair")) == pair
    with pytest.raises(ValueError, match="returns ViewSpec.*expected a pair"):
        view_specs(ViewsConfig(recipe="my_views_of_1911:one"))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("cifer", r"'cifer'.*v1, v2, v3, cifar, digits.*did you mean cifar\?$"),
        ("moco.views:pears", "cannot be imported .*no attribute 'pears'"),
        ("no_such_module:pair", "cannot be imported .*no_such_module"),
    ],
)
def test_an_unknown_recipe_says_what_there_is(wrong, message):
    with pytest.raises(ValueError, match=message):
        view_specs(ViewsConfig(recipe=wrong))


def test_crop_min_replaces_the_recipes_smallest_crop():
    first, second = view_specs(ViewsConfig(recipe="v3", crop_min=0.08))
    assert (first, second) == tuple(replace(spec, crop_scale=(0.08, 1.0)) for spec in VIEWS["v3"]())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", VIEWS)
def test_views_on_cuda_are_those_on_cpu(name):
    images, ids = pictures(64, 3, 40, 48), torch.arange(64)
    make = TwoViews(VIEWS[name](), 32, seed=4)
    for here, there in zip(make(images, ids, epoch=1), make(images.cuda(), ids, epoch=1), strict=True):
        assert there.device.type == "cuda"
        # Convolutions may round to TF32, 2**-11.
        torch.testing.assert_close(there.cpu(), here, atol=1 / 255 / min(make.specs[0].std), rtol=0)
