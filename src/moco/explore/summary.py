"""What the folder of a run says, as words, tables and pictures; nothing is computed anew and no image is read."""

import base64
import csv
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from moco.config import PretrainConfig
from moco.evaluate.health import COLLAPSED_RANK, COLLAPSED_SPREAD
from moco.recipes import recipe_names, recipe_record
from moco.run import Run
from moco.variants import loss_range

TRAINED = "trained encoder"
MEASURES = {
    "knn_top1": "kNN, all labels",
    "one_label": "one label per class",
    "five_labels": "five labels per class",
}
PICTURES = {
    "views": (
        "What the model sees",
        "Each image is cropped and changed in two ways. The encoder learns to tell that two such views belong "
        "together. If you cannot tell it yourself, the views are too strong.",
    ),
    "neighbours": (
        "Neighbours",
        "Images that were not trained on, with those that the encoder finds most and least like them; the number is "
        "the cosine similarity of the features.",
    ),
    "map": (
        "Map",
        "All images on a plane (t-SNE). Near neighbours mean something; distances between groups, and how large a "
        "group is, do not.",
    ),
    "similarities": (
        "How alike views are",
        "Cosine similarity of projections, which is what the loss works on. The less the two heaps overlap, the better "
        "an image is known by its other view.",
    ),
}
"""Heading and words of each picture that may lie in the folder, as NAME.svg or NAME.png."""
MAX_ROWS = 200
"""Rows of metrics.csv that are shown; evenly spaced ones of more, and the last."""


class Cell(NamedTuple):
    """A number: as shown, as written in the file, and as a share of 100 for a bar."""

    text: str
    exact: str
    share: float


class Picture(NamedTuple):
    """A picture of the folder with its heading and words; `source` is a data URI."""

    name: str
    heading: str
    words: str
    source: str


class Evaluated(NamedTuple):
    """One file of `evaluations/`; `counts` as `moco.figures.confusion_matrix` takes them, or None."""

    name: str
    data: str
    figures: dict[str, float]
    per_class: dict[str, float]
    counts: list[list[int]] | None
    notes: list[str]


