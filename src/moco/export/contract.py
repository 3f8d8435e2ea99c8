"""What every exporter is given and what it gives back."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from moco.method.encoder import ImageEncoder
from moco.storage.run import Run


class Subject(NamedTuple):
    """What is exported.

    Attributes:
        encoder: a copy of the encoder, on the CPU, in fp32 and eval mode.
        run: the run that it comes from, if any.
    """

    encoder: ImageEncoder
    run: Run | None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights of the backbone, by name."""
        return {name: tensor.detach().contiguous() for name, tensor in self.encoder.backbone.state_dict().items()}

    @property
    def mean(self) -> list[float]:
        """Mean of each channel, as `ImageEncoder.preprocess` uses it."""
        return _per_channel(self.encoder.mean, self.encoder.channels)

    @property
    def std(self) -> list[float]:
        """Standard deviation of each channel, as `ImageEncoder.preprocess` uses it."""
        return _per_channel(self.encoder.std, self.encoder.channels)


class Written(NamedTuple):
    """What an exporter says about the files it has written.

    Attributes:
        code: Python code that computes `features` from `images` `[n, c, h, w]` with the files in `folder`. The model
            card shows it; the export succeeds once this code has been run and its features match the encoder's.
        about: Markdown text above the code in the card.
        library: library that loads the files, as Hugging Face names it.
        packages: distributions, besides torch, whose versions the card lists.
        counts: images in each of the batches on which features are compared.
    """

    code: str
    about: str
    library: str
    packages: tuple[str, ...]
    counts: tuple[int, ...] = (2,)


Exporter = Callable[[Subject, Path], Written]
"""Writes files into an empty folder.

Raises:
    ValueError: the format cannot hold this encoder; the message says which one can.
    ImportError: an extra is not installed.
    RuntimeError: the files do not read back as expected.
"""


def _per_channel(values: tuple[float, ...], channels: int) -> list[float]:
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels
