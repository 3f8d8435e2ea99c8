"""The vision transformers of MoCo v3 (arXiv:2104.02057, section 4 and appendix A): timm's modules, v3's initialisation.

They differ from timm's of the same size in ways that tensors do not show: 12 heads even at width 384, computed instead
of learned position embeddings, and a random patch projection that stays frozen.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

PATCH, GRID, HEADS = 16, 14, 12
"""Pixels along a patch, patches along an image of 224 pixels, and attention heads of all models here."""
TEMPERATURE = 10_000.0
"""Temperature of the position embeddings: their wavelengths range from 2 pi to 2 pi times this, in patches."""


def vision_transformer(
    width: int, *, depth: int = 12, channels: int = 3, conv_stem: bool = False, freeze_patches: bool = True
) -> VisionTransformer:
    """Return a v3 transformer without classifier: images -> the normalised class token, of length `num_features`.

    For images of sizes other than 224, position embeddings are resampled, as in timm; sides that are not a multiple of
    16 are padded with zeros, the mean colour after normalisation, on the right and at the bottom.

    Args:
        width: D, length of a token.
        depth: number of blocks.
        channels: channels of the images.
        conv_stem: use four 3x3 convolutions of stride 2, each with batch norm and ReLU, instead of the patch
            projection; the paper then has one block less.
        freeze_patches: keep the patch projection at its random values (section 4.2). A convolutional stem is trained.
    """
    model = VisionTransformer(
        img_size=PATCH * GRID,
        patch_size=PATCH,
        in_chans=channels,
        num_classes=0,
        embed_dim=width,
        depth=depth,
        num_heads=HEADS,
        weight_init="skip",
        dynamic_img_size=True,
        dynamic_img_pad=True,
    )
    patches = model.patch_embed.proj
    assert isinstance(patches, nn.Conv2d) and model.cls_token is not None and model.pos_embed is not None
    for block in model.blocks:
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear):
                # Queries, keys and values are three matrices in one, each drawn by its own size.
                rows = layer.out_features // 3 if name == "attn.qkv" else layer.out_features
                _uniform(layer, rows + layer.in_features)
    nn.init.normal_(model.cls_token, std=1e-6)
    with torch.no_grad():
        model.pos_embed.copy_(torch.cat([torch.zeros(1, width), positions(GRID, GRID, width)])[None])
    model.pos_embed.requires_grad_(False)
    if conv_stem:
        model.patch_embed.proj = _conv_stem(channels, width)
    else:
        _uniform(patches, channels * PATCH**2 + width)
        patches.requires_grad_(not freeze_patches)
    return model


def positions(rows: int, columns: int, width: int) -> Float[Tensor, "n d"]:
    """Position embeddings of patches, row by row: sines and cosines of row, then column, in quarters of `width`.

    Entry i of a quarter is at frequency `TEMPERATURE ** (-i / (width / 4))`.
    """
    frequency = TEMPERATURE ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = (torch.arange(count, dtype=torch.float64).outer(frequency) for count in (rows, columns))
    down, across = row.repeat_interleave(columns, dim=0), column.repeat(rows, 1)
    return torch.cat([down.sin(), down.cos(), across.sin(), across.cos()], dim=1).float()


def _conv_stem(channels: int, width: int) -> nn.Sequential:
    """Convolutions whose width doubles from an eighth (Xiao et al., arXiv:2106.14881, section 4), then a 1x1 one."""
    sizes = [channels, *(width // 8 * 2**layer for layer in range(4))]
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(sizes[-1], width, 1))


def _uniform(layer: nn.Linear | nn.Conv2d, fans: int) -> None:
    """Glorot's uniform initialisation for a layer whose inputs and outputs add up to `fans`; the bias is 0."""
    bound = math.sqrt(6 / fans)
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def vit_small(channels: int) -> VisionTransformer:
    """V3's ViT-S: 21.7 million parameters."""
    return vision_transformer(384, channels=channels)


def vit_base(channels: int) -> VisionTransformer:
    """V3's ViT-B: 85.8 million parameters."""
    return vision_transformer(768, channels=channels)


def vit_conv_small(channels: int) -> VisionTransformer:
    return vision_transformer(384, depth=11, channels=channels, conv_stem=True)


def vit_conv_base(channels: int) -> VisionTransformer:
    return vision_transformer(768, depth=11, channels=channels, conv_stem=True)


VITS: dict[str, Callable[[int], VisionTransformer]] = {
    "vit-small-v3": vit_small,
    "vit-base-v3": vit_base,
    "vit-conv-small-v3": vit_conv_small,
    "vit-conv-base-v3": vit_conv_base,
    # As the official code calls them.
    "vit_small": vit_small,
    "vit_base": vit_base,
    "vit_conv_small": vit_conv_small,
    "vit_conv_base": vit_conv_base,
}
"""V3's transformers by name; each is built from the number of channels."""
