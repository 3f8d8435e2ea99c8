"""Images in remote shards are met a few shards at a time: their order, the room it needs, and some for a look.

So a set larger than the disk is fetched once an epoch, and not once an image.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from moco.data.places.remote import cache_folder, find, is_remote, room
from moco.data.spacing import evenly

WINDOW = 16
"""Remote shards that are drawn from at a time: part of the order of images, so the same on every machine."""
AT_MOST = WINDOW * 3 // 2
"""Remote shards that the order needs at any moment."""


def windowed(order: Int64[Tensor, " n"], paths: Sequence[str], *, window: int = WINDOW) -> Int64[Tensor, " n"]:
    """The order of an epoch for images in remote shards, of which only `window` or so are needed at any moment.

    Image i of a shard that is the r-th to come is put at clamp(r - window / 2, 0, shards - window) + window * u(i), and
    images are sorted by that; u, uniform over the images, is their place in `order`, and the shard whose first image
    comes first there comes first. So it is a function of `order` alone; up to `window` shards change nothing. Near
    both ends half as many shards again are needed.

    Args:
        order: a permutation, as `epoch_order` gives it.
        paths: of the images. Those of local files and shards keep `order`.
        window: shards at a time.
    """
    if not paths or not is_remote(paths[0]):
        return order
    numbers: dict[str, int] = {}
    shard_of = torch.tensor([numbers.setdefault(_tar_of(path), len(numbers)) for path in paths])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    first = torch.from_numpy(np.unique(shard_of.numpy(), return_index=True)[1])
    rank = place[first].argsort().argsort()
    begin = (rank - window // 2).clamp(0, max(0, len(numbers) - window))
    return (begin[shard_of] + window * (place.double() / len(order))).argsort(stable=True)


def in_windows(paths: Sequence[str]) -> bool:
    """Whether `windowed` gives these images another order than their files in a folder would have."""
    return is_remote(paths[0]) and len(set(map(_tar_of, paths))) > WINDOW


def few_shards(paths: Sequence[str], most: int) -> Int64[np.ndarray, " m"]:
    """Places of so many images, evenly spaced, of as few evenly spaced shards as hold them: of `WINDOW` at least."""
    places: dict[str, list[int]] = {}
    for place, path in enumerate(paths):
        places.setdefault(_tar_of(path), []).append(place)
    shards = list(places.values())
    sizes, count = np.array([len(shard) for shard in shards]), min(WINDOW, len(shards))
    while sizes[evenly(len(shards), count)].sum() < min(most, len(paths)):
        count += 1
    found = np.sort(np.concatenate([shards[shard] for shard in evenly(len(shards), count)]))
    return found[evenly(len(found), most)]


def refuse_little_room(paths: Sequence[str]) -> None:
    """Sees to it that the shards of `windowed` fit their place here; with less each is fetched over and over.

    Raises:
        ValueError: they do not.
        OSError: the sizes of the shards cannot be asked for.
    """
    sizes = sorted((find(tar).size for tar in set(map(_tar_of, paths))), reverse=True)[:AT_MOST]
    if sum(sizes) > (there := room()):
        raise ValueError(
            f"{cache_folder()} has room for {there / 2**30:.3g} GiB of shards; expected {sum(sizes) / 2**30:.3g} at"
            f" least, for the {len(sizes)} that the order of images needs at a time: raise MOCO_CACHE_GIB, or set"
            " MOCO_CACHE to a folder on a larger disk"
        )


def _tar_of(path: str) -> str:
    return path[: path.find(".tar/") + 4]
