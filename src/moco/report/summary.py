"""The content of a run's folder as text, tables and pictures; nothing is computed again and no image is read."""

import csv
import re
from functools import cached_property
from typing import Any, NamedTuple

from moco.config import PretrainConfig
from moco.method.variants import loss_range
from moco.recipes import recipe_names, recipe_record
from moco.report.captions import Picture, asked, pictures
from moco.report.evaluations import Evaluated, evaluations, only_numbers, read_json
from moco.report.health_in_words import health
from moco.storage.run import Run

TRAINED = "trained encoder"
MEASURES = {
    "knn_top1": "kNN, all labels",
    "one_label": "one label per class",
    "five_labels": "five labels per class",
}
WITH_ARTICLE = {"untrained encoder": "the untrained encoder", "encoder at the start": "the encoder it started from"}
MAX_ROWS = 200
"""Most rows of metrics.csv that are shown: evenly spaced if there are more, and always the last."""


class Cell(NamedTuple):
    """A number: as shown, as written in the file, and limited to 0 to 100 for a bar."""

    text: str
    exact: str
    share: float


class Summary:
    """Everything known about a run, read on demand.

    Args:
        run: a run, finished or not.
    """

    def __init__(self, run: Run):
        self.run = run
        self.config: PretrainConfig = run.config

    @cached_property
    def table(self) -> list[dict[str, str]]:
        """The rows of metrics.csv as text; a row that is still being written is left out."""
        try:
            text = (self.run.path / "metrics.csv").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        rows = csv.DictReader(text.splitlines())
        return [row for row in rows if None not in row and None not in row.values() and _numbers(row)]

    @cached_property
    def rows(self) -> list[dict[str, float]]:
        """The rows of metrics.csv as numbers; values that were not measured at a step are absent."""
        return [{name: float(value) for name, value in row.items() if value} for row in self.table]

    @property
    def shown_rows(self) -> list[dict[str, str]]:
        number = len(self.table)
        step = max(1, -(-number // MAX_ROWS))
        return [row for place, row in enumerate(self.table) if (number - 1 - place) % step == 0]

    @cached_property
    def results(self) -> dict[str, dict[str, float]]:
        found = read_json(self.run.path / "results.json")
        if not isinstance(found, dict):
            return {}
        return {who: only_numbers(row) for who, row in found.items() if isinstance(row, dict)}

    @property
    def finished(self) -> bool:
        return TRAINED in self.results

    @property
    def measures(self) -> dict[str, str]:
        """Headings of the columns in the table of results, by their names in the file."""
        known = {name for row in self.results.values() for name in row}
        return {
            name: MEASURES.get(name, name) for name in [*MEASURES, *sorted(known - MEASURES.keys())] if name in known
        }

    def cell(self, who: str, measure: str) -> Cell | None:
        value = self.results.get(who, {}).get(measure)
        return None if value is None else Cell(f"{value:.1f}", repr(value), min(100.0, max(0.0, value)))

    @property
    def comparison(self) -> str:
        """A sentence that compares the trained encoder with the baselines."""
        own = self.results.get(TRAINED, {}).get("knn_top1")
        if own is None or not self.baselines:
            return ""
        gains = [
            f"{abs(own - level):.1f} points {'above' if own >= level else 'below'} {WITH_ARTICLE.get(who, who)}"
            for who, level in self.baselines.items()
        ]
        return f"With all labels, the trained encoder is {' and '.join(gains)}."

    @property
    def baselines(self) -> dict[str, float]:
        return {who: row["knn_top1"] for who, row in self.results.items() if who != TRAINED and "knn_top1" in row}

    @property
    def loss_range(self) -> tuple[float, float]:
        """The loss at chance level, and its floor."""
        return loss_range(self.config.model, self.config.batch_size)

    @property
    def progress(self) -> str:
        if not self.rows:
            return "before the first numbers"
        last = self.rows[-1]
        return f"epoch {last.get('epoch', 0):.1f} of {self.config.epochs}, step {last['step']:,.0f}"

    @cached_property
    def environment(self) -> dict[str, Any]:
        found = read_json(self.run.path / "environment.json")
        return found if isinstance(found, dict) else {}

    @cached_property
    def num_images(self) -> str:
        """The number of images, as logged before training."""
        try:
            text = (self.run.path / "log.txt").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        found = re.search(r"images: ([\d,]+); steps per epoch", text)
        return found[1] if found else ""

    @property
    def record(self) -> dict[str, str]:
        """The content of the recipe's header, if the run comes from a known recipe."""
        return recipe_record(self.config.recipe) if self.config.recipe in recipe_names() else {}

    @property
    def facts(self) -> dict[str, str]:
        """What was trained, and on what, by heading."""
        config, model = self.config, self.config.model
        images = f"{self.num_images} images of " if self.num_images else ""
        stem = "" if model.stem == "imagenet" else f", {model.stem} stem"
        start = (
            " from published weights" if model.pretrained else f" from {config.init_from}" if config.init_from else ""
        )
        queue = f"queue of {model.queue_size:,} keys, " if model.queue_size else ""
        optim = config.optim
        steps = f", stopped after {config.steps:,} steps" if config.steps else ""
        epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
        return {
            "Images": f"{images}{config.data.source}",
            "Views": f"{config.views.recipe}, {config.views.size} pixels wide",
            "Encoder": f"{model.backbone}{stem}{start}",
            "Method": f"MoCo {model.variant}, {queue}temperature {model.temperature:g}, "
            f"key momentum {model.momentum:g}",
            "Training": f"{epochs}, batches of {config.batch_size}{steps}; seed {config.seed}",
            "Optimizer": f"{optim.name}, base learning rate {optim.base_lr:g} ({optim.schedule}), "
            f"weight decay {optim.weight_decay:g}",
            "Machine": ", ".join(
                str(each) for each in (self.environment.get("device"), config.engine.precision) if each
            ),
        }

    @property
    def health(self) -> tuple[str, list[str]]:
        """The state in a word or two, and sentences on what the last metrics mean."""
        return health(self.rows, *self.loss_range)

    @cached_property
    def evaluations(self) -> list[Evaluated]:
        return evaluations(self.run.path / "evaluations")

    @property
    def asked(self) -> str:
        """Which images the accuracies are about, in a sentence or two."""
        return asked(self._facts)

    @property
    def pictures(self) -> list[Picture]:
        return pictures(self.run.path, self._facts)

    @cached_property
    def _facts(self) -> Any:
        return read_json(self.run.path / "pictures.json")


def _numbers(row: dict[str, str]) -> bool:
    try:
        return all(value == "" or float(value) is not None for value in row.values()) and row["step"] != ""
    except (KeyError, ValueError):
        return False
