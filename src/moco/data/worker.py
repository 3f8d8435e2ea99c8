"""What a reading process does: views of a part of a batch, decoded and cropped."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, final, runtime_checkable

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from moco.data.decode import quiet_pillow
from moco.data.images import Images
from moco.data.places.remote import Unavailable
from moco.data.unreadable import BadImage
from moco.views.crops import Box

PART = 64
"""Images at most that a worker makes at a time: then what is read ahead does not grow with the batch."""

Crop = Callable[[UInt8[Tensor, "c h w"], int, int], UInt8[Tensor, "v c s s"]]
"""(image, id, epoch) -> its views."""


@runtime_checkable
class Boxes(Protocol):
    """Crops that are known before an image is decoded, so that no more of it is decoded than they need."""

    @property
    def size(self) -> int:
        """Side of a view."""
        ...

    def boxes(self, ids: Int64[Tensor, " n"], *, epoch: int) -> Callable[[int, int, int], list[Box]]:
        """(place among the ids, height, width of that image) -> the crop of each of its views."""
        ...


class Part(NamedTuple):
    """What a worker sends: views, ids, and the files that it had to replace."""

    images: Tensor
    ids: Tensor
    bad: list[BadImage]
    failure: str = ""
    """What no other image can stand in for, in words: as an error it would come with a worker's traceback."""


@final
class Reader(Dataset[Part]):
    """Parts of batches by their places in the order; nothing in it is random."""

    def __init__(self, images: Images, order: Int64[Tensor, " n"], crop: Crop | Boxes, epoch: int, max_bad: float):
        self._images, self._order, self._crop, self._epoch = images, order, crop, epoch
        # With more failures in a row the parent stops anyway.
        self._attempts = min(len(order), int(max_bad * len(order)) + 2)

    def __getitem__(self, index: Sequence[int]) -> Part:
        """Return the part at these places in the order."""
        bad: list[BadImage] = []
        wanted = self._order[torch.as_tensor(index)]
        found, failure = [], ""
        try:
            with quiet_pillow():
                read = self._read(wanted)
                found = [self._first_readable(read, place, position, bad) for place, position in enumerate(index)]
        except Unavailable as error:
            failure = str(error)
        good = [item for item in found if item is not None]
        if not good:
            return Part(torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), bad, failure)
        # One copy, into the memory that is shared with the parent; the channels of a pixel stay together in it.
        flat = default_collate([view.permute(1, 2, 0) for views, _ in good for view in views])
        images = flat.unflatten(0, (len(good), -1)).permute(0, 1, 4, 2, 3)
        return Part(images, torch.tensor([id for _, id in good], dtype=torch.int64), bad)

    def _read(self, ids: Int64[Tensor, " n"]) -> Callable[[int], Sequence[Tensor]]:
        """Place among the ids -> the views of that image. What can be drawn for all at once is drawn here."""
        crop = self._crop
        if isinstance(crop, Boxes):
            boxes = crop.boxes(ids, epoch=self._epoch)
            return lambda place: self._images.crops(int(ids[place]), partial(boxes, place), size=crop.size)
        return lambda place: crop(self._images.decode(int(ids[place])), int(ids[place]), self._epoch).unbind()

    def _first_readable(
        self, read: Callable[[int], Sequence[Tensor]], place: int, position: int, bad: list[BadImage]
    ) -> tuple[Sequence[Tensor], int] | None:
        for attempt in range(self._attempts):
            id = self._order[(position + attempt) % len(self._order)]
            try:
                return (self._read(id[None])(0) if attempt else read(place)), int(id)
            except BadImage as error:
                bad.append(error)
        return None


def parts_of(places: range) -> list[range]:
    """Of a batch, all about as long."""
    count = -(-len(places) // PART)
    return [places[len(places) * i // count : len(places) * (i + 1) // count] for i in range(count)]


def joined(parts: Sequence[UInt8[Tensor, "_ v c s s"]], device: torch.device) -> UInt8[Tensor, "n v c s s"]:
    """One after the other on a device, the channels of a pixel together as they are in each."""
    if len(parts) == 1 and parts[0].device == device:
        return parts[0]
    laid = [part.permute(0, 1, 3, 4, 2) for part in parts]
    whole = torch.empty((sum(map(len, laid)), *laid[0].shape[1:]), dtype=torch.uint8, device=device)
    for place, part in zip(whole.split([len(part) for part in laid]), laid, strict=True):
        place.copy_(part, non_blocking=True)
    return whole.permute(0, 1, 4, 2, 3)
