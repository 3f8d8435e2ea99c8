"""Backbones without classifier, their stems for small images, projectors and predictors.

Initialisation follows the reference code: torchvision's for the backbone (the last batch norm of a block starts at 1,
but at 0 in v3), PyTorch's default for a replaced first convolution and for all heads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from moco.method.backbones import num_features, num_heads
from moco.method.batchnorm import grouped_order
from moco.views.pixels import centred, normalise, pixels_of

Images = Float[Tensor, "n c h w"]


class Encoder(nn.Module):
    """A backbone with a projector: images -> un-normalised projections; `features` stops at the backbone.

    Args:
        backbone: images `[n, c, h, w]` -> features `[n, f]`.
        projector: features -> projections.
        num_splits: number of groups if the batch norms are `SplitBatchNorm2d(grouped=True)`, else 0. The batch is then
            ordered by group once, here, instead of in every layer.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, *, num_splits: int = 0):
        super().__init__()
        self.backbone, self.projector, self.num_splits = backbone, projector, num_splits

    def forward(self, images: Images) -> Float[Tensor, "n d"]:
        if not (self.training and self.num_splits):
            return self.projector(self.backbone(images))
        order = grouped_order(len(images), self.num_splits, images.device)
        projections = self.projector(self.backbone(images[order]))
        return torch.empty_like(projections).index_copy(0, order, projections)

    def features(self, images: Images) -> Float[Tensor, "n f"]:
        return self.backbone(images)


class ImageEncoder(nn.Module):
    """An encoder for users: normalised images of any size -> features; `preprocess` prepares such images.

    Args:
        backbone: images -> features.
        name: name of the backbone, as `build_backbone` takes it.
        stem: stem of the backbone, as `build_backbone` takes it.
        channels: channels of the images.
        mean: mean of each channel, for images in [0, 1].
        std: standard deviation of each channel, for images in [0, 1].
        input_size: side in pixels of images from `preprocess`.

    Raises:
        ValueError: mean and std have neither one value per channel nor three, to be averaged.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        name: str,
        stem: str,
        channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        input_size: int,
    ):
        super().__init__()
        if len(mean) != len(std) or len(mean) not in (channels, 3):
            raise ValueError(
                f"mean has {len(mean)} values and std {len(std)}; expected {channels}, one per channel of the images"
            )
        self.backbone, self.name, self.stem, self.channels = backbone, name, stem, channels
        self.mean, self.std, self.input_size = mean, std, input_size
        self.num_features = num_features(backbone)

    def forward(self, images: Images) -> Float[Tensor, "n f"]:
        return self.backbone(images)

    def preprocess(self, images: UInt8[Tensor, "n c h w"] | Sequence[Image.Image]) -> Float[Tensor, "n c s s"]:
        """Prepare uint8 tensors or PIL images: resize the short side, crop the centre, normalise.

        Raises:
            ValueError: the images do not have the encoder's number of channels.
        """
        if isinstance(images, Tensor):
            if images.shape[1] != self.channels:
                raise ValueError(f"images have {images.shape[1]} channels; expected the encoder's {self.channels}")
            return normalise(centred(images, self.input_size), self.mean, self.std)
        refuse_channels(self.channels)
        return torch.cat([self.preprocess(torch.from_numpy(pixels_of(image, self.channels))[None]) for image in images])

    def describe(self) -> dict[str, Any]:
        """Everything needed to build the same network again, as plain values; for a transformer, also `num_heads`."""
        heads = num_heads(self.backbone)
        return {
            "backbone": self.name,
            "stem": self.stem,
            "channels": self.channels,
            "mean": list(self.mean),
            "std": list(self.std),
            "input_size": self.input_size,
            "num_features": self.num_features,
            **({} if heads is None else {"num_heads": heads}),
        }


def refuse_channels(channels: int) -> None:
    """Raise ValueError if an encoder takes a number of channels that no picture has."""
    if channels not in (1, 3):
        raise ValueError(
            f"the encoder takes {channels}-channel images; pictures are read with 1 or 3: give a uint8 tensor "
            f"[n, {channels}, h, w]"
        )
