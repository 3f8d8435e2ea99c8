"""The order of images in remote shards, which needs few shards at a time, and the disk space that these take.

A set larger than the disk is then fetched once an epoch, not once an image.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from moco.data.places.addresses import is_remote, tar_of
from moco.data.places.remote import cache_folder, find, room
from moco.data.spacing import evenly

WINDOW = 16
"""Remote shards that images are drawn from at a time. The order depends on it, so it is the same on every machine."""
AT_MOST = WINDOW * 3 // 2
"""Remote shards that the order needs at any moment."""


def windowed(order: Int64[Tensor, " n"], paths: Sequence[str], *, window: int = WINDOW) -> Int64[Tensor, " n"]:
    """Return the order of an epoch for images in remote shards, which needs about `window` of them at any moment.

    Image i of a shard that is the r-th to come is put at clamp(r - window / 2, 0, shards - window) + window * u(i), and
    images are sorted by that; u(i) in [0, 1) is its place in `order`, and the shard whose first image comes first there
    comes first. The result is a function of `order` alone, and is `order` itself for up to `window` shards. Near both
    ends half as many shards again are needed.

    Args:
        order: a permutation, as `epoch_order` returns it.
        paths: addresses of the images. Images on this machine keep `order`.
        window: shards at a time.
    """
    if not paths or not is_remote(paths[0]):
        return order
    numbers: dict[str, int] = {}
    shard_of = torch.tensor([numbers.setdefault(tar_of(path), len(numbers)) for path in paths])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    first = torch.from_numpy(np.unique(shard_of.numpy(), return_index=True)[1])
    rank = place[first].argsort().argsort()
    begin = (rank - window // 2).clamp(0, max(0, len(numbers) - window))
    return (begin[shard_of] + window * (place.double() / len(order))).argsort(stable=True)


def in_windows(paths: Sequence[str]) -> bool:
    """Whether `windowed` changes the order of these images."""
    return is_remote(paths[0]) and len(set(map(tar_of, paths))) > WINDOW


def few_shards(paths: Sequence[str], most: int) -> Int64[np.ndarray, " m"]:
    """Choose `most` images, evenly spaced, from as few evenly spaced shards as hold them, but from at least `WINDOW`.

    Returns:
        The positions of the images in `paths`, ascending.
    """
    places: dict[str, list[int]] = {}
    for place, path in enumerate(paths):
        places.setdefault(tar_of(path), []).append(place)
    shards = list(places.values())
    sizes, count = np.array([len(shard) for shard in shards]), min(WINDOW, len(shards))
    while sizes[evenly(len(shards), count)].sum() < min(most, len(paths)):
        count += 1
    found = np.sort(np.concatenate([shards[shard] for shard in evenly(len(shards), count)]))
    return found[evenly(len(found), most)]


def refuse_little_room(paths: Sequence[str]) -> None:
    """Check that the shards which `windowed` needs at a time fit into the cache, or each would be fetched repeatedly.

    Raises:
        ValueError: they do not fit.
        OSError: the sizes of the shards cannot be found out.
    """
    sizes = sorted((find(tar).size for tar in set(map(tar_of, paths))), reverse=True)[:AT_MOST]
    if sum(sizes) > (there := room()):
        raise ValueError(
            f"{cache_folder()} has room for {there / 2**30:.3g} GiB of shards; expected {sum(sizes) / 2**30:.3g} at"
            f" least, for the {len(sizes)} that the order of images needs at a time: raise MOCO_CACHE_GIB, or set"
            " MOCO_CACHE to a folder on a larger disk"
        )
