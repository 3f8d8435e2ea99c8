"""Two random views of a whole batch at once, on the device.

What is done to an image depends on the seed, the epoch and its id alone (`moco.views.parameters`). For tiny views, and
on an accelerator, the last bit may also depend on the size of the batch, by which libraries choose their kernels.

Operations follow torchvision's functional forms, on floats in [0, 1]. The recipes are those of MoCo v1, v2, v3 and of
the official CIFAR notebook, in their order of operations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from moco.views.colours import gaussian_blur, jitter_colour_, to_grey
from moco.views.crops import ImageBatch, crop_resize, crop_resize_flip
from moco.views.parameters import BoxFinder, Parameters, box_finder, random_numbers, view_parameters
from moco.views.pixels import normalise
from moco.views.specs import ViewSpec

BLOCK = 800_000
"""Values that a CPU finishes at a time, those of five images of 224 pixels: 3 MB."""


@dataclass(frozen=True)
class OneView:
    """Make one normalised view of each uint8 image.

    Args:
        spec: how the view is made.
        size: side of a view in pixels.
        seed: determines every random number, with the epoch, the image's id and `number`.
        number: which of an image's views this is.
    """

    spec: ViewSpec
    size: int
    seed: int = 0
    number: int = 0

    def __call__(
        self, images: UInt8[Tensor, "n c h w"], ids: Int64[Tensor, " n"], *, epoch: int
    ) -> Float[Tensor, "n c s s"]:
        """Return a view of every image; the arguments are those of `TwoViews`."""
        return self.of_floats(images.float() / 255, ids, epoch)

    def crop(self, image: UInt8[Tensor, "c h w"], image_id: int, epoch: int) -> UInt8[Tensor, "1 c s s"]:
        """Return only the crop of one image, for a reading process; `finish` does the rest for a batch."""
        (box,) = self.boxes(torch.tensor([image_id]), epoch=epoch)(0, *image.shape[1:])
        return crop_resize(image, box, size=self.size)[None]

    def boxes(self, ids: Int64[Tensor, " n"], *, epoch: int) -> BoxFinder:
        """Return where `crop` crops, for a reader that has not decoded the images yet."""
        return box_finder(random_numbers(ids, seed=self.seed, epoch=epoch, view=self.number), self.spec)

    def finish(
        self, crops: UInt8[Tensor, "n 1 c s s"], ids: Int64[Tensor, " n"], *, epoch: int
    ) -> Float[Tensor, "n c s s"]:
        """Apply everything but the crop to the results of `crop`."""
        p = self._parameters(ids, epoch, *crops.shape[3:])
        if crops.device.type != "cpu":
            return self._finish_crops(_only(p.flip, _planes(crops[:, 0]), lambda part, _: part.flip(3)), p)
        # A few images at a time, so that they stay in the processor's cache, and those together that get the same
        # operations, so that no images need to be copied out and back. This halves the time.
        blurred = (p.sigma > 0).long()
        order = p.order @ torch.tensor([64, 16, 4, 1])
        kind = torch.where(p.jitter, 256 * (3 - blurred) + order, blurred)
        alike = kind.argsort(stable=True)
        # Readers give images whose channels lie together; in this order of axes index_select copies them whole.
        pixels, views = crops[:, 0].permute(0, 2, 3, 1), torch.empty(crops[:, 0].shape)
        for which in alike.split(max(1, BLOCK // crops[0, 0].numel())) if len(crops) else ():
            some = Parameters(*(each[which] for each in p))
            # Flipped before the conversion to floats, which have four times as many bytes.
            picked = _only(some.flip, pixels.index_select(0, which), lambda part, _: part.flip(2))
            views.index_copy_(0, which, self._finish_crops(_planes(picked.permute(0, 3, 1, 2)), some))
        return views

    def of_floats(self, images: ImageBatch, ids: Int64[Tensor, " n"], epoch: int) -> Float[Tensor, "n c s s"]:
        """Return a view of every image; images are floats in [0, 1]."""
        p = self._parameters(ids, epoch, *images.shape[2:])
        box = torch.stack([p.top, p.left, p.height, p.width], dim=1).float().to(images.device, non_blocking=True)
        flip = p.flip.to(images.device, non_blocking=True)
        return self._finish_crops(crop_resize_flip(images, box, flip, self.size), p)

    def _parameters(self, ids: Int64[Tensor, " n"], epoch: int, height: int, width: int) -> Parameters:
        return view_parameters(
            random_numbers(ids, seed=self.seed, epoch=epoch, view=self.number), self.spec, height, width
        )

    def _finish_crops(self, images: ImageBatch, p: Parameters) -> Float[Tensor, "n c s s"]:
        """Turn flipped crops into views, in place."""
        spec = self.spec

        def on_device(x: Tensor) -> Tensor:
            return (x.float() if x.is_floating_point() else x).to(images.device, non_blocking=True)

        if spec.grey_first:
            images = _only(p.grey, images, _to_grey_)
        if images.shape[1] in (1, 3) and spec.jitter_p > 0:
            images = _only(
                p.jitter, images, lambda part, which: jitter_colour_(part, on_device(p.strength[which]), p.order[which])
            )
        if not spec.grey_first:
            images = _only(p.grey, images, _to_grey_)
        radius = math.ceil(3 * spec.blur_sigma[1])
        images = _only(p.sigma > 0, images, lambda part, which: gaussian_blur(part, on_device(p.sigma[which]), radius))
        images = _only(p.solarize, images, lambda part, _: torch.where(part >= 128 / 255, 1 - part, part))
        return normalise(images, spec.mean, spec.std, out=images)


@dataclass(frozen=True)
class TwoViews:
    """Make two normalised views of each uint8 image.

    Args:
        specs: how the first and the second view are made.
        size: side of a view in pixels.
        seed: determines every random number, with the epoch and the image's id.
    """

    specs: tuple[ViewSpec, ViewSpec]
    size: int
    seed: int = 0

    def __call__(
        self, images: UInt8[Tensor, "n c h w"], ids: Int64[Tensor, " n"], *, epoch: int
    ) -> tuple[Float[Tensor, "n c s s"], Float[Tensor, "n c s s"]]:
        """Return two views of every image.

        Args:
            images: images on the device that shall make the views.
            ids: index of each image in the dataset, on the CPU.
            epoch: each epoch gives different views.
        """
        floats, (first, second) = images.float() / 255, self._views
        return first.of_floats(floats, ids, epoch), second.of_floats(floats, ids, epoch)

    def crop(self, image: UInt8[Tensor, "c h w"], image_id: int, epoch: int) -> UInt8[Tensor, "2 c s s"]:
        """Return only the two crops of one image, for a reading process; `finish` does the rest for a batch."""
        return torch.cat([view.crop(image, image_id, epoch) for view in self._views])

    def boxes(self, ids: Int64[Tensor, " n"], *, epoch: int) -> BoxFinder:
        """Return where `crop` crops, for a reader that has not decoded the images yet."""
        first, second = (view.boxes(ids, epoch=epoch) for view in self._views)
        return lambda index, height, width: first(index, height, width) + second(index, height, width)

    def finish(
        self, crops: UInt8[Tensor, "n 2 c s s"], ids: Int64[Tensor, " n"], *, epoch: int
    ) -> tuple[Float[Tensor, "n c s s"], Float[Tensor, "n c s s"]]:
        """Apply everything but the crop to the results of `crop`."""
        first, second = self._views
        return first.finish(crops[:, :1], ids, epoch=epoch), second.finish(crops[:, 1:], ids, epoch=epoch)

    @property
    def _views(self) -> tuple[OneView, OneView]:
        first, second = self.specs
        return OneView(first, self.size, self.seed, 0), OneView(second, self.size, self.seed, 1)


def _only(chosen: Tensor, images: Tensor, operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply an operation to the chosen images, in place; `chosen` is on the CPU, so that nothing waits for a device."""
    which = chosen.nonzero()[:, 0]
    if len(which) == 0:
        return images
    if len(which) == len(images):
        return operation(images, which)
    rows = which.to(images.device, non_blocking=True)
    return images.index_copy_(0, rows, operation(images.index_select(0, rows), which))


def _planes(images: UInt8[Tensor, "n c h w"]) -> ImageBatch:
    """Convert to floats in [0, 1], with each channel contiguous in memory, in which colours are changed fastest."""
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _to_grey_(part: ImageBatch, which: Tensor) -> ImageBatch:
    return part.copy_(to_grey(part)) if part.shape[1] == 3 else part
