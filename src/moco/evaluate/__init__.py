"""How good is an encoder? One protocol a file, one contract (`moco.evaluate.contract`) for all."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moco.checkpoint import load_encoder, load_projector
from moco.config import DataConfig, EvaluateConfig, parse_evaluation
from moco.data import load_data
from moco.engine import choose_accelerator, choose_precision
from moco.evaluate import finetune, health
from moco.evaluate import knn as nearest
from moco.evaluate import linear as probes
from moco.evaluate.contract import HeldOut, Outcome, Protocol, Report, Task, accuracies, confusion, held_out
from moco.evaluate.knn import knn
from moco.figures import confusion_matrix, save
from moco.run import Run, write_atomically
from moco.views import view_specs

__all__ = ["EVALUATIONS", "Evaluation", "HeldOut", "Outcome", "Task", "evaluate", "held_out", "knn"]

EVALUATIONS: Mapping[str, Protocol] = {
    "knn": nearest.evaluate,
    "linear": probes.evaluate,
    "finetune": finetune.evaluate,
    "health": health.evaluate,
}


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        name: protocol and settings in one word, which the files of the evaluation bear.
        figures: by name; accuracies in percent.
        per_class: accuracy of each class in percent; empty without classes.
        confusion: test images of the class of the row that were taken for the class of the column; or None.
        classes: names of the classes.
        settings: in force.
        notes: in words.
        folder: where `name`.json and, with classes, `name`.png are; None if nothing was written.
    """

    name: str
    figures: dict[str, float]
    per_class: dict[str, float]
    confusion: np.ndarray | None
    classes: tuple[str, ...]
    settings: EvaluateConfig
    notes: tuple[str, ...]
    folder: Path | None


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
    """Measures an encoder by a published protocol.

    Args:
        source: folder of a run, or any checkpoint that `load_encoder` takes.
        protocol: a name in `EVALUATIONS`.
        data: labelled images with a training and a test part; not given: those of the run. Without a test part, every
            tenth training image is asked about and the others answer.
        backbone: the network, where a foreign checkpoint does not say which it is.
        out: folder for the results; not given: `evaluations/` of the run, or none for other checkpoints.
        settings: fields of `EvaluateConfig`; what is not given is the protocol's.
        on_progress: called with what is being done, how much of it is done and how much there is.

    Raises:
        ValueError: unknown protocol or setting, a checkpoint without images, or images without labels.

    Example:
        >>> moco.evaluate("runs/first", "linear", settings={"form": "official"}).figures     # doctest: +SKIP
        {'top1': 86.3, 'top5': 99.6}
    """
    if protocol not in EVALUATIONS:
        near = difflib.get_close_matches(protocol, EVALUATIONS, n=1)
        raise ValueError(
            f"unknown protocol {protocol!r}: expected one of {', '.join(EVALUATIONS)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if not isinstance(settings, EvaluateConfig):
        settings = parse_evaluation(dict(settings or {}))
    run = Run.open(source) if (Path(source) / "config.yaml").is_file() else None
    settings = _resolved(settings, run)
    encoder = load_encoder(source, backbone=backbone).to(settings.accelerator)
    wanted = settings.features == "projection" or protocol == "health"
    projector = load_projector(run).to(settings.accelerator) if run and wanted else None
    if settings.features == "projection" and projector is None:
        raise ValueError(f"{source} holds no projector; expected the folder of a run, or leave out --features")
    views = view_specs(run.config.views) if run and ":" not in run.config.views.recipe else None
    splits = load_data(_images(run, data, encoder.channels, source))
    task = Task(encoder, projector, splits, settings, on_progress or (lambda *_: None), views)
    outcome = EVALUATIONS[protocol](task)
    folder = Path(out) if out else run.path / "evaluations" if run else None
    classes = splits.train.classes or ()
    found = _evaluation(_name(protocol, settings), outcome, splits, classes, settings, folder)
    if folder:
        _write(found, folder, data or (run.config.data.source if run else ""))
    return found


def _resolved(settings: EvaluateConfig, run: Run | None) -> EvaluateConfig:
    """With the choices made that are the run's or the machine's."""
    accelerator = choose_accelerator(settings.accelerator)
    chosen: dict[str, Any] = {"accelerator": accelerator}
    if settings.precision == "auto":  # a run's accuracies were taken in its own precision, where it ran
        same = run is not None and run.config.engine.accelerator == accelerator
        own = run.config.engine.precision if run and same else "auto"
        chosen["precision"] = choose_precision(accelerator) if own == "auto" else own
    for name, of_run, published in (("k", "knn_k", 200), ("temperature", "knn_temperature", 0.1)):
        if getattr(settings, name) is None:
            chosen[name] = getattr(run.config.monitor, of_run) if run else published
    return settings.model_copy(update=chosen)


def _images(run: Run | None, data: str | None, channels: int, source: str | Path) -> DataConfig:
    if data is not None:
        return DataConfig(source=data, channels=1 if channels == 1 else 3)
    if run is None:
        raise ValueError(f"{source} is a checkpoint without images; say with --data what to measure it on")
    return run.config.data


def _name(protocol: str, settings: EvaluateConfig) -> str:
    words = [protocol]
    words += [settings.form] if settings.form else []
    words += ["projection"] if settings.features == "projection" else []
    words += ["scratch"] if settings.from_scratch else []
    words += [f"labels{100 * settings.labels:g}"] if settings.labels < 1 else []
    words += [f"seed{settings.seed}"] if settings.seed else []
    return "-".join(words)


def _evaluation(
    name: str, outcome: Outcome, splits: Any, classes: tuple[str, ...], settings: EvaluateConfig, folder: Path | None
) -> Evaluation:
    figures, per_class, matrix = dict(outcome.figures), {}, None
    if outcome.scores is not None:
        labels = held_out(splits).test_labels
        figures = accuracies(outcome.scores, labels) | figures
        counts = confusion(outcome.scores, labels)
        names = [classes[i] if i < len(classes) else str(i) for i in range(len(counts))]
        totals = counts.sum(dim=1)
        per_class = {names[i]: 100 * int(counts[i, i]) / int(totals[i]) for i in range(len(counts)) if totals[i]}
        matrix, classes = counts.numpy(), tuple(names)
    return Evaluation(name, figures, per_class, matrix, classes, settings, outcome.notes, folder)


def _write(found: Evaluation, folder: Path, data: str) -> None:
    record = {
        "name": found.name,
        "data": data,
        "figures": found.figures,
        "per_class": found.per_class,
        "confusion": None if found.confusion is None else found.confusion.tolist(),
        "notes": list(found.notes),
        "settings": found.settings.model_dump(mode="json"),
    }
    text = json.dumps(record, indent=2) + "\n"
    write_atomically(folder / f"{found.name}.json", lambda file: file.write(text.encode()))
    if found.confusion is not None and len(found.classes) > 1:
        save(confusion_matrix(found.confusion, found.classes, title=found.name), folder / f"{found.name}.png")
