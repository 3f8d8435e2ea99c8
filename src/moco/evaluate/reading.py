"""Reading images for protocols: features of those that can be read, and batches of random views."""

import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from moco.data import BadImage, Images, Loader, epoch_order
from moco.data.loader import num_workers
from moco.data.unreadable import NUM_NAMED, refuse_too_many
from moco.embeddings.features import read_features
from moco.evaluate.contract import ROWS_AT_ONCE, Task
from moco.files import scratch_room
from moco.method.encoder import ImageEncoder
from moco.parallel import collectives, consensus
from moco.parallel.launch import own_cores, sharing_cores
from moco.views.two_views import OneView

IMAGES_AT_ONCE = 256
DECODED_AT_ONCE = 32
"""Decoded images, which may be camera-sized, held until they are cropped."""


class Batch(NamedTuple):
    """A view of each image, and its index among the images; `shared`: of several processes each has others of them."""

    views: Float[Tensor, "n c s s"]
    ids: Int64[Tensor, " n"]
    shared: bool = False

    def whole(self, rows: Float[Tensor, "n f"]) -> tuple[Float[Tensor, "m f"], Int64[Tensor, " m"]]:
        """Return rows made of its views, and the ids, of the batch of all processes; no gradient flows through."""
        if not self.shared:
            return rows.detach(), self.ids
        return collectives.gather_through(rows, rows.device), collectives.gather_through(self.ids, rows.device)


class Read(NamedTuple):
    """The images that could be read, their features in the same order, and notes on what was left out."""

    images: Images
    vectors: Float[Tensor, "n f"]
    notes: tuple[str, ...]


@torch.inference_mode()
def read(
    task: Task,
    images: Images,
    part: str,
    *,
    encoder: ImageEncoder | None = None,
    precision: str | None = None,
    cut: bool = False,
) -> Read:
    """Compute features of all images that can be read.

    Args:
        task: gives the encoder, the precision and the fraction of files that may be unreadable.
        images: images to read.
        part: `training` or `test`, for messages.
        encoder: encoder to use instead of the task's.
        precision: precision to use instead of the task's.
        cut: crop the centre of a larger square, as in tests of published linear classifiers; see `cut_side`.

    Raises:
        ValueError: too many files cannot be read.
    """
    encoder, bad = encoder or task.encoder, dict[int, BadImage]()
    short = cut_side(encoder, images) if cut else None

    def work(which: range) -> Tensor:
        rows, failed = read_features(
            encoder,
            images if len(which) == len(images) else images.select(which),
            batch_size=IMAGES_AT_ONCE,
            precision=precision or task.settings.precision,
            short=short,
            on_progress=lambda done, total: task.report(f"features of the {part} images", done, total),
        )
        bad.update({which[place]: each for place, each in failed.items()})
        return rows

    # Several processes share the work; all of them get all rows, and the list of all files that cannot be read.
    vectors = collectives.in_shares(
        work,
        len(images),
        encoder.num_features,
        at_once=IMAGES_AT_ONCE,
        device=task.device,
        room=lambda rows, columns: torch.from_numpy(scratch_room(rows, columns)),
    )
    if collectives.world_size() > 1:
        said = consensus.everyone(json.dumps([(place, each.path, each.reason) for place, each in bad.items()]))
        bad = {place: BadImage(path, reason) for text in said for place, path, reason in json.loads(text)}
    if not bad:
        return Read(images, vectors, ())
    note = left_out(list(bad.values()), len(images), part, task.data.max_bad)
    good = torch.tensor([place for place in range(len(images)) if place not in bad])
    for start in range(0, len(good), ROWS_AT_ONCE):  # in place, as there may be no memory for a copy
        rows = good[start : start + ROWS_AT_ONCE]
        vectors[start : start + len(rows)] = vectors[rows]
    return Read(images.select(good), vectors[: len(good)], (note,))


