"""Writes the README's table of results from the rows in results/; a test compares the two.

uv run python benchmarks/tables.py
"""

import csv
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results:start -->\n", "<!-- results:end -->\n"
WHO = {"raw": "raw pixels", "untrained": "untrained encoder", "trained": "trained encoder"}
WHAT = {"knn_top1": "kNN", "one_label": "1 label per class", "five_labels": "5 labels per class"}


def rows(name: str) -> list[dict[str, str]]:
    path = ROOT / "results" / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def recipe_table(name: str, title: str) -> str:
    """Mean over the seeds of the latest commit that has rows, with the range where they differ."""
    found = rows(name)
    if not found:
        return ""
    found = [row for row in found if row["commit"] == found[-1]["commit"]]
    seconds = statistics.mean(float(row["train_seconds"]) for row in found)
    cpu = statistics.mean(float(row["cpu_seconds"]) for row in found)
    first = found[0]
    threads = "one thread" if first["threads"] == "1" else f"{first['threads']} threads"
    lines = [
        f"**{title}** (`moco pretrain {name}`): {first['steps']} steps, {seconds:.0f} s of training "
        f"({cpu:.0f} processor seconds) on {threads}, {first['processor']}, {len(found)} seeds."
        + (f" {first['note']}" if first["note"] else ""),
        "",
        "| accuracy, % | " + " | ".join(WHAT.values()) + " |",
        "|---|" + "---|" * len(WHAT),
    ]
    for who, words in WHO.items():
        cells = [_cell([float(row[f"{who}_{what}"]) for row in found]) for what in WHAT]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    spread = f" ({min(values):.1f} to {max(values):.1f})" if max(values) - min(values) >= 0.05 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def step_line() -> str:
    """The latest row of each processor."""
    latest = {row["processor"]: row for row in rows("step") if row.get("ratio")}
    if not latest:
        return ""
    said = [
        f"{name}: {row['images_per_second']} images/s, {row['outside_encoder_percent']} % of the time outside the "
        f"encoders' forward and backward, and {row['lightly_images_per_second']} images/s from lightly "
        f"{row['lightly']}'s building blocks, timed in turn: {row['ratio']} times as fast."
        for name, row in latest.items()
    ]
    row = next(iter(latest.values()))
    start = (
        f"**One training step** of a ResNet-18 with small-image stem, batch {row['batch']}, {row['threads']} threads. "
    )
    return start + " ".join(said) + "\n"


def block() -> str:
    """What stands between the README's markers."""
    parts = [
        recipe_table("digits", "Handwritten digits"),
        recipe_table("cifar10-laptop", "CIFAR-10 on two cores"),
        step_line(),
    ]
    return "\n" + "\n".join(part for part in parts if part) + "\n"


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    head, rest = text.split(START)
    path.write_text(head + START + block() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
