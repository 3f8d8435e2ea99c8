"""Views of photos against torchvision's standard pipeline for MoCo v2, and the speed of neither."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as tv

from moco.data import FileImages, Loader
from moco.views.specs import IMAGENET, VIEWS
from moco.views.two_views import TwoViews

BINS = 32
MEAN, STD = (torch.tensor(each).view(3, 1, 1) for each in IMAGENET)


def blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def standard(size: int) -> tv.Compose:
    """As github.com/facebookresearch/moco has it, `--aug-plus`."""
    return tv.Compose(
        [
            tv.RandomResizedCrop(size, scale=(0.2, 1.0)),
            tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            tv.RandomGrayscale(p=0.2),
            tv.RandomApply([tv.Lambda(blur)], p=0.5),
            tv.RandomHorizontalFlip(),
            tv.ToTensor(),
            tv.Normalize(*IMAGENET),
        ]
    )


def measured(views: torch.Tensor) -> np.ndarray:
    """Of each view: means and variances of the channels, sharpness, share of the pixels in each bin of each channel."""
    sharp = (views[..., 1:] - views[..., :-1]).abs().mean(dim=(2, 3))
    # Whole levels, eight to a bin: Pillow knows no others.
    level = ((views * STD + MEAN) * 255).round().long().clamp(0, 255) * BINS // 256
    place = level + BINS * torch.arange(3 * len(views)).view(-1, 3, 1, 1)
    counts = place.flatten().bincount(minlength=3 * BINS * len(views)).view(len(views), -1) / level[0, 0].numel()
    return torch.cat([views.mean(dim=(2, 3)), views.var(dim=(2, 3)), sharp, counts], dim=1).double().numpy()


def by_torchvision(paths: list[str], size: int, seed: int) -> np.ndarray:
    pipeline, found = standard(size), []
    random.seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for path in paths:
            with Image.open(path) as file:
                found.append(measured(pipeline(file.convert("RGB"))[None])[0])
    return np.array(found)


def by_us(paths: list[str], size: int) -> np.ndarray:
    views, images = TwoViews(VIEWS["v2"](), size), FileImages(tuple(paths), None, None)
    loader = Loader(images, batch_size=40, seed=0, device=torch.device("cpu"), workers=0, crop=views)
    found = np.zeros((len(paths), 9 + 3 * BINS))
    for step, (crops, ids) in enumerate(loader.epoch(0)):
        found[ids] = measured(views.finish(crops, ids, epoch=0)[step % 2])  # either view has its turn
    return found


def assert_alike(paths: list[str], size: int, *, sharpness: float) -> None:
    """How far two seeds of torchvision's lie apart says how far from it ours may lie."""
    ours, theirs, again = by_us(paths, size), by_torchvision(paths, size, 0), by_torchvision(paths, size, 1)
    # Pairs of views of one image: what the images differ in drops out. 4 standard errors of such a mean.
    error = (theirs - again).std(axis=0) / len(paths) ** 0.5
    both = (theirs + again) / 2
    off = (ours - both).mean(axis=0)
    assert (np.abs(off[:6]) < 4 * error[:6]).all(), off[:6] / error[:6]
    # A JPEG that is decoded in part is shrunk by no triangle filter: its views are about 5 % sharper.
    allowed = 4 * error[6:9] + sharpness * both[:, 6:9].mean(axis=0)
    assert (np.abs(off[6:9]) < allowed).all(), off[6:9] / both[:, 6:9].mean(axis=0)
    # Distance of histograms: half the sum of the differences, 0 of equal and 1 of disjoint ones.
    apart, noise = (
        np.abs((a - b).mean(axis=0)[9:]).reshape(3, -1).sum(axis=1) / 2 for a, b in ((ours, theirs), (again, theirs))
    )
    assert (apart < 1.5 * noise + 0.005).all(), (apart, noise)
    # And views differ among themselves as much as torchvision's do.
    spread = ours[:, :9].std(axis=0) / theirs[:, :9].std(axis=0)
    assert (np.abs(spread - 1) < 4 / len(paths) ** 0.5).all(), spread


def evenly(folder: Path, count: int) -> list[str]:
    found = sorted(map(str, folder.rglob("*.jpg")))
    return [found[i * len(found) // count] for i in range(count)]


def enlarged(paths: list[str], folder: Path, side: int) -> list[str]:
    for path in paths:
        with Image.open(path) as image:
            name = f"{Path(path).parent.name}-{Path(path).name}"
            image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC).save(folder / name, quality=92)
    return sorted(map(str, folder.iterdir()))


def test_views_of_photos_are_statistically_torchvisions(moco_data):
    assert_alike(evenly(moco_data / "photos" / "train", 400), 64, sharpness=0.06)


@pytest.mark.slow
def test_2000_views_of_photos_are_statistically_torchvisions(moco_data):
    assert_alike(evenly(moco_data / "photos" / "train", 2000), 224, sharpness=0.01)


@pytest.mark.slow
def test_views_of_camera_photos_decoded_in_part_are_statistically_torchvisions(moco_data, tmp_path):
    assert_alike(enlarged(evenly(moco_data / "photos" / "train", 400), tmp_path, 1000), 128, sharpness=0.06)
