"""Fine-tunes a run's encoder with a share of the labels, and the same network from random weights.

Both have the same labels, steps and augmentation; each adds a row to results/finetune.csv.

uv run python benchmarks/finetune.py RUN_OF_CIFAR10_LAPTOP --data CIFAR10_FOLDER --seeds 0 1 2
"""

import argparse
import time
from typing import Any

import torch

import rows
from moco.evaluate import evaluate
from moco.storage.run import Run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", help="folders of finished runs; one for all seeds, or one for each")
    parser.add_argument("--data", help="where the images are, if not where the run found them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of labels, batches and random weights")
    parser.add_argument("--labels", type=float, default=0.1)
    parser.add_argument("--lrs", type=float, nargs="+", default=[None], help="rates tried from both starts, per 256")
    parser.add_argument("--note", default="", help="what a reader of the row should know, of the images for example")
    options = parser.parse_args()
    if len(options.runs) not in (1, len(options.seeds)):
        parser.error(f"{len(options.runs)} runs for {len(options.seeds)} seeds; give one run, or one for each seed")
    runs = options.runs * len(options.seeds) if len(options.runs) == 1 else options.runs
    for seed, folder in zip(options.seeds, runs, strict=True):
        run = Run.open(folder)
        for lr in options.lrs:
            for from_scratch in (False, True):
                settings: dict[str, Any] = {
                    "labels": options.labels,
                    "from_scratch": from_scratch,
                    "seed": seed,
                    "lr": lr,
                }
                begin, begin_cpu = time.perf_counter(), time.process_time()
                found = evaluate(folder, "finetune", data=options.data, settings=settings)
                row = rows.where() | {
                    "recipe": run.config.recipe,
                    "run_seed": run.config.seed,
                    "seed": seed,
                    "start": "random" if from_scratch else "pre-trained",
                    "labels_percent": 100 * options.labels,
                    "lr": "" if lr is None else lr,
                    "precision": found.settings.precision,
                    "threads": torch.get_num_threads(),
                    "seconds": round(time.perf_counter() - begin, 1),
                    "cpu_seconds": round(time.process_time() - begin_cpu, 1),
                    "top1": round(found.figures["top1"], 2),
                    "top5": round(found.figures["top5"], 2),
                    "settings": found.notes[0],
                    "note": options.note,
                }
                rows.append("finetune", row)
                print(f"seed {seed}, {row['start']}: top-1 {row['top1']} %, {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
