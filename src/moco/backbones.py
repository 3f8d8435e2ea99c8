"""Small residual networks for small images on CPUs; all other backbones come from timm or torchvision by name."""

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1


class SmallResNet(nn.Module):
    """A convolution, then one residual block of two 3x3 convolutions per stage, each at half the previous resolution.

    Args:
        channels: channels of the stages; the last is the length of the features.
        patch: whether the first convolution is 4x4 with stride 2, instead of 3x3 with stride 1.
        in_channels: channels of the images.
    """

    def __init__(self, channels: tuple[int, ...], *, patch: bool, in_channels: int = 3):
        super().__init__()
        self.num_features = channels[-1]
        kernel, stride = (4, 2) if patch else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, channels[0], kernel, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        stages: list[nn.Module] = [BasicBlock(channels[0], channels[0])]
        for before, after in zip(channels, channels[1:], strict=False):
            shortcut = nn.Sequential(conv1x1(before, after, stride=2), nn.BatchNorm2d(after))
            stages.append(BasicBlock(before, after, stride=2, downsample=shortcut))
        self.stages = nn.Sequential(*stages)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f"]:
        return self.stages(self.relu(self.bn1(self.conv1(images)))).mean(dim=(2, 3))


def resnet_tiny(in_channels: int) -> SmallResNet:
    """For images of about 8 pixels."""
    return SmallResNet((32, 64, 128), patch=False, in_channels=in_channels)


def resnet_mini(in_channels: int) -> SmallResNet:
    """For images of about 32 pixels; 28 million multiply-adds per image at that size."""
    return SmallResNet((48, 96, 192), patch=True, in_channels=in_channels)


BACKBONES = {"resnet-tiny": resnet_tiny, "resnet-mini": resnet_mini}