class Summary:
    """All that is known of a run, read when it is asked for.

    Args:
        run: finished or not.
    """

    def __init__(self, run: Run):
        self.run = run
        self.config: PretrainConfig = run.config

    @cached_property
    def table(self) -> list[dict[str, str]]:
        """metrics.csv as it is written; a row that is being written just now is left out."""
        try:
            text = (self.run.path / "metrics.csv").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        rows = csv.DictReader(text.splitlines())
        return [row for row in rows if None not in row and None not in row.values() and _numbers(row)]

    @cached_property
    def rows(self) -> list[dict[str, float]]:
        """The same as numbers; a value that was not taken at a step is absent."""
        return [{name: float(value) for name, value in row.items() if value} for row in self.table]

    @property
    def shown_rows(self) -> list[dict[str, str]]:
        number = len(self.table)
        step = max(1, -(-number // MAX_ROWS))
        return [row for place, row in enumerate(self.table) if (number - 1 - place) % step == 0]

    @cached_property
    def results(self) -> dict[str, dict[str, float]]:
        found = _json(self.run.path / "results.json")
        if not isinstance(found, dict):
            return {}
        return {who: _only_numbers(row) for who, row in found.items() if isinstance(row, dict)}

    @property
    def finished(self) -> bool:
        return TRAINED in self.results

    @property
    def measures(self) -> dict[str, str]:
        """Columns of the table of results, by their names in the file."""
        known = {name for row in self.results.values() for name in row}
        return {
            name: MEASURES.get(name, name) for name in [*MEASURES, *sorted(known - MEASURES.keys())] if name in known
        }

    def cell(self, who: str, measure: str) -> Cell | None:
        value = self.results.get(who, {}).get(measure)
        return None if value is None else Cell(f"{value:.1f}", repr(value), min(100.0, max(0.0, value)))

    @property
    def comparison(self) -> str:
        """Whether training was worth it, in a sentence."""
        own = self.results.get(TRAINED, {}).get("knn_top1")
        if own is None or not self.baselines:
            return ""
        gains = [f"{abs(own - level):.1f} points {_side(own - level)} {who}" for who, level in self.baselines.items()]
        return f"With all labels known, the trained encoder is {' and '.join(gains)}."

    @property
    def baselines(self) -> dict[str, float]:
        return {who: row["knn_top1"] for who, row in self.results.items() if who != TRAINED and "knn_top1" in row}

    @property
    def loss_range(self) -> tuple[float, float]:
        """Of an encoder that knows nothing, and the floor."""
        return loss_range(self.config.model, self.config.batch_size)

    @property
    def progress(self) -> str:
        if not self.rows:
            return "before the first numbers"
        last = self.rows[-1]
        return f"epoch {last.get('epoch', 0):.1f} of {self.config.epochs}, step {last['step']:,.0f}"

    @cached_property
    def environment(self) -> dict[str, Any]:
        found = _json(self.run.path / "environment.json")
        return found if isinstance(found, dict) else {}

    @cached_property
    def num_images(self) -> str:
        """As it was said before training."""
        try:
            text = (self.run.path / "log.txt").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        found = re.search(r"images: ([\d,]+); steps per epoch", text)
        return found[1] if found else ""

    @property
    def record(self) -> dict[str, str]:
        """What the recipe's header says, if the run is of a recipe of ours."""
        return recipe_record(self.config.recipe) if self.config.recipe in recipe_names() else {}

    @property
    def facts(self) -> dict[str, str]:
        """What was trained on what, in a few lines."""
        config, model = self.config, self.config.model
        images = f"{self.num_images} images of " if self.num_images else ""
        stem = ", small stem" if model.stem == "small" else ""
        start = (
            " from published weights" if model.pretrained else f" from {config.init_from}" if config.init_from else ""
        )
        queue = f"queue of {model.queue_size:,} keys, " if model.queue_size else ""
        optim = config.optim
        steps = f", stopped after {config.steps:,} steps" if config.steps else ""
        epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
        return {
            "Images": f"{images}{config.data.source}",
            "Views": f"{config.views.recipe}, {config.views.size} pixels a side",
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
        """The state in a word or two, and what the last numbers mean, in sentences."""
        if not self.rows:
            return "nothing measured yet", []
        last = {name: value for row in self.rows for name, value in row.items()}
        chance, floor = self.loss_range
        said = []
        if "loss" in last:
            said.append(
                f"The loss is {last['loss']:.2f}; {chance:.2f} would be chance and {floor:.2f} the floor, where views "
                "of an image agree and all other images are unrelated."
            )
        if "pretext_accuracy" in last:
            said.append(f"Of {last['pretext_accuracy']:.0f} % of the queries the own key was nearest of all.")
        if "spread" in last:
            said.append(f"The spread of the keys is {last['spread']:.2f}: 0 is collapsed, 1 even in all directions.")
        if "effective_rank" in last:
            said.append(
                f"The features use about {last['effective_rank']:.0f} directions (effective rank); next to 1 they "
                "would be collapsed. Compare it between runs on the same images."
            )
        if {"alignment", "uniformity"} <= last.keys():
            said.append(
                f"Alignment is {last['alignment']:.2f} (0: views of an image look the same to the encoder), uniformity "
                f"{last['uniformity']:.2f} (0 is collapsed; the lower, the more even)."
            )
        collapsed = last.get("spread", 1) < COLLAPSED_SPREAD or last.get("effective_rank", 9) <= COLLAPSED_RANK
        if collapsed:
            said.append(
                "All images look alike to the encoder. If it is past its first epochs: lower --optim.base_lr, raise "
                "--model.momentum, and leave --model.batchnorm on auto."
            )
        return "collapsed" if collapsed else "not collapsed", said

    @property
    def evaluations(self) -> list[Evaluated]:
        """In the order of their names; a file that is something else is left out."""
        found = (_evaluated(_json(path)) for path in sorted((self.run.path / "evaluations").glob("*.json")))
        return [each for each in found if each]

    @property
    def pictures(self) -> list[Picture]:
        """Those that lie in the folder, ready to be shown without it."""
        found = []
        for name, (heading, words) in PICTURES.items():
            for ending, kind, start in ((".svg", "svg+xml", b"<svg"), (".png", "png", b"\x89PNG")):
                path = self.run.path / f"{name}{ending}"
                content = path.read_bytes() if path.is_file() else b""
                if content.startswith(start):
                    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
                    found.append(Picture(name, heading, words, source))
                    break
        return found


def _side(gain: float) -> str:
    return "above" if gain >= 0 else "below"


def _evaluated(found: Any) -> Evaluated | None:
    try:
        counts, per_class = found["confusion"], found["per_class"]
        fits = counts and all(len(row) == len(counts) for row in counts) and len(counts) == len(per_class)
        whole = fits and all(isinstance(count, int) and count >= 0 for row in counts for count in row)
        return Evaluated(
            str(found["name"]),
            str(found["data"]),
            _only_numbers(found["figures"]),
            _only_numbers(per_class),
            counts if whole else None,
            [str(note) for note in found["notes"]],
        )
    except (AttributeError, KeyError, TypeError):
        return None


def _only_numbers(found: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _json(path: Path) -> Any:
    """None of a file that is not there, or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _numbers(row: dict[str, str]) -> bool:
    try:
        return all(value == "" or float(value) is not None for value in row.values()) and row["step"] != ""
    except (KeyError, ValueError):
        return False