def cut_side(encoder: ImageEncoder, images: Images) -> int:
    """Length in pixels to resize the short side to: 256 for an encoder of 224, and in proportion for others.

    Images in memory that are no larger than the encoder's size are not enlarged.
    """
    size = encoder.input_size
    small = images.in_memory is not None and min(images.in_memory.shape[2:]) <= size
    return size if small else round(size * 256 / 224)


def left_out(bad: Sequence[BadImage], num_images: int, part: str, max_bad: float, *, known: int = 0) -> str:
    """Log the names of unreadable files, and return a note with their number.

    Args:
        bad: the unreadable files.
        num_images: number of all images.
        part: `training` or `test`, for messages.
        max_bad: largest fraction of the images that may be unreadable.
        known: number of files that were logged before.

    Raises:
        ValueError: more are unreadable, or all are.
    """
    count = known + len(bad)
    if count > max_bad * num_images or count == num_images:
        named = [f"{each.path!r} ({each.reason})" for each in bad]
        raise refuse_too_many(count, num_images, part, max_bad, named)
    log = logging.getLogger("moco")
    for each in bad[: max(0, NUM_NAMED - known)]:
        log.warning("left out of the evaluation: %s", each)
    if count > NUM_NAMED:
        log.warning("left out of the evaluation, in all: %d of %d %s images", count, num_images, part)
    return f"{count:,} of {num_images:,} {part} images could not be read and were left out."


class Held(NamedTuple):
    """Training images, their decoded pixels if there is memory for them, and notes on what was left out."""

    images: Images
    pixels: Sequence[UInt8[Tensor, "c _ _"]] | None = None
    notes: tuple[str, ...] = ()


def hold(task: Task, images: Images) -> Held:
    """Decode files once if all of them fit into `data.memory`, as estimated from the first ones.

    Raises:
        ValueError: too many files cannot be read.
    """
    if images.in_memory is not None:
        return Held(images)
    pixels: list[Tensor] = []
    good: list[int] = []
    bad: list[BadImage] = []
    used = 0
    for places in torch.arange(len(images)).split(DECODED_AT_ONCE):
        for place, each in zip(places.tolist(), images.decode_many(places.tolist()), strict=True):
            if isinstance(each, BadImage):
                bad.append(each)
            else:
                good.append(place)
                pixels.append(each)
                used += each.nbytes
        if used / (int(places[-1]) + 1) * len(images) > task.data.memory * 2**30:
            return Held(images)
        task.report("decoded training images", int(places[-1]) + 1, len(images))
    if not bad:
        return Held(images, pixels)
    return Held(images.select(good), pixels, (left_out(bad, len(images), "training", task.data.max_bad),))


