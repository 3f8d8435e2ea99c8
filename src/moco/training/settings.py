"""The settings that a run starts with: as given, chosen from the images, or as the run was begun."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco.config import CONTINUABLE, DataConfig, PretrainConfig, fields, merge
from moco.data import GIVEN, Splits, as_images
from moco.parallel.fabric import processes, resolve
from moco.parallel.launch import launched
from moco.recipes import load_recipe
from moco.storage import checkpoint
from moco.storage.run import Run
from moco.training.automatic import auto_config

log = logging.getLogger("moco")


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        config: settings, with every choice of the engine made.
        path: folder of the run.
        resumed: the run to continue; None for a new one.
        state: its last checkpoint; None for a new run.
        official: training checkpoint of the official code that a new run continues.
    """

    config: PretrainConfig
    path: Path
    resumed: Run | None = None
    state: dict[str, Any] | None = None
    official: Path | None = None


def find_start(
    config: str | Path | PretrainConfig | None, data: Any, out: str | Path | None, resume: str | Path | None
) -> Start:
    """Find out what a run starts from, with arguments and errors as those of `pretrain`."""
    official = Path(resume) if resume is not None and Path(resume).is_file() else None
    if official and official.parent.name == "checkpoints" and (official.parent.parent / "config.yaml").is_file():
        run = official.parent.parent
        raise ValueError(f"{official} belongs to a run; to resume, give the run's folder: --resume {run}")
    if official and config is None:
        raise ValueError(f"{official} does not hold the settings it was trained with; give a recipe, too")
    same_folder = resume is not None and out is not None and Path(out) == Path(resume)
    unstarted = same_folder and not (Path(out or "") / "checkpoints" / "last.ckpt").is_file()
    resumed = None if resume is None or official or unstarted else Run.open(resume)
    if resumed and out is not None and not same_folder:
        raise ValueError(f"out is {out} and resume {resume}; a run continues in its own folder: omit out")
    chosen = choose_settings(config, data, resumed, given_again=same_folder)
    if resumed:
        state = checkpoint.load(resumed.last)
        return Start(_adapt_to_machine(chosen, resumed, state), resumed.path, resumed, state)
    path = Path(out) if out else _free_folder(chosen)
    # A run that was killed before its first checkpoint holds nothing that would be lost.
    if not (unstarted and (path / "config.yaml").is_file()):
        Run.refuse_taken(path)
    return Start(chosen, path, official=official)


def choose_settings(
    config: str | Path | PretrainConfig | None, data: Any, resumed: Run | None, *, given_again: bool = False
) -> PretrainConfig:
    """Return the settings of a run, with every choice of the engine made.

    Args:
        config: name of a recipe, a YAML file or the settings; None: those of `resumed`, or chosen from `data`.
        data: images to use instead of the recipe's.
        resumed: the run to continue, if any.
        given_again: whether the settings that `resumed` was begun with are given again.

    Raises:
        ValueError: they do not fit together, or `resumed` was begun with others.
    """
    by_name, named = isinstance(config, str | Path), isinstance(data, str | Path)
    if config is None and resumed:
        resumed.refuse_code()
        config = resumed.config
    elif config is None and data is not None:
        where = DataConfig(source=str(data)) if named else DataConfig()
        config = choose_automatically(where, None if named else Splits(as_images(data), None))
    elif not isinstance(config, PretrainConfig):
        config = load_recipe("digits" if config is None else str(config))
    if data is not None:
        config = merge(config, {"data": {"source": str(data) if named else GIVEN}})
    if resumed:
        config = _continued(config, resumed, left_open=given_again or by_name)
    return config.model_copy(update={"engine": resolve(config.engine)})


def choose_automatically(data: DataConfig, images: Splits | None = None) -> PretrainConfig:
    """Return settings that suit the images and the machine, and log the reason for each choice.

    Args:
        data: where the images are.
        images: the images themselves, if they are already in memory.
    """
    config, reasons = auto_config(data, images)
    for reason in reasons if launched().rank == 0 else ():
        log.info(reason)
    return config


def _continued(config: PretrainConfig, resumed: Run, *, left_open: bool) -> PretrainConfig:
    """Update the settings of a run with those that may change on resume; all others must be the same as before.

    Args:
        config: settings to resume with.
        resumed: the run.
        left_open: whether a choice that is left open (none, `auto`) stays as it was made, of settings that may change.
    """
    changed: dict[str, Any] = {}
    for name in fields():
        section, _, key = name.rpartition(".")
        new, begun = (getattr(getattr(each, section) if section else each, key) for each in (config, resumed.config))
        if new == begun or key not in (getattr(config, section) if section else config).model_fields_set:
            continue
        if new in (None, "auto") and (left_open if name in CONTINUABLE else section == "engine"):
            continue
        if name not in CONTINUABLE:
            raise ValueError(
                f"{resumed.path} was begun with --{name} {begun}, now it is {new}; resume with the same settings, or "
                "give another --out"
            )
        changed |= {section: changed.get(section, {}) | {key: new}} if section else {key: new}
    return merge(resumed.config, changed)


def _adapt_to_machine(config: PretrainConfig, resumed: Run, state: dict[str, Any]) -> PretrainConfig:
    """Return the settings to continue a run with on the number of processes there are now; `state`: its checkpoint."""
    if (config.data.cache is None) != (resumed.config.data.cache is None):
        raise ValueError(
            f"{resumed.path} was started {'with' if resumed.config.data.cache else 'without'} --data.cache, which "
            "changes the pixels that crops are made from; on resume, only the cache's folder may change"
        )
    here, nodes = processes(config.engine)
    if state.get("processes", 1) != here * nodes and config.engine.threads == resumed.config.engine.threads:
        engine = config.engine.model_copy(update={"threads": None})  # each process gets another share of the cores
        config = config.model_copy(update={"engine": resolve(engine)})
    return config


def _free_folder(config: PretrainConfig) -> Path:
    """Return runs/NAME, or runs/NAME-2 and so on if that is taken."""
    number, path = 1, Path("runs") / config.recipe
    while path.exists():
        number += 1
        path = Path("runs") / f"{config.recipe}-{number}"
    return path
