"""Several processes write a table together: each a share of its rows, which the first joins at the end."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from moco.embeddings.table import FILES, META, Meta, read_meta, shares
from moco.embeddings.writing import join, same_table, sweep
from moco.parallel import collectives
from moco.parallel.launch import placed

WAIT = 0.1
"""Seconds between checks whether the other processes have finished."""
SAID_AFTER, PATIENCE = 10.0, 600.0
"""Seconds of waiting after which it is said for what, and seconds without a new row after which it ends."""


def own_share() -> tuple[int, int]:
    """Rank of this process and number of processes: of those that are connected, as after training, else `placed`."""
    return (collectives.rank(), collectives.world_size()) if collectives.world_size() > 1 else placed()


def write_shared(out: Path, meta: Meta, write: Callable[[Path, Meta], None]) -> None:
    """Write a table, with this process alone or with several that each write a share of the images.

    The processes do not communicate: each writes its own folder, and the first joins them when all are finished.

    Args:
        out: folder of the table; a finished one stays as it is.
        meta: description of the whole table, without rows.
        write: writes a folder, or resumes an unfinished one.

    Raises:
        ValueError: `out` was begun with something else, or by a different number of processes.
        RuntimeError: another process has stopped writing.
    """
    rank, world = own_share()
    if not _finished(out, meta):
        folders = [out / f"share-{number:05}-of-{world:05}" for number in range(world)]
        other = [folder for folder in shares(out) if world == 1 or folder not in folders]
        if other or (world > 1 and (out / META).is_file()):
            begun = f"{int(other[0].name.rpartition('-')[2])} processes" if other else "one process"
            raise ValueError(f"{out} was begun by {begun}, now there are {world}; use as many again, or another --out")
        if world == 1:
            write(out, meta)
            return
        size, stop = meta.settings.batch_size, meta.stop
        bounds = [min(number * -(-stop // size) // world * size, stop) for number in range(world + 1)]
        parts = [
            meta.model_copy(update={"start": first, "stop": last, "done": first})
            for first, last in zip(bounds, bounds[1:], strict=False)
        ]
        if not _finished(folders[rank], parts[rank]):
            write(folders[rank], parts[rank])
        if rank == 0:
            _wait_for(list(zip(folders, parts, strict=True)), out)
            join(folders, out)
        else:
            _wait_for([(out, meta)], out)
    if rank == 0:
        _remove_shares(out, meta)
        sweep(out)


def _wait_for(tables: Sequence[tuple[Path, Meta]], out: Path) -> None:
    """Wait until all are finished, but not for ever: whoever writes one may have died, or see another file system."""
    began, said = time.monotonic(), False
    asked, newest = began, _newest(out)
    while left := [folder.name for folder, meta in tables if not _finished(folder, meta)]:
        if not said and time.monotonic() - began > SAID_AFTER:
            said = True
            logging.getLogger("moco").info("waiting for %s, which other processes write", ", ".join(left))
        if time.monotonic() - asked > PATIENCE:
            asked, before, newest = time.monotonic(), newest, _newest(out)
            if newest == before:
                raise RuntimeError(
                    f"no process has written to {out} for {PATIENCE / 60:g} minutes, and {', '.join(left)} is not "
                    "finished; start all processes again, with an --out that all machines see"
                )
        time.sleep(WAIT)


def _newest(out: Path) -> float:
    """When a file below was changed last, by the clock of whoever keeps them."""
    found = 0.0
    for file in out.rglob("*"):
        with suppress(OSError):  # joined and removed in the meantime
            found = max(found, file.stat().st_mtime)
    return found


def _remove_shares(out: Path, meta: Meta) -> None:
    """Remove the shares of this table, and in them only the files that were written."""
    for folder in shares(out):
        if (folder / META).is_file() and read_meta(folder).settings != meta.settings:
            continue
        sweep(folder)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # it holds something else, too
            folder.rmdir()


def _finished(folder: Path, meta: Meta) -> bool:
    if not (folder / META).is_file():
        return False
    before = read_meta(folder)
    same_table(folder, before, meta)
    return before.complete
