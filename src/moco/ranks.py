"""What the processes of a run settle among themselves: that their images are the same, and that one stops all."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator

from torch import Tensor

from moco import dist
from moco.config import PretrainConfig
from moco.data import Splits, fingerprint
from moco.engine import StopSignal
from moco.training import Training

log = logging.getLogger("moco")


def load_alike(load: Callable[[], Splits], config: PretrainConfig) -> Splits:
    """Images that are the same on all ranks; each loads its own.

    Args:
        load: what loads them.
        config: settings that have to be the same, too.

    Raises:
        ValueError: on all ranks alike: one could not load them, or has other images or settings.
    """
    if dist.world_size() == 1:
        return load()
    try:
        splits, error = load(), None
    except (ValueError, OSError) as caught:
        splits, error = None, caught
    dist.fail_together(error)
    assert splits is not None
    for what, own in (("settings", _of_settings(config)), ("images", _of_images(splits))):
        said = dist.everyone(own)
        for number, text in enumerate(said):
            if text != said[0]:
                raise ValueError(
                    f"process {number} has other {what} than process 0 ({_shown(text)}, {_shown(said[0])}); "
                    f"give every process the same {what}"
                )
    return splits


def start_alike(done: int, *, anew: bool) -> None:
    """That all ranks are where the others are; each has looked for a checkpoint and read it by itself.

    Args:
        done: steps that this rank's weights have made.
        anew: they have been drawn, not read.

    Raises:
        ValueError: on all ranks: they are not.
    """
    said = dist.everyone("begins" if anew else f"goes on at step {done}")
    for number, text in enumerate(said):
        if text != said[0]:
            raise ValueError(
                f"process {number} {text}, process 0 {said[0]}; --out and --resume have to name one folder that all "
                "machines see alike: if it was written to a moment ago, start again"
            )


def _shown(text: str) -> str:
    return text.rpartition(" ")[0] + " " + text.rpartition(" ")[2][:8]


def _of_settings(config: PretrainConfig) -> str:
    """All but those that say where images lie and what a machine has."""
    own = {"data": {"source", "cache", "workers", "memory"}, "engine": {"accelerator", "devices", "nodes", "threads"}}
    # Where the cache lies is each one's own; whether there is one decides which pixels crops are made of.
    said = f"{config.model_dump_json(exclude=own)} {config.data.cache is None}"
    return f"sha256 {hashlib.sha256(said.encode()).hexdigest()}"


def _of_images(splits: Splits) -> str:
    parts = [part for part in splits if part is not None]
    digest = hashlib.sha256("".join(map(fingerprint, parts)).encode()).hexdigest()
    return f"{' and '.join(str(len(part)) for part in parts)} of sha256 {digest}"


def carried_on(
    batches: Iterator[tuple[Tensor, Tensor]], training: Training, signals: StopSignal
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches; where the images fail one rank of several, black ones until all have agreed to stop.

    The others would wait for it: what it then makes of them is thrown away.
    """
    try:
        yield from batches
    except (ValueError, OSError) as error:
        if dist.world_size() == 1:
            raise
        signals.failure = error
        while True:
            yield training.spare()


def share_bad(own: list[str], known: set[str], *, num_images: int, max_bad: float) -> None:
    """At the end of an epoch: files that any rank could not read count together, and the first names the others'.

    Args:
        own: files that this rank has met so far.
        known: those of all ranks in earlier epochs; added to.
        num_images: of the set.
        max_bad: largest fraction of them that may prove unreadable.

    Raises:
        ValueError: on all ranks: there are more.
    """
    if dist.world_size() == 1:
        return
    bad = {path for said in dist.everyone(json.dumps(own)) for path in json.loads(said)}
    new = sorted(bad - known - set(own))
    known |= bad
    if new and dist.rank() == 0:
        log.warning("replaced by the next image on other processes: %d files, first %s", len(new), new[0])
    if len(bad) > max_bad * num_images:
        raise ValueError(
            f"{len(bad)} of {num_images} files could not be read so far, expected at most {max_bad:.2%}; remove them "
            f"or raise data.max_bad: {', '.join(map(repr, sorted(bad)[:5]))}"
        )
