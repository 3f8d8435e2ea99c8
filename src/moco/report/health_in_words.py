"""A run's health in words, from metrics.csv alone."""

from collections.abc import Sequence

from moco.evaluate.health import COLLAPSED_RANK, COLLAPSED_SPREAD

Rows = Sequence[dict[str, float]]

ENDS = 0.2
"""Fraction of the training so far over which the trend is described."""
MIN_ROWS = 3
"""Fewest rows from which a trend is described."""
TOLD = (
    ("loss", "the loss went from {:.3g} to {:.3g}"),
    ("knn_top1", "kNN accuracy from {:.1f} to {:.1f} %"),
    ("spread", "the spread of the keys from {:.2f} to {:.2f}"),
)


def health(rows: Rows, chance: float, floor: float) -> tuple[str, list[str]]:
    """Return the state in a word or two, and sentences on what the last metrics and their trend mean.

    Args:
        rows: rows of metrics.csv, without values that were not measured.
        chance: loss at chance level.
        floor: loss if positives were equal and negatives orthogonal.
    """
    if not rows:
        return "nothing measured yet", []
    last = {name: value for row in rows for name, value in row.items()}
    said = []
    if "loss" in last:
        said.append(
            f"The loss is {last['loss']:.2f}; {chance:.2f} would be chance and {floor:.2f} the floor, where views of "
            "an image agree and all other images are unrelated."
        )
    if "pretext_accuracy" in last:
        said.append(f"For {last['pretext_accuracy']:.0f} % of the queries, their own key was the nearest of all.")
    if "spread" in last:
        said.append(f"The spread of the keys is {last['spread']:.2f}: 0 is collapsed, 1 is uniform in all directions.")
    if "effective_rank" in last:
        said.append(
            f"The features use about {last['effective_rank']:.0f} directions (effective rank); a value near 1 means "
            "collapse. Compare it between runs on the same images."
        )
    if {"alignment", "uniformity"} <= last.keys():
        said.append(
            f"Alignment is {last['alignment']:.2f} (0: views of an image look the same to the encoder), uniformity "
            f"{last['uniformity']:.2f} (0 is collapsed; lower is more uniform)."
        )
    said += filter(None, [trend(rows)])
    collapsed = last.get("spread", 1) < COLLAPSED_SPREAD or last.get("effective_rank", 9) <= COLLAPSED_RANK
    if last.get("epoch", 0) < 1:
        seen = " So far, all images look alike to the encoder, which is common at first." if collapsed else ""
        return "too early to say", [f"Before the end of the first epoch, the numbers say little.{seen}", *said]
    if collapsed:
        said.append(
            "All images look alike to the encoder. Lower --optim.base_lr, raise --model.momentum, and leave "
            "--model.batchnorm on auto."
        )
    return "collapsed" if collapsed else "not collapsed", said


def trend(rows: Rows) -> str:
    """Return a sentence on the trend over the last fifth of the training so far; empty if it has too few rows.

    The values are those of its first and last row that have one.
    """
    end = rows[-1].get("epoch", 0.0)
    part = [row for row in rows if row.get("epoch", 0.0) >= (1 - ENDS) * end]
    if len(part) < MIN_ROWS:
        return ""
    found = []
    for name, words in TOLD:
        values = [row[name] for row in part if name in row]
        if len(values) > 1:
            found.append(words.format(values[0], values[-1]))
    if not found:
        return ""
    listed = found[0] if len(found) == 1 else f"{', '.join(found[:-1])}, and {found[-1]}"
    return f"Over the last fifth of the training so far (epochs {part[0]['epoch']:.1f} to {end:.1f}), {listed}."
