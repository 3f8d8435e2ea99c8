"""The processes of a run check that they have the same settings, images, step and unreadable files."""

import hashlib
import logging
from collections.abc import Callable

from moco.config import PretrainConfig
from moco.data import Splits, fingerprint
from moco.parallel import collectives, consensus

log = logging.getLogger("moco")


def load_same_images(load: Callable[[], Splits], config: PretrainConfig) -> Splits:
    """Load the images in every process, and check that all have the same.

    Args:
        load: loads the images.
        config: settings, which must be the same, too.

    Raises:
        Exception: what `load` raised; in the other processes a ValueError that names the process and the error.
        ValueError: in all processes: one has different images or settings.
    """
    if collectives.world_size() == 1:
        return load()
    splits = consensus.together(load)
    for what, digest in (("settings", _digest_of_settings(config)), ("images", _digest_of_images(splits))):
        digests = consensus.everyone(digest)
        for number, other in enumerate(digests):
            if other != digests[0]:
                raise ValueError(
                    f"process {number} has different {what} from process 0 ({_shortened(other)}, "
                    f"{_shortened(digests[0])}); give every process the same {what}"
                )
    return splits


def check_same_step(step: int, *, fresh: bool) -> None:
    """Check that all processes start from the same step, because each has looked for a checkpoint by itself.

    Args:
        step: steps that this process's weights have been trained for.
        fresh: whether the weights were drawn, not read from a checkpoint.

    Raises:
        ValueError: in all processes: they start from different steps.
    """
    starts = consensus.everyone("starts anew" if fresh else f"resumes at step {step}")
    for number, start in enumerate(starts):
        if start != starts[0]:
            raise ValueError(
                f"process {number} {start}, process 0 {starts[0]}; --out and --resume must name one folder that all "
                "machines share: if it was written to a moment ago, start again"
            )


def agree_on_unreadable(own: list[str], known: set[str], *, num_images: int, max_bad: float) -> None:
    """Count the unreadable files of all processes at the end of an epoch; the first logs those that others found.

    Args:
        own: unreadable files that this process has found so far.
        known: those that all processes found in earlier epochs; updated in place.
        num_images: images in the data set.
        max_bad: largest fraction of them that may be unreadable.

    Raises:
        ValueError: in all processes: more are unreadable.
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


def _shortened(digest: str) -> str:
    return digest.rpartition(" ")[0] + " " + digest.rpartition(" ")[2][:8]


def _digest_of_settings(config: PretrainConfig) -> str:
    """Digest all settings but those that say where images are and what a machine has."""
    own = {"data": {"source", "cache", "workers", "memory"}, "engine": {"accelerator", "devices", "nodes", "threads"}}
    # Each process may have its own folder for the cache, but whether there is one decides what crops are made from.
    text = f"{config.model_dump_json(exclude=own)} {config.data.cache is None}"
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"


def _digest_of_images(splits: Splits) -> str:
    parts = [part for part in splits if part is not None]
    digest = hashlib.sha256("".join(map(fingerprint, parts)).encode()).hexdigest()
    return f"{' and '.join(str(len(part)) for part in parts)} of sha256 {digest}"
