"""What every exporter is given and what it gives back."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from moco.encoder import ImageEncoder
from moco.run import Run


class Subject(NamedTuple):
    """What is exported.

    Attributes:
        encoder: a copy of its own, on the CPU, in fp32 and eval mode.
        run: that it comes from, if any.
    """

    encoder: ImageEncoder
    run: Run | None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The backbone's, by name."""
        return {name: tensor.detach().contiguous() for name, tensor in self.encoder.backbone.state_dict().items()}

    @property
    def mean(self) -> list[float]:
        """One per channel of the images, as `ImageEncoder.preprocess` takes them."""
        return _per_channel(self.encoder.mean, self.encoder.channels)

    @property
    def std(self) -> list[float]:
        """Likewise."""
        return _per_channel(self.encoder.std, self.encoder.channels)


class Written(NamedTuple):
    """What an exporter says of the files it has written.

    Attributes:
        code: Python that makes `features` of `images` `[n, c, h, w]` with the files in `folder`. The model card shows
            it, and the export is done when it has been run and its features are the encoder's.
        about: Markdown that stands above it in the card.
        library: that loads the files, as Hugging Face names it.
        packages: distributions, besides torch, whose versions the card gives.
        counts: images in each of the batches that features are compared on.
    """

    code: str
    about: str
    library: str
    packages: tuple[str, ...]
    counts: tuple[int, ...] = (2,)


Exporter = Callable[[Subject, Path], Written]
"""Writes files into an empty folder.

Raises:
    ValueError: the format cannot hold this encoder; says which one can.
    ImportError: an extra is not installed.
    RuntimeError: what was written does not read back as it should.
"""


def _per_channel(values: tuple[float, ...], channels: int) -> list[float]:
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels
