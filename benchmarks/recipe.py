"""Trains a recipe with several seeds and adds a row for each to results/.

uv run python benchmarks/recipe.py cifar10-laptop --data CIFAR10_FOLDER --seeds 0 1 2
"""

import argparse
import tempfile
from pathlib import Path

import moco
import rows
from moco.config import merge
from moco.recipes import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("--data", help="where the recipe's images are")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--note", default="", help="what a reader of the row should know, of the images for example")
    options = parser.parse_args()
    for seed in options.seeds:
        config = merge(load_recipe(options.recipe), {"seed": seed})
        with tempfile.TemporaryDirectory() as folder:
            run = moco.pretrain(config, out=Path(folder) / "run", data=options.data)
            last, results = run.metrics[-1], run.results
        row = rows.where() | {
            "recipe": options.recipe,
            "seed": seed,
            "precision": run.config.engine.precision,
            "threads": run.config.engine.threads,
            "steps": int(last["step"]),
            "train_seconds": round(last["train_seconds"], 1),
            "cpu_seconds": round(last["cpu_seconds"], 1),
            "knn_k": config.monitor.knn_k,
            "knn_temperature": config.monitor.knn_temperature,
        }
        for who, figures in results.items():
            row |= {f"{who.split()[0]}_{name}": round(value, 2) for name, value in figures.items()}
        rows.append(options.recipe, row | {"note": options.note})
        print(f"seed {seed}: {results}, {last['train_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
