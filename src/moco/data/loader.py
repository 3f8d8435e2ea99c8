"""Images in a shuffled order that depends on seed and epoch alone, in batches, from any step on."""

import hashlib
import logging
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader

from moco.data.images import Images
from moco.data.places.addresses import is_remote
from moco.data.places.remote import Unavailable
from moco.data.places.shard_order import refuse_little_room, windowed
from moco.data.unreadable import NUM_NAMED, BadImage
from moco.data.worker import Boxes, Crop, Part, Reader, joined, parts_of
from moco.parallel.launch import allowed_cores
from moco.views.pixels import centred

DECODED_AT_ONCE = 32
"""Full-size pictures held at a time when they are only wanted small."""

MAX_WORKERS = 16
"""Reading processes that are started unasked; so many feed a GPU, and each holds images in memory."""


def epoch_order(num_images: int, *, seed: int, epoch: int) -> Int64[Tensor, " n"]:
    """Return a permutation of all image ids, which depends on seed and epoch alone."""
    digest = hashlib.blake2b(f"order,{seed},{epoch}".encode(), digest_size=7).digest()
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big")))


@final
class Loader:
    """Batches of an epoch's order.

    Args:
        images: pixels in memory are moved to the device once and indexed there; files are read by worker processes.
        batch_size: Images per step over all ranks. What is left at the end of an epoch is dropped.
        seed: Of the order.
        device: Where pixels in memory are kept. Batches of files are brought there if it is a CUDA device.
        rank: Image i of a global batch belongs to rank i mod `world_size`.
        world_size: Number of ranks.
        workers: Reading processes; 0 reads in this one; not given: one less than this rank's share of the cores.
        crop: What makes views [v, c, s, s] in the workers: `Boxes`, as `TwoViews` are, or a function (image, id,
            epoch) of a decoded image. Needed for files only.
        max_bad: Largest fraction of images that may prove unreadable.

    Raises:
        ValueError: fewer images than a batch, a batch that the ranks cannot share equally, files without `crop`,
            or too little room for shards from elsewhere.
    """

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
        crop: Crop | Boxes | None = None,
        max_bad: float = 0.01,
    ):
        if batch_size > len(images):
            raise ValueError(f"batch_size is {batch_size}, expected at most the number of images, {len(images)}")
        if batch_size % world_size:
            raise ValueError(f"batch_size is {batch_size}, expected a multiple of the {world_size} processes")
        pixels = images.in_memory
        if pixels is None and crop is None:
            raise ValueError("image files of any sizes make no batch, expected a crop function that gives equal views")
        if pixels is None and images.cache is None and is_remote(images.paths[0]):
            refuse_little_room(images.paths)
        self.steps_per_epoch = len(images) // batch_size
        self.bad: list[str] = []
        """Files that failed when they were read, in the order of discovery."""
        self._images, self._batch_size, self._seed, self._device = images, batch_size, seed, device
        self._rank, self._world_size, self._crop, self._max_bad = rank, world_size, crop, max_bad
        self._workers = num_workers(world_size) if workers is None else workers
        self._pixels = None if pixels is None else pixels.to(device)
        self._wait_seconds = 0.0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and self._pixels is None else None

    @property
    def wait_seconds(self) -> float:
        """Seconds spent waiting for files since this was last asked; 0 for images in memory."""
        seconds, self._wait_seconds = self._wait_seconds, 0.0
        return seconds

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[tuple[UInt8[Tensor, "..."], Int64[Tensor, " n"]]]:
        """Yield this rank's batches from step `start` on: uint8 images and their ids (positions in the image set).

        `ArrayImages` give [n, c, h, w] on the device, `FileImages` [n, v, c, s, s] there or in host memory, where all
        ids are.
        An unreadable file is replaced by the next readable one of the order, which then also gives its id.

        Raises:
            ValueError: more than `max_bad` of the files cannot be read.
            Unavailable: a shard elsewhere cannot be had.
        """
        order = epoch_order(len(self._images), seed=self._seed, epoch=epoch)
        if self._pixels is not None:
            return self._from_memory(self._pixels, order, start)
        return self._from_files(windowed(order, self._images.paths), epoch, start)

    def _positions(self, step: int) -> slice:
        """Places in the order that this rank has at a step."""
        return slice(step * self._batch_size + self._rank, (step + 1) * self._batch_size, self._world_size)

    def _from_memory(self, pixels: Tensor, order: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        there = order.to(self._device)  # once an epoch, so that no step waits for a copy
        for step in range(start, self.steps_per_epoch):
            places = self._positions(step)
            yield pixels[there[places]], order[places]

    def _from_files(self, order: Tensor, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        assert self._crop is not None
        reader = Reader(self._images, order, self._crop, epoch, self._max_bad)
        steps = [parts_of(range(len(order))[self._positions(step)]) for step in range(start, self.steps_per_epoch)]
        # A batch ahead, and a part of the next for each: more only takes memory.
        ahead = 1 + -(-max(map(len, steps), default=1) // max(1, self._workers))
        with warnings.catch_warnings():
            # From Python 3.12 on a fork beside threads warns. A worker runs one thread and takes no lock of ours.
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            # How many workers is somebody's choice, or ours from the cores there are.
            warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
            batches = DataLoader(
                reader,
                sampler=[part for parts in steps for part in parts],
                batch_size=None,
                num_workers=self._workers,
                prefetch_factor=ahead if self._workers else None,
                collate_fn=_unchanged,
                pin_memory=self._device.type == "cuda",
                # Else every epoch would draw from the global generator, and a resumed run would draw differently.
                generator=torch.Generator(),
                multiprocessing_context=_context() if self._workers else None,
                worker_init_fn=_outlast,
            )
            iterator = iter(batches)
        try:
            for parts in steps:
                begin, made = time.perf_counter(), list[Part]()
                for _ in parts:
                    made.append(next(iterator))
                    self._record(made[-1].bad)
                    if made[-1].failure:
                        raise Unavailable(made[-1].failure)
                self._wait_seconds += time.perf_counter() - begin
                yield self._moved(made)
        finally:
            # Ends the workers now, not when somebody lets go of an error's traceback.
            del iterator

    def _moved(self, parts: list[Part]) -> tuple[Tensor, Tensor]:
        """On a GPU already when it is needed: copied from pinned memory while the step before is still computed."""
        images, ids = [part.images for part in parts], torch.cat([part.ids for part in parts])
        parts.clear()  # or the batch would be there twice while it is computed
        if self._stream is None:
            return joined(images, images[0].device), ids
        with torch.cuda.stream(self._stream):
            batch = joined(images, self._device)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        batch.record_stream(current)  # else its memory could be given away while the step still reads it
        return batch, ids.pin_memory()

    def _record(self, bad: list[BadImage]) -> None:
        log = logging.getLogger("moco")
        for each in bad:
            if each.path in self.bad:
                continue
            self.bad.append(each.path)
            if len(self.bad) <= NUM_NAMED:
                log.warning("replaced by the next image: %s", each)
            elif len(self.bad) == NUM_NAMED + 1:
                log.warning("replaced by the next image: more files, from here on only counted")
        if len(self.bad) > self._max_bad * len(self._images) or len(self.bad) == len(self._images):
            raise ValueError(
                f"{len(self.bad)} of {len(self._images)} files could not be read so far, expected at most"
                f" {self._max_bad:.2%}; remove them or raise data.max_bad: {', '.join(map(repr, self.bad[:5]))}"
            )


def _unchanged(batch: Any) -> Any:
    return batch


def num_workers(here: int) -> int:
    """Return a process's share of the cores, less one for itself.

    Args:
        here: processes that share the cores that this one may use.
    """
    return min(MAX_WORKERS, max(1, allowed_cores() // here - 1))


def _context() -> str | None:
    """Fork where there is one: the list of paths is shared and a script needs no `if __name__` guard."""
    return "fork" if os.name == "posix" and "fork" in multiprocessing.get_all_start_methods() else None


def resized(
    images: Images, indices: Sequence[int] | Int64[Tensor, " n"], *, size: int
) -> UInt8[Tensor, "n c {size} {size}"]:
    """Return a batch for feature extraction: short side resized to `size` (bilinear, antialiased), then centre-cropped.

    A file that cannot be read is black, and the log names it.
    """
    chosen = torch.as_tensor(indices, dtype=torch.int64)
    pixels = images.in_memory
    if pixels is not None:
        return centred(pixels[chosen.to(pixels.device)], size)
    out = torch.zeros(len(chosen), images.channels, size, size, dtype=torch.uint8)
    bad: list[BadImage] = []
    # A few at a time: at camera size each takes tens of megabytes until it is shrunk.
    for start in range(0, len(chosen), DECODED_AT_ONCE):
        for place, each in enumerate(images.decode_many(chosen[start : start + DECODED_AT_ONCE].tolist()), start):
            if isinstance(each, BadImage):
                bad.append(each)
            else:
                out[place] = centred(each[None], size)[0]
    if bad:
        logging.getLogger("moco").warning("%d of %d images are black: %s", len(bad), len(out), bad[0])
    return out


def _outlast(worker: int) -> None:
    """Ignore signals that go to a whole group of processes: readers go on until the training process has saved.

    A second SIGTERM, as the one that trains would send when it ends, ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
