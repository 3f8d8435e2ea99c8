"""Linear classification: `fast` on cached features beside 100 epochs of `leftthomas`, a row for each seed.

uv run python benchmarks/linear.py RUN --data CIFAR10_FOLDER --seeds 0 1 2
"""

import argparse
import time

import torch

import moco
import rows
from moco.config import DataConfig, EvaluateConfig
from moco.data import Splits, load_data
from moco.evaluate import Task
from moco.evaluate.contract import accuracies
from moco.evaluate.linear import evaluate
from moco.evaluate.linear_published import FORMS, LOOK_EVERY
from moco.method.encoder import ImageEncoder
from moco.parallel.device import choose_precision


def timed(encoder: ImageEncoder, splits: Splits, settings: EvaluateConfig) -> dict[str, float]:
    """Figures of a form, seconds in all, and seconds spent after the last features were there."""
    cached = begin = time.perf_counter()

    def report(what: str, done: int, total: int) -> None:
        nonlocal cached
        if what.startswith("features"):
            cached = time.perf_counter()

    task = Task(encoder, None, splits, settings, report)
    outcome = evaluate(task)
    assert outcome.scores is not None
    end = time.perf_counter()
    found = accuracies(outcome.scores, task.labelled().test_labels) | outcome.figures
    return found | {"seconds": end - begin, "seconds_after_caching": end - cached}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--data", default="cifar10", help="labelled images with a test part")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--form", default="leftthomas", choices=list(FORMS), help="what `fast` is compared with")
    parser.add_argument("--epochs", type=int, help="of the form; not given: as published")
    parser.add_argument("--images", type=int, help="so many of each part, to try this out; writes no row")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--note", default="", help="what a reader of the row should know, of the images for example")
    options = parser.parse_args()
    encoder = moco.load_encoder(options.run).to(options.accelerator)
    splits = load_data(DataConfig(source=options.data))
    if options.images:
        splits = Splits(*(part.select(torch.randperm(len(part))[: options.images]) for part in splits if part))
    precision = choose_precision(options.accelerator)
    for seed in options.seeds:
        settings = EvaluateConfig(accelerator=options.accelerator, precision=precision, seed=seed)
        fast = timed(encoder, splits, settings)
        # The published forms are in fp32, as what was published was.
        whole = settings.model_copy(update={"form": options.form, "epochs": options.epochs, "precision": "fp32"})
        slow = timed(encoder, splits, whole)
        best = next(name for name in slow if name.startswith("best_top1"))
        row = rows.where() | {
            "run": moco.Run.open(options.run).config.recipe,
            "accelerator": options.accelerator,
            "precision": f"{precision}, {options.form} fp32",
            "threads": torch.get_num_threads(),
            "train_images": len(splits.train),
            "seed": seed,
            "fast_top1": round(fast["top1"], 2),
            "fast_top5": round(fast["top5"], 2),
            "fast_lr": fast["lr"],
            "fast_weight_decay": fast["weight_decay"],
            "fast_seconds": round(fast["seconds"], 1),
            "fast_seconds_after_caching": round(fast["seconds_after_caching"], 1),
            "form": options.form,
            "epochs": options.epochs or FORMS[options.form].epochs,
            "last_top1": round(slow["top1"], 2),
            "last_top5": round(slow["top5"], 2),
            "best_top1": round(slow[best], 2),
            "best_of": "every epoch" if best == "best_top1" else f"every {LOOK_EVERY}th epoch and the last",
            "seconds": round(slow["seconds"], 1),
            "fast_minus_last": round(fast["top1"] - slow["top1"], 2),
            "note": options.note,
        }
        print(row, flush=True)
        if not options.images:
            rows.append("linear", row)


if __name__ == "__main__":
    main()
