"""Pre-trains by a recipe on several processes of this machine, started by torchrun, and says what each took.

    uv run python benchmarks/processes.py imagenet-v2 --data .data/photos --batch 64 --steps 20
    uv run python benchmarks/processes.py imagenet-v3-vit-s --data .data/photos --batch 64 --steps 20

The command is the one of docs/many.md, with the batch made as small as a machine without a GPU asks for. Adds a row to
results/processes.csv: images a second and process while training (the median of the run's own rows but the first, in
which processes warm up), and the most memory that was held by a process and its readers, what they share counted once.
What follows the last of these steps, kNN and pictures, is not waited for.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import rows

ROW_EVERY = 4
LOOK_EVERY = 5.0
"""Seconds; adding up a process's pages takes some of its time."""
MIB = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="imagenet-v2")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=64, help="of all processes")
    parser.add_argument("--steps", type=int, default=20, help=f"a multiple of {ROW_EVERY}")
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(chosen.processes)]
        line += ["-m", "moco.cli", "pretrain", chosen.recipe, "--data", str(chosen.data), "--out", str(out)]
        # One more, which ends the run: it is left before its last kNN.
        line += ["--batch_size", str(chosen.batch), "--steps", str(chosen.steps + 1)]
        line += ["--monitor.log_every", str(ROW_EVERY)]
        started = subprocess.Popen([sys.executable, *line])
        most, metrics = dict[int, int](), list[dict[str, str]]()
        while not metrics or int(metrics[-1]["step"]) < chosen.steps:
            if started.poll() is not None:
                raise SystemExit(f"torchrun ended with {started.returncode}")
            for rank in children(started.pid):
                held = sum(proportional(each) for each in [rank, *children(rank)])
                most[rank] = max(most.get(rank, 0), held)
            time.sleep(LOOK_EVERY)
            if (out / "metrics.csv").is_file():
                with (out / "metrics.csv").open(newline="", encoding="utf-8") as file:
                    metrics = list(csv.DictReader(file))
        started.terminate()
        started.wait()
    speeds = [float(each["images_per_second"]) / chosen.processes for each in metrics[1:]]
    row = rows.where() | {
        "recipe": chosen.recipe,
        "processes": chosen.processes,
        "batch": chosen.batch,
        "steps": int(metrics[-1]["step"]),
        "images_per_second_each": round(statistics.median(speeds), 2),
        "data_wait_percent": round(statistics.median(float(each["data_wait"]) for each in metrics[1:]), 1),
        "mib_each": round(max(most.values()) / MIB),
        "loss_first": round(float(metrics[0]["loss"]), 3),
        "loss_last": round(float(metrics[-1]["loss"]), 3),
    }
    print(", ".join(f"{name} {value}" for name, value in row.items()))
    rows.append("processes", row)


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children")
    return [int(each) for each in found.read_text().split()] if found.exists() else []


def proportional(process: int) -> int:
    """KiB; memory that n processes share counts 1 / n for each."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    main()
