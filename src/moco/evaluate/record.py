"""The results of an evaluation: how they are named, what is written, and where."""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moco.config import EvaluateConfig
from moco.data import DATASETS
from moco.evaluate.contract import replaced
from moco.figures import confusion_matrix, save
from moco.files import write_atomically

MAX_LISTED = 100
"""Largest number of classes whose confusion matrix is in the JSON itself; that of a thousand would be megabytes."""
MAX_WORD = 24
"""Most letters of a folder's name in the name of an evaluation."""
SHORT = {"features": "{}", "labels": "labels{}", "precision": "{}", "from_scratch": "scratch"}
"""How settings appear in the name of an evaluation, if not as their name and value."""


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        name: protocol, images and settings in one word, used to name the files.
        data: the images, as they were given.
        figures: figures by name; accuracies in percent.
        per_class: accuracy of each class in percent; empty without classes.
        confusion: number of test images of the row's class that were classified as the column's; or None.
        classes: names of the classes.
        settings: settings that were used; those that the protocol does not use have their defaults.
        notes: remarks for the user.
        folder: where `name`.json and, with classes, `name`.png are; None if nothing was written.
    """

    name: str
    data: str
    figures: dict[str, float]
    per_class: dict[str, float]
    confusion: np.ndarray | None
    classes: tuple[str, ...]
    settings: EvaluateConfig
    notes: tuple[str, ...]
    folder: Path | None

    @property
    def confusion_file(self) -> Path | None:
        """The .npy file of the confusion matrix if there are more than `MAX_LISTED` classes; otherwise None."""
        large = self.confusion is not None and len(self.confusion) > MAX_LISTED
        return self.folder / f"{self.name}.confusion.npy" if self.folder and large else None

    def record(self) -> dict[str, Any]:
        """Return the content of the JSON file, which `--json` prints.

        `confusion` is a list of rows or, with more than `MAX_LISTED` classes, the name of the file that holds them, if
        there is one. A figure that is NaN or infinite is None, because JSON has no such numbers.
        """
        confusion: Any = self.confusion_file.name if self.confusion_file else None
        if self.confusion is not None and len(self.confusion) <= MAX_LISTED:
            confusion = self.confusion.tolist()
        return {
            "name": self.name,
            "data": self.data,
            "figures": {name: value if math.isfinite(value) else None for name, value in self.figures.items()},
            "per_class": self.per_class,
            "classes": list(self.classes),
            "confusion": confusion,
            "notes": list(self.notes),
            "settings": self.settings.model_dump(mode="json"),
        }

    def mixups(self, most: int = 3) -> list[tuple[str, str, int]]:
        """Return the most frequent confusions, in order: class, class predicted instead, number of images."""
        if self.confusion is None:
            return []
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        places = np.argsort(-wrong, axis=None, kind="stable")[:most]
        pairs = [divmod(int(place), len(wrong)) for place in places]
        return [
            (self.classes[row], self.classes[column], int(wrong[row, column]))
            for row, column in pairs
            if wrong[row, column]
        ]

    def write(self) -> None:
        """Write the results into `folder`, the JSON last, so that the files it names exist."""
        if self.folder is None:
            return
        if self.confusion is not None and len(self.classes) > 1:
            save(confusion_matrix(self.confusion, self.classes, title=self.name), self.folder / f"{self.name}.png")
        if self.confusion_file and (counts := self.confusion) is not None:
            write_atomically(self.confusion_file, lambda file: np.save(file, counts, allow_pickle=False))
        text = json.dumps(self.record(), indent=2) + "\n"
        write_atomically(self.folder / f"{self.name}.json", lambda file: file.write(text.encode()))


def name_of(
    protocol: str, settings: EvaluateConfig, *, default_form: str | None, data: str | None, own: str | None
) -> str:
    """Name an evaluation in one word: the protocol, the images, and each setting that differs from its default.

    Args:
        protocol: name of the protocol.
        settings: the settings as given.
        default_form: default form of the protocol, which is left out.
        data: the images that were given.
        own: the images of the run, which are left out.
    """
    words = [protocol.replace(":", ".")]
    if settings.form and settings.form != default_form:
        words.append(settings.form)
    if data is not None and (own is None or _place(data) != _place(own)):
        words.append(_word(data))
    for name in replaced(settings):
        value = getattr(settings, name)
        if name not in ("form", "accelerator"):  # the device changes nothing but rounding
            words.append(
                SHORT.get(name, name + "{}").format(_said(round(100 * value, 9) if name == "labels" else value))
            )
    return "-".join(words)


def _said(value: object) -> object:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else value


def _place(data: str) -> str:
    return data if data in DATASETS else str(Path(data).expanduser().absolute())


def _word(data: str) -> str:
    """Return a known data set by its name, a folder by its own name and a hash of its location."""
    if data in DATASETS:
        return data
    place = _place(data)
    short = re.sub(r"[^A-Za-z0-9_.]+", "_", Path(place).name)[:MAX_WORD]
    return f"{short}-{hashlib.sha256(place.encode('utf-8', 'surrogateescape')).hexdigest()[:6]}"
