"""The settings of a run: as they are given, chosen from the images, or as it was begun."""

import logging
from pathlib import Path
from typing import Any

from moco.config import CONTINUABLE, DataConfig, PretrainConfig, fields, merge
from moco.data import GIVEN, Splits, as_images
from moco.parallel.fabric import processes, resolve
from moco.parallel.launch import launched
from moco.recipes import load_recipe
from moco.storage.run import Run
from moco.training.automatic import auto_config

log = logging.getLogger("moco")


def settle(
    config: str | Path | PretrainConfig | None, data: Any, earlier: Run | None, *, again: bool = False
) -> PretrainConfig:
    """The settings of a run, with every choice of the engine made.

    Args:
        config: name of a recipe, a YAML file or the settings; None: those of `earlier`, or chosen from `data`.
        data: images to use instead of the recipe's.
        earlier: the run to continue, if any.
        again: the settings `earlier` was begun with are given again.

    Raises:
        ValueError: they do not fit together, or `earlier` was begun with others.
    """
    by_name = isinstance(config, str | Path)
    if config is None:
        if earlier:
            earlier.refuse_code()
            config = earlier.config
        elif data is None:
            config = load_recipe("digits")
        else:
            where = DataConfig(source=str(data)) if isinstance(data, str | Path) else DataConfig()
            given = None if isinstance(data, str | Path) else Splits(as_images(data), None)
            config, reasons = auto_config(where, given)
            if launched().rank == 0:
                for reason in reasons:
                    log.info(reason)
    elif not isinstance(config, PretrainConfig):
        config = load_recipe(str(config))
    if data is not None:
        config = merge(config, {"data": {"source": str(data) if isinstance(data, str | Path) else GIVEN}})
    if earlier:
        config = _gone_on_with(config, earlier, left_open=again or by_name)
    return config.model_copy(update={"engine": resolve(config.engine)})


def _gone_on_with(config: PretrainConfig, earlier: Run, *, left_open: bool) -> PretrainConfig:
    """The settings of a run, updated with those that may change on resume; all others have to be the same as before.

    Args:
        config: settings to resume with.
        earlier: the run.
        left_open: whether a choice that is left open (none, `auto`) stays as it was made, of settings that may change.
    """
    changed: dict[str, Any] = {}
    for name in fields():
        section, _, key = name.rpartition(".")
        given, begun = (getattr(getattr(each, section) if section else each, key) for each in (config, earlier.config))
        if given == begun or key not in (getattr(config, section) if section else config).model_fields_set:
            continue
        if given in (None, "auto") and (left_open if name in CONTINUABLE else section == "engine"):
            continue
        if name not in CONTINUABLE:
            raise ValueError(
                f"{earlier.path} was begun with --{name} {begun}, now it is {given}; resume with the same settings, or "
                "give another --out"
            )
        changed |= {section: changed.get(section, {}) | {key: given}} if section else {key: given}
    return merge(earlier.config, changed)


def settle_here(config: PretrainConfig, earlier: Run, state: dict[str, Any]) -> PretrainConfig:
    """The settings to continue a run with on the number of processes there are now; `state`: its checkpoint."""
    if (config.data.cache is None) != (earlier.config.data.cache is None):
        raise ValueError(
            f"{earlier.path} was started {'with' if earlier.config.data.cache else 'without'} --data.cache, which "
            "changes the pixels that crops are made from; on resume, only the cache's folder may change"
        )
    here, nodes = processes(config.engine)
    if state.get("processes", 1) != here * nodes and config.engine.threads == earlier.config.engine.threads:
        engine = config.engine.model_copy(update={"threads": None})  # each gets another share of the cores
        config = config.model_copy(update={"engine": resolve(engine)})
    return config