@final
class Batches:
    """The batches of an epoch: a random view of each image, and its index among the images.

    Args:
        task: gives the seed and the device.
        held: the images.
        view: how views are made.
        batch_size: images per batch.
        whole: include all images, so that the last batch may be smaller; otherwise drop an incomplete batch.
        share: of several processes each makes a share of every full batch, if it can be shared equally; otherwise each
            makes all of it.
    """

    def __init__(self, task: Task, held: Held, view: OneView, batch_size: int, *, whole: bool, share: bool = False):
        images, seed = held.images, task.settings.seed
        self._rank, self._world = (collectives.rank(), collectives.world_size()) if share else (0, 1)
        if batch_size % self._world:
            logging.getLogger("moco").warning(
                "%d processes cannot share a batch of %d equally, so each makes all of it; another --batch_size, or "
                "another number of processes, would be faster",
                self._world,
                batch_size,
            )
            self._rank, self._world = 0, 1
        self._task, self._held, self._view, self._size, self._whole = task, held, view, batch_size, whole
        self._pixels = None if images.in_memory is None else images.in_memory.to(task.device)
        self._bad: dict[str, BadImage] = {}
        self._loader = None
        if self._pixels is None and held.pixels is None and len(images) >= batch_size:
            self._loader = Loader(
                images,
                batch_size=batch_size,
                seed=seed,
                device=task.device,
                rank=self._rank,
                world_size=self._world,
                workers=num_workers(sharing_cores(collectives.on_this_machine()))
                if task.data.workers is None
                else task.data.workers,
                crop=view,
                max_bad=task.data.max_bad,
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on what could not be read so far; all processes that share batches have to ask."""
        count, number = len(self._unreadable()), len(self._held.images)
        return (*self._held.notes, *([f"{count:,} of {number:,} training images could not be read."] if count else []))

    def __call__(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, or this process's share of each; their order depends on seed and epoch."""
        images, size = self._held.images, self._size
        order = epoch_order(len(images), seed=self._task.settings.seed, epoch=epoch)
        full = order[: len(order) // size * size]
        rest = order[len(full) :] if self._whole else order[:0]
        # An incomplete batch is small, and might not be shared equally: each process makes all of it.
        wanted = [ids[self._rank :: self._world] for ids in full.split(size) if len(ids)]
        wanted += [rest] if len(rest) else []
        shared = [self._world > 1] * (len(full) // size) + [False]
        if self._pixels is not None:
            for ids, each in zip(wanted, shared, strict=False):
                yield Batch(self._view(self._pixels[ids.to(self._task.device)], ids, epoch=epoch), ids, each)
        elif self._held.pixels is not None:
            for (crops, ids), each in zip(self._cropped(self._held.pixels, wanted, epoch), shared, strict=False):
                yield Batch(self._finished(crops, ids, epoch), ids, each)
        else:
            for crops, ids in self._loader.epoch(epoch) if self._loader else ():
                yield Batch(self._finished(crops, ids, epoch), ids, self._world > 1)
            crops, ids = self._read(rest, epoch)  # the loader drops an incomplete batch
            if len(ids):
                yield Batch(self._finished(crops, ids, epoch), ids)
            if self._world > 1:
                self._refuse_too_many()

    def _unreadable(self) -> set[str]:
        """Files that could not be read so far, by any process that shares the batches; all of these have to ask."""
        own = self._bad.keys() | set(self._loader.bad if self._loader else ())
        return consensus.union(own) if self._world > 1 else own

    def _refuse_too_many(self) -> None:
        """Refuse as one process would: each of several has found only those of its own part."""
        bad, number, most = self._unreadable(), len(self._held.images), self._task.data.max_bad
        if len(bad) > most * number:
            raise refuse_too_many(len(bad), number, "training", most, list(map(repr, sorted(bad))))

    def _finished(self, crops: Tensor, ids: Tensor, epoch: int) -> Tensor:
        return self._view.finish(crops.to(self._task.device, non_blocking=True), ids, epoch=epoch)

    def _cropped(
        self, pixels: Sequence[Tensor], wanted: Sequence[Tensor], epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Crops of decoded files; those of the next batch are made while the current one is processed."""
        with ThreadPoolExecutor(own_cores(collectives.on_this_machine())) as pool:
            waiting: deque[tuple[Tensor, list[Future[Tensor]]]] = deque()
            for ids in [*wanted, None]:
                if ids is not None:
                    crops = [pool.submit(self._view.crop, pixels[id], id, epoch) for id in ids.tolist()]
                    waiting.append((ids, crops))
                if len(waiting) > (ids is not None):
                    ready, crops = waiting.popleft()
                    yield torch.stack([each.result() for each in crops]), ready

    def _read(self, ids: Int64[Tensor, " n"], epoch: int) -> tuple[Tensor, Tensor]:
        """Crops of files, decoded a few at a time, without those that cannot be read."""
        images, crops, good = self._held.images, list[Tensor](), list[int]()
        for part in ids.split(DECODED_AT_ONCE):
            new: dict[str, BadImage] = {}
            for id, each in zip(part.tolist(), images.decode_many(part.tolist()), strict=True):
                if not isinstance(each, BadImage):
                    crops.append(self._view.crop(each, id, epoch))
                    good.append(id)
                elif each.path not in self._bad:
                    new[each.path] = each
            if new:
                left_out(list(new.values()), len(images), "training", self._task.data.max_bad, known=len(self._bad))
                self._bad |= new
        return torch.stack(crops) if crops else torch.empty(0), torch.tensor(good, dtype=torch.int64)
