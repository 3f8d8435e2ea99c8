"""What the machine offers, and what a recipe needs."""

import os
import platform
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from moco.config import DataConfig, PretrainConfig
from moco.data import load_data
from moco.data.places.tar_index import SUFFIXES
from moco.data.sources.array_file import is_array_file
from moco.data.sources.file_list import count_listed, is_list
from moco.data.sources.named import cifar_folder
from moco.data.sources.stl10 import stl10_folder
from moco.method.variants import build_model
from moco.packages import version_of
from moco.parallel.device import BF16_UNITS, choose_precision, cpu_flags
from moco.parallel.launch import allowed_cores
from moco.recipes import load_recipe

# Training images of the sets that have a name; `digits` keeps the last fifth of each class for testing.
NAMED = {"digits": 1442, "cifar10": 50_000, "cifar100": 50_000, "stl10": 105_000, "imagenet": 1_281_167}
# Values that an optimizer keeps per weight, besides the weight and its gradient.
STATE = {"sgd": 1, "lars": 1, "adam": 2, "adamw": 2}


class Row(NamedTuple):
    """One row of the table that `moco doctor` prints."""

    name: str
    value: str
    note: str = ""


def examine(recipe: str | None = None) -> list[Row]:
    """Describe this machine and, given a recipe, roughly what it needs.

    Args:
        recipe: name of a recipe, or path of a YAML file.

    Raises:
        ValueError: no such recipe.
        FileNotFoundError: no such file.

    Example:
        >>> examine()[0].name
        'system'
    """
    config = load_recipe(recipe) if recipe else None
    return machine() + versions() + devices() + (needs(config) if config else [])


def machine() -> list[Row]:
    """Processor, memory and disk."""
    flags = cpu_flags()
    if flags is None:
        fast = Row("bf16 on CPU", "unknown on this system")
    elif "amx_bf16" in flags:
        fast = Row("bf16 on CPU", "AMX", "amx_bf16: a matrix unit; bf16 pays")
    elif "avx512_bf16" in flags:
        fast = Row("bf16 on CPU", "AVX-512", "avx512_bf16: vectors only; bf16 may pay")
    elif "bf16" in flags:
        fast = Row("bf16 on CPU", "Arm BF16", "bf16 pays")
    else:
        fast = Row("bf16 on CPU", "no", f"none of {', '.join(BF16_UNITS)}: bf16 would be emulated")
    total, free = _memory()
    disk = shutil.disk_usage(".").free
    return [
        Row("system", f"{platform.system()} {platform.machine()}", platform.release()),
        Row("CPU cores", str(allowed_cores()), f"of {os.cpu_count()}; torch uses {torch.get_num_threads()} threads"),
        Row("vector unit", torch.backends.cpu.get_cpu_capability(), "as torch sees it"),
        fast,
        Row("memory", _gib(total) if total else "unknown on this system", f"{_gib(free)} free" if free else ""),
        Row("disk", f"{_gib(disk)} free", "in the current folder" if disk > 2**31 else "little: a run may need 1 GiB"),
    ]


def versions() -> list[Row]:
    """Versions of Python and of the packages that training is built on."""
    rows = [Row("Python", platform.python_version())]
    for name in ("moco-ssl", "torch", "torchvision", "timm", "lightning-fabric"):
        if number := version_of(name):
            rows.append(Row(name, number))
        else:
            rows.append(Row(name, "not installed", "run from the source folder" if name == "moco-ssl" else "needed"))
    return rows


def devices() -> list[Row]:
    """Accelerators, and the precision that `--engine.precision auto` selects on each."""
    rows = []
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found:
        rows.append(Row("accelerator", found.type, f"{torch.accelerator.device_count()} of them"))
    else:
        rows.append(Row("accelerator", "none", "training runs on the CPU"))
    for kind in ("cpu", *([found.type] if found else [])):
        rows.append(Row("precision auto", str(choose_precision(kind)), f"on {kind}"))
    return rows


