"""Two random views of a whole batch at once, on the device.

What is done to an image follows from the seed, the epoch and its id alone (`moco.draws`). (Of tiny views, and on an
accelerator, a library may round the last bit otherwise when the batch has another size.)

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
from moco.views.crops import crop_resize, crop_resize_flip
from moco.views.parameters import Boxes, Parameters, crop_boxes, draws, parameters
from moco.views.pixels import normalise
from moco.views.specs import ViewSpec

BLOCK = 800_000
"""Numbers of the images that are finished at a time on a CPU: five of 224 pixels a side, 3 MB."""

Batch = Float[Tensor, "n c h w"]


@dataclass(frozen=True)
class OneView:
    """uint8 images -> one normalised view of each.

    Args:
        spec: what is done.
        size: side of a view in pixels.
        seed: every random number follows from it, the epoch, the image's id and `number`.
        number: of the view among those of an image; another number gives another view.
    """

    spec: ViewSpec
    size: int
    seed: int = 0
    number: int = 0

    def __call__(
        self, images: UInt8[Tensor, "n c h w"], ids: Int64[Tensor, " n"], *, epoch: int
    ) -> Float[Tensor, "n c s s"]:
        """A view of every image; arguments as of `TwoViews`."""
        return self.of_whole(images.float() / 255, ids, epoch)

    def crop(self, image: UInt8[Tensor, "c h w"], image_id: int, epoch: int) -> UInt8[Tensor, "1 c s s"]:
        """Only the crop of one image, for a reading process; `finish` does the rest in batch."""
        (box,) = self.boxes(torch.tensor([image_id]), epoch=epoch)(0, *image.shape[1:])
        return crop_resize(image, box, size=self.size)[None]

    def boxes(self, ids: Int64[Tensor, " n"], *, epoch: int) -> Boxes:
        """Where `crop` crops, for a reader that has not decoded the images yet."""
        return crop_boxes(draws(ids, seed=self.seed, epoch=epoch, view=self.number), self.spec)

    def finish(
        self, crops: UInt8[Tensor, "n 1 c s s"], ids: Int64[Tensor, " n"], *, epoch: int
    ) -> Float[Tensor, "n c s s"]:
        """Everything but the crop, on what `crop` gave."""
        p = self._parameters(ids, epoch, *crops.shape[3:])
        if crops.device.type != "cpu":
            return self._made(_only(p.flip, _planes(crops[:, 0]), lambda part, _: part.flip(3)), p)
        # A few at a time, as many as the processor's caches hold, and those together that the same is done to, so that
        # they need not be picked out. That halves the time.
        blurred = (p.sigma > 0).long()
        order = p.order @ torch.tensor([64, 16, 4, 1])
        kind = torch.where(p.jitter, 256 * (3 - blurred) + order, blurred)
        alike = kind.argsort(stable=True)
        # index_select copies whole images where the channels of a pixel lie together, as they come from a reader.
        pixels, views = crops[:, 0].permute(0, 2, 3, 1), torch.empty(crops[:, 0].shape)
        for which in alike.split(max(1, BLOCK // crops[0, 0].numel())) if len(crops) else ():
            some = Parameters(*(each[which] for each in p))
            # Flipped as bytes, which are fewer.
            picked = _only(some.flip, pixels.index_select(0, which), lambda part, _: part.flip(2))
            views.index_copy_(0, which, self._made(_planes(picked.permute(0, 3, 1, 2)), some))
        return views

    def of_whole(self, images: Batch, ids: Int64[Tensor, " n"], epoch: int) -> Float[Tensor, "n c s s"]:
        """A view of every image, given in floats in [0, 1]."""
        p = self._parameters(ids, epoch, *images.shape[2:])
        box = torch.stack([p.top, p.left, p.height, p.width], dim=1).float().to(images.device, non_blocking=True)
        flip = p.flip.to(images.device, non_blocking=True)
        return self._made(crop_resize_flip(images, box, flip, self.size), p)

    def _parameters(self, ids: Int64[Tensor, " n"], epoch: int, height: int, width: int) -> Parameters:
        return parameters(draws(ids, seed=self.seed, epoch=epoch, view=self.number), self.spec, height, width)

    def _made(self, images: Batch, p: Parameters) -> Float[Tensor, "n c s s"]:
        """From flipped crops, which are written over, to views."""
        spec = self.spec

        def there(x: Tensor) -> Tensor:
            return (x.float() if x.is_floating_point() else x).to(images.device, non_blocking=True)

        if spec.grey_first:
            images = _only(p.grey, images, _grey_again)
        if images.shape[1] in (1, 3) and spec.jitter_p > 0:
            images = _only(
                p.jitter,
                images,
                lambda part, which: jitter_colour_(part, there(p.strength[which]), p.order[which]),
            )
        if not spec.grey_first:
            images = _only(p.grey, images, _grey_again)
        radius = math.ceil(3 * spec.blur_sigma[1])
        images = _only(p.sigma > 0, images, lambda part, which: gaussian_blur(part, there(p.sigma[which]), radius))
        images = _only(p.solarize, images, lambda part, _: torch.where(part >= 128 / 255, 1 - part, part))
        return normalise(images, spec.mean, spec.std, out=images)


@dataclass(frozen=True)
class TwoViews:
    """uint8 images -> two normalised views of each.

    Args:
        specs: what is done for the first and for the second view.
        size: side of a view in pixels.
        seed: every random number follows from it, the epoch and the image's id.
    """

    specs: tuple[ViewSpec, ViewSpec]
    size: int
    seed: int = 0

    def __call__(
        self, images: UInt8[Tensor, "n c h w"], ids: Int64[Tensor, " n"], *, epoch: int
    ) -> tuple[Float[Tensor, "n c s s"], Float[Tensor, "n c s s"]]:
        """Two views of every image.

        Args:
            images: on the device that the work is to be done on.
            ids: number of each image within the dataset, on the CPU.
            epoch: another epoch gives other views.
        """
        wide, (first, second) = images.float() / 255, self._each
        return first.of_whole(wide, ids, epoch), second.of_whole(wide, ids, epoch)

    def crop(self, image: UInt8[Tensor, "c h w"], image_id: int, epoch: int) -> UInt8[Tensor, "2 c s s"]:
        """Only the two crops of one image, for a reading process; `finish` does the rest in batch."""
        return torch.cat([view.crop(image, image_id, epoch) for view in self._each])

    def boxes(self, ids: Int64[Tensor, " n"], *, epoch: int) -> Boxes:
        """Where `crop` crops, for a reader that has not decoded the images yet."""
        first, second = (view.boxes(ids, epoch=epoch) for view in self._each)
        return lambda place, height, width: first(place, height, width) + second(place, height, width)

    def finish(
        self, crops: UInt8[Tensor, "n 2 c s s"], ids: Int64[Tensor, " n"], *, epoch: int
    ) -> tuple[Float[Tensor, "n c s s"], Float[Tensor, "n c s s"]]:
        """Everything but the crop, on what `crop` gave."""
        first, second = self._each
        return first.finish(crops[:, :1], ids, epoch=epoch), second.finish(crops[:, 1:], ids, epoch=epoch)

    @property
    def _each(self) -> tuple[OneView, OneView]:
        first, second = self.specs
        return OneView(first, self.size, self.seed, 0), OneView(second, self.size, self.seed, 1)


def _only(chosen: Tensor, images: Tensor, operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Applies an operation to the chosen images in place; which they are the host knows, so nothing waits."""
    which = chosen.nonzero()[:, 0]
    if len(which) == 0:
        return images
    if len(which) == len(images):
        return operation(images, which)
    there = which.to(images.device, non_blocking=True)
    return images.index_copy_(0, there, operation(images.index_select(0, there), which))


def _planes(images: UInt8[Tensor, "n c h w"]) -> Batch:
    """Floats in [0, 1], channel by channel, whatever the order in memory was: so colours are worked on fastest."""
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _grey_again(part: Batch, which: Tensor) -> Batch:
    return part.copy_(to_grey(part)) if part.shape[1] == 3 else part
