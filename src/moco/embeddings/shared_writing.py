"""Write one table with several processes: each writes some of the rows, and the first joins them at the end."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from moco.embeddings.table import FILES, META, Meta, process_folders, read_meta
from moco.embeddings.writing import join, read_begun, remove_partial_files
from moco.parallel import collectives
from moco.parallel.launch import placed

WAIT = 0.1
"""Seconds between checks whether the other processes have finished."""
LOG_AFTER, PATIENCE = 10.0, 600.0
"""Seconds of waiting after which the log says for what, and seconds without a new row after which waiting ends."""


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes: connected ones, as after training, else `placed`."""
    return (collectives.rank(), collectives.world_size()) if collectives.world_size() > 1 else placed()


def write_shared(out: Path, meta: Meta, write: Callable[[Path, Meta], None]) -> None:
    """Write a table, with this process alone or with several that each write some of the rows.

    The processes do not communicate: each writes its own folder, and the first joins them when all are finished.

    Args:
        out: folder of the table; a finished one stays as it is.
        meta: description of the whole table, without rows.
        write: writes a folder, or resumes an unfinished one.

    Raises:
        ValueError: `out` was begun with something else, or by a different number of processes.
        RuntimeError: another process has stopped writing.
    """
    rank, world = rank_and_world_size()
    if not _finished(out, meta):
        folders = [out / f"share-{number:05}-of-{world:05}" for number in range(world)]
        others = [folder for folder in process_folders(out) if world == 1 or folder not in folders]
        if others or (world > 1 and (out / META).is_file()):
            begun = f"{int(others[0].name.rpartition('-')[2])} processes" if others else "one process"
            raise ValueError(f"{out} was begun by {begun}, now there are {world}; use as many again, or another --out")
        if world == 1:
            write(out, meta)
            return
        size, stop = meta.settings.batch_size, meta.stop
        bounds = [min(number * -(-stop // size) // world * size, stop) for number in range(world + 1)]
        tables = {
            folder: meta.model_copy(update={"start": start, "stop": stop, "done": start})
            for folder, start, stop in zip(folders, bounds, bounds[1:], strict=False)
        }
        own = folders[rank]
        if not _finished(own, tables[own]):
            write(own, tables[own])
        _wait_for(tables if rank == 0 else {out: meta}, out)
        if rank == 0:
            join(folders, out)
    if rank == 0:
        _remove_process_folders(out, meta)
        remove_partial_files(out)


def _wait_for(tables: dict[Path, Meta], out: Path) -> None:
    """Wait until all tables are finished, but not for ever: a process may have died, or see another file system."""
    began = checked = time.monotonic()
    logged, newest = False, _last_change(out)
    while unfinished := ", ".join(folder.name for folder, meta in tables.items() if not _finished(folder, meta)):
        now = time.monotonic()
        if not logged and now - began > LOG_AFTER:
            logged = True
            logging.getLogger("moco").info("waiting for %s, which other processes write", unfinished)
        if now - checked > PATIENCE:
            checked, before, newest = now, newest, _last_change(out)
            if newest == before:
                raise RuntimeError(
                    f"no process has written to {out} for {PATIENCE / 60:g} minutes, and {unfinished} is not "
                    "finished; start all processes again, with an --out that all machines see"
                )
        time.sleep(WAIT)


def _last_change(folder: Path) -> float:
    """Return when a file in the folder was last changed, by the file system's clock."""
    times = [0.0]
    for file in folder.rglob("*"):
        with suppress(OSError):  # joined and removed in the meantime
            times.append(file.stat().st_mtime)
    return max(times)


def _remove_process_folders(out: Path, meta: Meta) -> None:
    """Remove the folders of this table's processes, and in them only the files that were written."""
    for folder in process_folders(out):
        if (folder / META).is_file() and read_meta(folder).settings != meta.settings:
            continue
        remove_partial_files(folder)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # it holds something else, too
            folder.rmdir()


def _finished(folder: Path, meta: Meta) -> bool:
    begun = read_begun(folder, meta)
    return begun is not None and begun.complete
