"""Evaluating an encoder: one protocol per file, and one contract (`moco.evaluate.contract`) for all."""

import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from moco.config import DataConfig, EvaluateConfig, parse_evaluation
from moco.data import load_data, with_labels
from moco.evaluate import finetune, health
from moco.evaluate import knn as nearest
from moco.evaluate import linear as probes
from moco.evaluate.contract import HeldOut, Outcome, Protocol, Report, Task, accuracies, confusion, held_out
from moco.evaluate.knn import knn
from moco.evaluate.record import Evaluation, name_of
from moco.messages import closest
from moco.parallel import collectives
from moco.parallel.device import choose_accelerator, choose_precision, own_device
from moco.parallel.fabric import met
from moco.parallel.launch import Launch, launched
from moco.storage.encoder_files import load_encoder, load_projector
from moco.storage.run import Run
from moco.views.specs import view_specs

__all__ = ["EVALUATIONS", "Evaluation", "HeldOut", "Outcome", "Protocol", "Task", "evaluate", "held_out", "knn"]

EVALUATIONS: Mapping[str, Protocol] = {
    "knn": nearest.PROTOCOL,
    "linear": probes.PROTOCOL,
    "finetune": finetune.PROTOCOL,
    "health": health.PROTOCOL,
}


def evaluate(
    source: str | Path,
    protocol: str = "knn",
    *,
    data: str | None = None,
    backbone: str | None = None,
    out: str | Path | None = None,
    settings: EvaluateConfig | Mapping[str, Any] | None = None,
    on_progress: Report | None = None,
) -> Evaluation:
    """Evaluate an encoder with a published protocol.

    Processes started by `torchrun` or `srun` share the work; each returns what one process would, up to rounding with
    the published forms of `linear`, and the first writes it.

    Args:
        source: folder of a run, or any checkpoint that `load_encoder` takes.
        protocol: a name in `EVALUATIONS`, or `package.module:function`, a function of your own: task -> outcome.
        data: labelled images with a training and a test part; not given: those of the run. Without a test part, every
            tenth training image is used as a test image and the others for training.
        backbone: name of the network, if it cannot be told from the checkpoint.
        out: folder for the results; not given: `evaluations/` of the run, or none for other checkpoints.
        settings: fields of `EvaluateConfig`; those not given are the protocol's.
        on_progress: called with what is being done, how much is done and how much there is.

    Returns:
        The results, also written to the folder if there is one.

    Raises:
        ValueError: the protocol or a setting is unknown or not used by it; images are missing, or their labels; or
            several processes cannot share the protocol.
        RuntimeError: the loss of a classifier or network became NaN or infinite.

    Example:
        >>> result = moco.evaluate("runs/first", "linear", settings={"form": "official"})     # doctest: +SKIP
        >>> result.name, sorted(result.figures)                                              # doctest: +SKIP
        ('linear-official', ['best_top1', 'top1', 'top5'])
    """
    definition = protocol_named(protocol)
    requested = settings if isinstance(settings, EvaluateConfig) else parse_evaluation(dict(settings or {}))
    definition.refuse_others(protocol, requested)
    run = Run.open(source) if (Path(source) / "config.yaml").is_file() else None
    resolved = _resolved(requested, definition, run)
    start = launched()
    _refuse_processes(start, protocol, definition, requested)
    leads = start.rank == 0 and collectives.rank() == 0
    device = own_device(resolved.accelerator)
    encoder = load_encoder(source, backbone=backbone).to(device)
    projector = _projector(run, definition, resolved, source, device)
    views = view_specs(run.config.views) if run and ":" not in run.config.views.recipe else None
    images = _images(run, data, encoder.channels, source)
    task = Task(encoder, projector, load_data(images), resolved, on_progress or (lambda *_: None), views, images)
    outcome = _measured(definition, protocol, task)
    of_run = run.config.data.source if run else None
    default_form = definition.default_form(encoder) if definition.default_form else None
    name = name_of(protocol, requested, default_form=default_form, data=data, own=of_run)
    folder = Path(out) if out else run.path / "evaluations" if run else None
    evaluation = _evaluation(name, data or of_run or "", outcome, task, folder)
    if leads:
        evaluation.write()
    return evaluation


