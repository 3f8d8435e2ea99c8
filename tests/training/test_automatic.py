from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco.config import DataConfig, PretrainConfig, fields, merge
from moco.data import ArrayImages, Splits
from moco.training import automatic
from moco.training.automatic import auto_config
from moco.training.briefing import cautions


def given(number: int, side: int) -> Splits:
    """So many images of a size, which take no memory."""
    pixels = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(number, 3, side, side + 5)
    return Splits(ArrayImages(pixels, None, None, ("",) * number), None)


def chosen(number: int, side: int) -> PretrainConfig:
    return auto_config(DataConfig(), given(number, side))[0]


@pytest.fixture(params=["cpu", "cuda"], autouse=True)
def accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(automatic, "choose_accelerator", lambda name: request.param)
    return request.param


@pytest.mark.parametrize("number", [16, 17, 50, 99, 500, 1442, 50_000])
@pytest.mark.parametrize("side", [5, 8, 28, 64, 65, 100, 500])
def test_what_is_chosen_fits_together_and_needs_no_caution(number: int, side: int) -> None:
    config = chosen(number, side)
    assert config.batch_size * 2 <= config.model.queue_size
    assert config.batch_size <= number / 2
    masks = config.model.queue_size > 0.1 * number
    assert cautions(config, number, mask_own=masks) == []
    assert max(8, side // 2) <= config.views.size <= max(8, side) or config.views.size in (32, 224)
    assert config.views.size >= 32 or config.model.stem == "small"


def test_small_images_keep_their_resolution_and_large_ones_what_the_machine_bears(accelerator: str) -> None:
    assert chosen(1000, 32).views.size == 32
    assert chosen(1000, 32).model.stem == "small"
    cuda = accelerator == "cuda"
    assert chosen(1000, 600).views.size == (224 if cuda else 32)
    assert chosen(1000, 600).model.stem == ("imagenet" if cuda else "small")
    assert chosen(1000, 80).views.size == (64 if cuda else 32)


def test_every_choice_is_a_flag_and_has_its_reason() -> None:
    config, reasons = auto_config(DataConfig(channels=1, max_bad=0.5), given(1000, 32))
    assert (config.data.channels, config.data.max_bad) == (1, 0.5)
    for line in reasons:
        flag, value = line.partition(":")[0].split()
        name = flag.removeprefix("--")
        assert name in fields()
        top, _, inner = name.rpartition(".")
        assert merge(config, {top: {inner: value}} if top else {inner: value}) == config
        assert len(line) > len(flag) + 20


def test_fewer_images_are_seen_more_often() -> None:
    epochs = [chosen(number, 32).epochs for number in (100, 1000, 10_000, 50_000)]
    assert epochs == sorted(epochs, reverse=True) and epochs[0] > epochs[-1] >= 5


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="^there are 15 images; expected at least 16"):
        chosen(15, 32)


def test_files_are_measured_by_a_sample_of_those_that_can_be_read(tmp_path: Path, accelerator: str) -> None:
    for number in range(20):
        path = tmp_path / f"{number:02}.png"
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (70 + number, 200), np.uint8)).save(path)
        if number % 2 == 0:
            path.write_bytes(path.read_bytes()[:600])
    data = DataConfig(source=str(tmp_path), memory=1e-6, max_bad=0.5)
    config, reasons = auto_config(data)
    size = 64 if accelerator == "cuda" else 32
    assert reasons[0].startswith(f"--views.size {size}: the images have about 80 pixels on their short side")
    assert config.data == data
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match="none of the images sampled can be read, such as .*00.png"):
        auto_config(data)
