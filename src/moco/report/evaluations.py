"""The results that `moco evaluate` wrote into a run's folder."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HEADLINES = {"top1": "top-1", "top5": "top-5", "best_top1": "best top-1"}
"""Figures, in percent, that are mentioned in a sentence; all are in a table."""
MAX_CLASSES = 2_000
"""Most classes of a confusion matrix that is drawn."""


class Evaluated(NamedTuple):
    """A file in `evaluations/`; `counts` is the confusion matrix for `moco.figures.confusion_matrix`, or None."""

    name: str
    data: str
    figures: dict[str, float]
    per_class: dict[str, float]
    counts: np.ndarray | None
    notes: list[str]

    @property
    def of_health(self) -> bool:
        return self.name.partition("-")[0] == "health"

    @property
    def headlines(self) -> dict[str, float]:
        return {words: self.figures[name] for name, words in HEADLINES.items() if name in self.figures}


def evaluations(folder: Path) -> list[Evaluated]:
    """Return the evaluations in the order of their names; skip other files."""
    found = (_evaluated(path) for path in sorted(folder.glob("*.json")))
    return [each for each in found if each]


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def only_numbers(found: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _evaluated(path: Path) -> Evaluated | None:
    found = read_json(path)
    try:
        per_class = only_numbers(found["per_class"])
        return Evaluated(
            str(found["name"]),
            str(found["data"]),
            only_numbers(found["figures"]),
            per_class,
            _counts(found["confusion"], path, len(per_class)),
            [str(note) for note in found["notes"]],
        )
    except (AttributeError, KeyError, TypeError):
        return None


def _counts(given: Any, path: Path, number: int) -> np.ndarray | None:
    """Return the confusion matrix, which is in a separate file beside the JSON if there are many classes."""
    try:
        beside = path.with_name(f"{path.stem}.confusion.npy")
        counts = np.load(beside, allow_pickle=False) if given == beside.name else np.asarray(given)
    except (OSError, ValueError):
        return None
    whole = counts.dtype.kind in "iu" and counts.shape == (number, number) and 1 < number <= MAX_CLASSES
    return counts if whole and counts.min() >= 0 else None