def _measured(definition: Protocol, name: str, task: Task) -> Outcome:
    with met():
        outcome = definition.measure(task)
    if not isinstance(outcome, Outcome):
        raise ValueError(f"protocol {name!r} returns {outcome!r:.80}; expected a moco.evaluate.Outcome")
    return outcome


def _projector(
    run: Run | None, definition: Protocol, settings: EvaluateConfig, source: str | Path, device: str
) -> nn.Module | None:
    needed = settings.features == "projection"
    projector = load_projector(run) if run and (needed or definition.wants_projector) else None
    if needed and projector is None:
        raise ValueError(f"{source} holds no projector; expected the folder of a run, or leave out --features")
    return projector.to(device) if projector else None


def _refuse_processes(start: Launch, protocol: str, definition: Protocol, settings: EvaluateConfig) -> None:
    number = (start.per_node or 1) * (start.nodes or 1)
    if number > 1 and not definition.in_shares(settings):
        form = f" --form {settings.form}" if settings.form else ""
        raise ValueError(
            f"{number} processes cannot share --protocol {protocol}{form}; start one process (knn and linear, but for "
            "its form leftthomas, are shared)"
        )


def protocol_named(name: str) -> Protocol:
    """Look up a protocol in `EVALUATIONS`, or import a function or `Protocol` from `package.module:name`.

    Raises:
        ValueError: the name is unknown, or what it refers to cannot be imported or called.
    """
    if name in EVALUATIONS:
        return EVALUATIONS[name]
    if ":" not in name:
        raise ValueError(
            f"unknown protocol {name!r}: expected one of {', '.join(EVALUATIONS)}, or package.module:function"
            + closest(name, list(EVALUATIONS))
        )
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"protocol {name!r} cannot be imported ({error}); expected package.module:function on the Python path"
        ) from error
    if isinstance(found, Protocol):
        return found
    if not callable(found):
        raise ValueError(f"protocol {name!r} is {found!r:.80}; expected a function, task -> moco.evaluate.Outcome")
    return Protocol(found)


def _resolved(settings: EvaluateConfig, definition: Protocol, run: Run | None) -> EvaluateConfig:
    """Fill in settings from the run, the machine or a published form."""
    accelerator = choose_accelerator(settings.accelerator)
    chosen: dict[str, Any] = {"accelerator": accelerator}
    if settings.precision == "auto" and settings.form in definition.fp32:
        chosen["precision"] = "fp32"
    elif settings.precision == "auto":  # a run's accuracies were measured in its own precision, on its accelerator
        same = run is not None and run.config.engine.accelerator == accelerator
        own = run.config.engine.precision if run and same else "auto"
        chosen["precision"] = choose_precision(accelerator) if own == "auto" else own
    for name, of_run, published in (("k", "knn_k", 200), ("temperature", "knn_temperature", 0.1)):
        if name in definition.takes and getattr(settings, name) is None:
            chosen[name] = getattr(run.config.monitor, of_run) if run else published
    return settings.model_copy(update=chosen)


def _images(run: Run | None, data: str | None, channels: int, source: str | Path) -> DataConfig:
    if data is not None:
        return DataConfig(source=data, channels=channels)
    if run is None:
        raise ValueError(f"{source} is a checkpoint without images; give the images to evaluate it on with --data")
    return run.config.data


def _evaluation(name: str, data: str, outcome: Outcome, task: Task, folder: Path | None) -> Evaluation:
    figures, per_class, matrix = dict(outcome.figures), {}, None
    classes = with_labels(task.splits.train).classes or ()
    if outcome.scores is not None:
        labels = held_out(task.splits).test_labels if outcome.labels is None else outcome.labels
        figures = accuracies(outcome.scores, labels) | figures
        counts = confusion(outcome.scores, labels)
        names = [classes[i] if i < len(classes) else str(i) for i in range(len(counts))]
        totals = counts.sum(dim=1)
        per_class = {names[i]: 100 * int(counts[i, i]) / int(totals[i]) for i in range(len(counts)) if totals[i]}
        matrix, classes = counts.numpy(), tuple(names)
    settings = outcome.settings or task.settings
    return Evaluation(name, data, figures, per_class, matrix, classes, settings, outcome.notes, folder)
