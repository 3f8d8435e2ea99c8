"""Images of other than one or three channels, from arrays to an encoder and what it is used for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import moco
from moco.config import parse_config
from moco.data import FileImages, as_images
from small import TINY


def settings(channels: int, **others: Any) -> Any:
    views = {"views": {"recipe": "v2", "size": 8}}  # with every colour operation
    return parse_config(TINY | views | {"data": {"channels": channels, "size": 12}, "batch_size": 48} | others)


def bands(channels: int, number: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.randint(0, 256, (number, channels, 12, 12), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("channels", [2, 5])
def test_any_number_of_channels_trains_and_every_picture_is_drawn(
    channels: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = bands(channels)
    run = moco.pretrain(settings(channels), data=images, out=tmp_path / "run")
    assert "could not be drawn" not in caplog.text
    for name in ("views.svg", "neighbours.svg", "map.svg", "similarities.svg", "report.html"):
        assert (tmp_path / "run" / name).is_file(), name
    assert run.results
    encoder = moco.load_encoder(tmp_path / "run")
    assert encoder.channels == channels
    vectors = moco.embed(encoder, images).vectors
    assert vectors.shape == (96, encoder.num_features) and np.isfinite(vectors).all()
    assert np.allclose(vectors, moco.embed(encoder, images.movedim(1, 3).numpy()).vectors, atol=1e-6)
    assert moco.search(moco.embed(encoder, images), images[7].movedim(0, 2).numpy(), k=1).paths == (("7",),)


def test_channels_that_are_not_those_asked_for_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^images have 4 channels; expected 3: see --data\.channels$"):
        as_images(bands(4), channels=3)
    with pytest.raises(ValueError, match=r"^images have 3 channels; expected 4: see --data\.channels$"):
        moco.pretrain(settings(4), data=bands(3), out=tmp_path / "run")


def test_files_and_named_sets_have_one_or_three_channels_and_say_what_to_give_instead(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8)).save(tmp_path / "a.png")
    for source in (str(tmp_path), "digits"):
        with pytest.raises(ValueError, match=r"channels is 4; .* is read with 1 or 3: .*array file \(\.npy") as caught:
            moco.pretrain(settings(4, data={"source": source, "channels": 4}), out=tmp_path / "run")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="a.png.*pictures have 1 or 3 channels; expected 4: give arrays"):
        FileImages((str(tmp_path / "a.png"),), None, None, (), 4).decode(0)
