import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageFilter

import moco
from moco.views import crops, pixels
from moco.views.colours import gaussian_blur, jitter_colour_, shift_hue_, to_grey
from moco.views.crops import crop_resize_flip
from moco.views.pixels import centred, normalise, thumbnail
from moco.views.specs import ViewSpec

LEVEL = 1 / 255
ORDERS = torch.tensor(list(itertools.permutations(range(4))))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def smooth(*shape: int, seed: int = 0) -> torch.Tensor:
    """Images without detail, as most of a photograph is: noise at an eighth of the resolution, enlarged."""
    return tv.resize(noise(*shape[:-2], shape[-2] // 8, shape[-1] // 8, seed=seed), list(shape[-2:]))


def pictures(n: int, channels: int, height: int, width: int, *, seed: int = 0) -> torch.Tensor:
    """Half noise and half smooth, with a grey, a black and a white image among them; floats that uint8 could hold."""
    half = n // 2
    images = torch.cat(
        [noise(half, channels, height, width, seed=seed), smooth(n - half, channels, height, width, seed=seed + 1)]
    )
    if n >= 6:
        images[1], images[2] = 0, 255
        images[3] = images[3, :1]
    return images.float() / 255


def strengths(n: int, seed: int = 0) -> torch.Tensor:
    """Factors from 0.2 to 1.8 for brightness, contrast and saturation, and from -0.4 to 0.4 turns of hue."""
    u = 2 * torch.rand(n, 4, generator=torch.Generator().manual_seed(seed)) - 1
    return torch.cat([1 + 0.8 * u[:, :3], 0.4 * u[:, 3:]], dim=1)


ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


@pytest.mark.parametrize("height, width, size", [(32, 32, 32), (24, 40, 64), (96, 64, 16), (8, 8, 16), (56, 24, 31)])
def test_crops_equal_torchvisions_each_image_with_its_own_box(height, width, size):
    n = 16
    images = pictures(n, 3, height, width)
    g = torch.Generator().manual_seed(1)
    heights = torch.randint(1, height + 1, (n,), generator=g)
    widths = torch.randint(1, width + 1, (n,), generator=g)
    heights[:2], widths[:2] = height, width  # the whole image, and the smallest crop
    heights[2], widths[2] = 1, 1
    tops = (torch.rand(n, generator=g) * (height - heights + 1)).long()
    lefts = (torch.rand(n, generator=g) * (width - widths + 1)).long()
    flip = torch.arange(n) % 2 == 1
    box = torch.stack([tops, lefts, heights, widths], dim=1)
    got = crop_resize_flip(images, box.float(), flip, size)
    for i, (top, left, h, w) in enumerate(box.tolist()):
        want = tv.resized_crop(images[i], top, left, h, w, [size, size], antialias=True)
        want = tv.horizontal_flip(want) if flip[i] else want
        torch.testing.assert_close(got[i], want, atol=LEVEL / 20, rtol=0)


def test_a_crop_takes_nothing_from_outside_its_box():
    images = torch.zeros(1, 1, 20, 20)
    images[:, :, 5:15, 5:15] = 1
    box, flip = torch.tensor([[5.0, 5.0, 10.0, 10.0]]), torch.tensor([False])
    for size in (4, 10, 32):
        torch.testing.assert_close(crop_resize_flip(images, box, flip, size), torch.ones(1, 1, size, size))


def test_grey_equals_torchvisions():
    images = pictures(8, 3, 16, 24)
    torch.testing.assert_close(to_grey(images), tv.rgb_to_grayscale(images), atol=1e-6, rtol=0)


@pytest.mark.parametrize("operation", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_part_of_the_jitter_alone_equals_torchvisions(operation):
    images, strength = pictures(12, 3, 16, 24), strengths(12)
    others = [i for i in range(4) if i != operation]
    strength[:, others] = torch.tensor([1.0, 1.0, 1.0, 0.0])[others]
    order = torch.arange(4).repeat(12, 1)
    got = jitter_colour_(images.clone(), strength, order)
    for image, result, factor in zip(images, got, strength[:, operation].tolist(), strict=True):
        torch.testing.assert_close(result, ADJUST[operation](image, factor), atol=LEVEL / 20, rtol=0)
    assert (got - images).abs().mean() > 5 * LEVEL


@pytest.mark.parametrize("number_of_a_large_one", [0, 10**9], ids=["large", "small"])
def test_jitter_in_every_order_equals_torchvisions_in_that_order(number_of_a_large_one, monkeypatch):
    monkeypatch.setattr("moco.views.colours.LARGE", number_of_a_large_one)
    images, strength = pictures(24, 3, 16, 24), strengths(24)
    got = jitter_colour_(images.clone(), strength, ORDERS)
    for image, result, factors, order in zip(images, got, strength.tolist(), ORDERS.tolist(), strict=True):
        for operation in order:
            image = ADJUST[operation](image, factors[operation])
        torch.testing.assert_close(result, image, atol=LEVEL / 4, rtol=0)


@pytest.mark.parametrize("number_of_a_large_one", [0, 10**9], ids=["large", "small"])
def test_jitter_of_one_channel_is_brightness_and_contrast_only(number_of_a_large_one, monkeypatch):
    monkeypatch.setattr("moco.views.colours.LARGE", number_of_a_large_one)
    images, strength = pictures(24, 1, 16, 24), strengths(24)
    got = jitter_colour_(images.clone(), strength, ORDERS)
    for image, result, factors, order in zip(images, got, strength.tolist(), ORDERS.tolist(), strict=True):
        for operation in order:
            image = ADJUST[operation](image, factors[operation])
        torch.testing.assert_close(result, image, atol=LEVEL / 20, rtol=0)


def test_jitter_of_no_images_is_none():
    none = torch.zeros(0, 3, 224, 224)
    assert jitter_colour_(none, torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.int64)).shape == none.shape


def test_hue_leaves_grey_alone_and_a_whole_turn_changes_nothing():
    grey = pictures(2, 1, 8, 8).expand(-1, 3, -1, -1)
    images = pictures(4, 3, 8, 8)
    for want, turns, atol in ((grey, [0.3, -0.2], 1e-6), (images, [1.0, -1.0, 0.0, 2.0], 1e-5)):
        shifted = want.clone()
        shift_hue_(shifted, torch.tensor(turns))
        torch.testing.assert_close(shifted, want, atol=atol, rtol=0)


def test_solarize_equals_torchvisions_on_whole_levels():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    plain = ViewSpec(
        crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, jitter_p=0, grey_p=0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    first, second = moco.TwoViews((replace(plain, solarize_p=1.0), plain), 16)(levels, torch.tensor([0]), epoch=0)
    assert torch.equal((255 * first).round().to(torch.uint8), tv.solarize(levels, 128))
    assert torch.equal((255 * second).round().to(torch.uint8), levels)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_blur_equals_torchvisions_with_13_taps_each_image_with_its_own_sigma(channels):
    images, sigma = pictures(10, channels, 24, 32), torch.linspace(0.1, 2, 10)
    got = gaussian_blur(images, sigma)
    for image, result, one in zip(images, got, sigma.tolist(), strict=True):
        torch.testing.assert_close(result, tv.gaussian_blur(image, [13, 13], [one, one]), atol=LEVEL / 20, rtol=0)


def test_blur_of_an_image_smaller_than_its_kernel_keeps_the_mean_level():
    images = torch.full((2, 3, 4, 6), 0.7)
    torch.testing.assert_close(gaussian_blur(images, torch.tensor([0.5, 2.0])), images)


def test_blur_is_near_pillows():
    """Pillow approximates the Gaussian by three box filters, in whole grey levels, and repeats the border's pixels.

    Measured, in grey levels: on smooth images the mean difference is at most 0.4 and the largest 2.7. White noise is
    the worst case; there the mean is at most 3.7 from sigma 0.5 up, and below, where the boxes hardly blur, 10.1
    (sigma 0.3). On two photographs of 224 pixels the mean was at most 0.7, the largest 22, at the border.
    """
    for make, sigmas, mean, largest in (
        (smooth, (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0), 0.5, 4),
        (noise, (0.5, 0.8, 1.0, 1.5, 2.0), 4.0, 50),
        (noise, (0.1, 0.3), 11.0, 36),
    ):
        image = make(3, 64, 64)
        for sigma in sigmas:
            picture = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(sigma))
            theirs = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            ours = 255 * gaussian_blur(image[None].float() / 255, torch.tensor([sigma]))[0]
            difference = (ours - theirs).abs()
            assert difference.mean() < mean and difference.max() < largest, (make.__name__, sigma, difference.mean())


@pytest.mark.parametrize(
    "height, width, size", [(48, 64, 32), (67, 48, 32), (16, 20, 32), (500, 375, 224), (40, 49, 32)]
)
def test_centred_equals_torchvisions_resize_and_centre_crop_with_pillow(height, width, size):
    images = torch.cat([noise(1, 3, height, width), tv.resize(noise(1, 3, 9, 9), [height, width])])
    got = centred(images, size)
    for image, result in zip(images, got, strict=True):
        picture = tv.center_crop(tv.resize(tv.to_pil_image(image), [size]), [size, size])
        want = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        assert (result.int() - want.int()).abs().max() <= 1


def resized_as_a_whole(images, size):
    height, width = images.shape[2:]
    new = [size * side // min(height, width) for side in (height, width)]
    return tv.center_crop(F.interpolate(images, size=new, mode="bilinear", antialias=True), [size, size])


@pytest.mark.parametrize("height, width", [(48, 64), (67, 48), (500, 375), (5, 80), (80, 5), (7, 111), (33, 33)])
def test_centred_resizes_all_but_strips_as_a_whole_to_the_bit(height, width):
    images = noise(2, 3, height, width)
    for size in (24, 33):
        assert torch.equal(centred(images, size), resized_as_a_whole(images, size))


@pytest.mark.parametrize(
    "short, long", [(1, 17), (1, 600), (2, 301), (3, 130), (5, 81), (7, 1200), (11, 202), (40, 2547), (100, 1777)]
)
@pytest.mark.parametrize("size", [1, 15, 16, 24, 33, 64])
@pytest.mark.parametrize("layout", ["channels together", "channels apart"])
def test_of_a_strip_the_centre_is_that_of_the_whole_to_a_level(short, long, size, layout):
    """Black and white noise, in which a pixel's shift would be 255 levels and a twentieth of one a dozen."""
    for height, width in ((short, long), (long, short)):
        images = 255 * noise(2, height, width, 3).div(128, rounding_mode="floor").movedim(-1, 1)
        images = images.contiguous() if layout == "channels apart" else images
        got, want = centred(images, size), resized_as_a_whole(images, size)
        assert got.shape == want.shape == (2, 3, size, size)
        difference = (got.int() - want.int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 0.3


def test_of_a_strip_little_more_than_its_centre_is_resized(monkeypatch):
    """Whole, one of 30,000 x 1 pixels would become one of 6,720,000 x 224."""
    sizes, real = [], crops.resampling

    def resampling(start, length, flip, size, full):
        sizes.append(size * full)
        return real(start, length, flip, size, full)

    monkeypatch.setattr(pixels, "resampling", resampling)
    monkeypatch.setattr(pixels.F, "interpolate", lambda *_, **__: pytest.fail("the whole is resized"))
    for height, width in ((1, 30_000), (30_000, 1), (30, 30_000), (80_000, 1000)):
        sizes.clear()
        assert centred(noise(1, 3, height, width), 224).shape == (1, 3, 224, 224)
        assert len(sizes) == 2 and sum(sizes) < 8 * 224 * max(224, min(height, width))


def test_centred_returns_images_of_the_right_size_as_they_are():
    images = noise(2, 1, 12, 12)
    assert torch.equal(centred(images, 12), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_equals_torchvisions(channels):
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    images = noise(4, channels, 8, 8)
    want = tv.normalize(images.float() / 255, list(mean), list(std))
    torch.testing.assert_close(normalise(images, mean, std), want)
    torch.testing.assert_close(normalise(images.float() / 255, mean, std), want)


def test_normalise_takes_the_mean_statistics_for_other_channels():
    images = noise(2, 4, 8, 8)
    want = (images.float() / 255 - 0.4) / 0.25
    torch.testing.assert_close(normalise(images, (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)), want)
    assert math.isclose(normalise(images, (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)).max().item(), 2.4, rel_tol=0.02)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (2, "L"), (3, "RGB"), (5, "RGB")])
def test_a_thumbnail_fits_a_square_in_its_own_proportions(channels, mode):
    image = smooth(channels, 96, 200)
    small = thumbnail(image, 50)
    assert small.mode == mode and small.size == (50, 24)
    want = tv.resize(image[: 3 if mode == "RGB" else 1], [24, 50], antialias=True).movedim(0, 2).squeeze(2).numpy()
    assert np.abs(np.asarray(small).astype(int) - want).mean() < 8  # Lanczos, not bilinear
    np.testing.assert_array_equal(thumbnail(image, 200), image[: 3 if mode == "RGB" else 1].movedim(0, 2).squeeze(2))
    assert thumbnail(noise(3, 1, 400), 20).size == (20, 1)