def needs(config: PretrainConfig) -> list[Row]:
    """Return what a run needs; figures are exact unless marked as an estimate."""
    rows = [Row("recipe", config.recipe)]
    count = num_images(config.data)
    if count is None:
        rows.append(
            Row("images", "not here", f"{config.data.source} is neither a known name nor a folder, list or array file")
        )
    else:
        steps = count // config.batch_size
        share = config.model.queue_size / count if count else 0.0
        rows.append(Row("images", f"{count:,}", config.data.source))
        rows.append(Row("steps", f"{steps * config.epochs:,}", f"{steps:,} per epoch, {config.epochs} epochs"))
        if steps == 0:
            rows[-1] = Row("steps", "0", f"fewer images than batch_size {config.batch_size}")
        if config.model.queue_size:
            note = "over 10 %: an image's own older keys are excluded" if share > 0.1 else ""
            rows.append(Row("queue", f"{share:.0%} of the images", note))
    query, everything, activations = sizes(config)
    held = memory_held(config, query, everything)
    views = 2 if config.model.symmetric or config.model.variant == "v3" else 1
    worked = (2 if config.engine.precision == "bf16" else 4) * activations * views * config.batch_size
    need = held + worked // config.optim.accumulate
    _, free = _memory()
    note = "estimate: weights, gradients, optimizer, queue, and activations of fp32"
    if free and need > free and not torch.accelerator.is_available():
        note = f"estimate; more than the {_gib(free)} free now: try --optim.accumulate {2 * config.optim.accumulate}"
    rows.append(Row("parameters", f"{query / 1e6:.1f} million", "query encoder with its head"))
    rows.append(Row("memory needed", _gib(need), note))
    return rows


def memory_held(config: PretrainConfig, query: int, everything: int) -> int:
    """Return the bytes that training holds throughout: weights, gradients, optimizer state and queue, in fp32.

    Args:
        config: settings of the run.
        query: parameters of the query encoder with its head.
        everything: parameters in all, key encoder and predictor included.
    """
    return 4 * (everything + query * (1 + STATE[config.optim.name]) + config.model.queue_size * config.model.dim)


def num_images(data: DataConfig) -> int | None:
    """Count the training images of a data set, folder, list or array file; None if unknown without a download.

    Files are counted by suffix or in the list, not opened; an array file is read.

    Raises:
        ValueError: a list or an array file that cannot be read.
    """
    if data.source in NAMED:
        return NAMED[data.source]
    folder = Path(data.source).expanduser()
    if is_array_file(data.source):
        return len(load_data(data).train)
    if is_list(data.source):
        return count_listed(folder)
    if not folder.is_dir():
        return None
    if stl10_folder(folder):
        return NAMED["stl10"]
    if cifar_folder(folder):
        return NAMED["cifar10"]  # CIFAR-100 has as many
    if (folder / "train").is_dir():
        folder = folder / "train"
    return sum(name.rpartition(".")[2].lower() in SUFFIXES for _, _, names in os.walk(folder) for name in names)


def sizes(config: PretrainConfig) -> tuple[int, int, int]:
    """Count parameters and activations on the meta device, which takes no memory and computes nothing.

    Returns:
        Parameters of the query encoder; parameters in all, key encoder and predictor included; and activations that one
        view of one image leaves for the backward pass.

    Raises:
        ValueError: unknown backbone, head or variant.
    """
    with torch.device("meta"):
        model = build_model(config.model.model_copy(update={"pretrained": False}), channels=config.data.channels)
    numbers = 0

    def count(part: nn.Module, given: object, result: object) -> None:
        nonlocal numbers
        numbers += result.numel() if isinstance(result, torch.Tensor) else 0

    backbone = model.query_encoder.get_submodule("backbone").eval()
    for part in backbone.modules():
        if not list(part.children()):
            part.register_forward_hook(count)
    backbone(torch.empty(1, config.data.channels, config.views.size, config.views.size, device="meta"))
    query = sum(weight.numel() for weight in model.query_encoder.parameters())
    return query, sum(weight.numel() for weight in model.parameters()), numbers


def _memory() -> tuple[int, int]:
    """Total and free memory in bytes, of the container if it is limited below the machine's; 0 if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0, 0
    table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    total, free = table["MemTotal"], table.get("MemAvailable", 0)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return total, free
    return min(total, limit), min(free, max(limit - used, 0))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
