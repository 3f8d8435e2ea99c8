"""Agreement among the processes of a run: all have the same images and checkpoint, and if one fails, all stop."""

import hashlib
import logging
from collections.abc import Callable, Iterator

from torch import Tensor

from moco.config import PretrainConfig
from moco.data import Splits, fingerprint
from moco.parallel import collectives, consensus
from moco.parallel.signals import StopSignal
from moco.training.step import Training

log = logging.getLogger("moco")


def load_alike(load: Callable[[], Splits], config: PretrainConfig) -> Splits:
    """Load the images on every rank, and check that all ranks have the same.

    Args:
        load: loads the images.
        config: settings, which have to be the same, too.

    Raises:
        Exception: that of `load`; on the other ranks a ValueError that says on which, and what.
        ValueError: on all ranks: one of them has different images or settings.
    """
    if collectives.world_size() == 1:
        return load()
    splits = consensus.together(load)
    for what, own in (("settings", _of_settings(config)), ("images", _of_images(splits))):
        said = consensus.everyone(own)
        for number, text in enumerate(said):
            if text != said[0]:
                raise ValueError(
                    f"process {number} has different {what} from process 0 ({_shown(text)}, {_shown(said[0])}); "
                    f"give every process the same {what}"
                )
    return splits


def start_alike(done: int, *, anew: bool) -> None:
    """Check that all ranks start from the same step; each has looked for a checkpoint and read it by itself.

    Args:
        done: steps that this rank's weights have been trained for.
        anew: the weights were drawn, not read from a checkpoint.

    Raises:
        ValueError: on all ranks: they do not.
    """
    said = consensus.everyone("starts anew" if anew else f"resumes at step {done}")
    for number, text in enumerate(said):
        if text != said[0]:
            raise ValueError(
                f"process {number} {text}, process 0 {said[0]}; --out and --resume must name one folder that all "
                "machines share: if it was written to a moment ago, start again"
            )


def _shown(text: str) -> str:
    return text.rpartition(" ")[0] + " " + text.rpartition(" ")[2][:8]


def _of_settings(config: PretrainConfig) -> str:
    """A digest of the settings, without those that say where images are and what a machine has."""
    own = {"data": {"source", "cache", "workers", "memory"}, "engine": {"accelerator", "devices", "nodes", "threads"}}
    # Each rank may have its own folder for the cache, but whether there is one decides what crops are made from.
    said = f"{config.model_dump_json(exclude=own)} {config.data.cache is None}"
    return f"sha256 {hashlib.sha256(said.encode()).hexdigest()}"


def _of_images(splits: Splits) -> str:
    parts = [part for part in splits if part is not None]
    digest = hashlib.sha256("".join(map(fingerprint, parts)).encode()).hexdigest()
    return f"{' and '.join(str(len(part)) for part in parts)} of sha256 {digest}"


def carried_on(
    batches: Iterator[tuple[Tensor, Tensor]], training: Training, signals: StopSignal
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches; if one rank of several cannot read its images, black ones until all have agreed to stop.

    Otherwise the others would wait for it. The result of the black batches is discarded.
    """
    try:
        yield from batches
    except Exception as error:
        if collectives.world_size() == 1:
            raise
        signals.failure = error
        while True:
            yield training.spare()


def share_bad(own: list[str], known: set[str], *, num_images: int, max_bad: float) -> None:
    """Count the unreadable files of all ranks at the end of an epoch; the first rank logs those of the others.

    Args:
        own: unreadable files that this rank has met so far.
        known: those of all ranks in earlier epochs; updated in place.
        num_images: images in the data set.
        max_bad: largest fraction of them that may be unreadable.

    Raises:
        ValueError: on all ranks: more are unreadable.
    """
    if collectives.world_size() == 1:
        return
    bad = consensus.union(own)
    new = sorted(bad - known - set(own))
    known |= bad
    if new and collectives.rank() == 0:
        log.warning("other processes replaced %d unreadable files by the next image, first %s", len(new), new[0])
    if len(bad) > max_bad * num_images:
        raise ValueError(
            f"{len(bad)} of {num_images} files could not be read so far, expected at most {max_bad:.2%}; remove them "
            f"or raise data.max_bad: {', '.join(map(repr, sorted(bad)[:5]))}"
        )
