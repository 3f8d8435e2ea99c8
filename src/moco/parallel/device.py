"""The device of this process, the precision it is fast in, and the memory it keeps."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from moco.parallel.launch import local_rank

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)
KEEP_BYTES = 2**31 - 1
"""The largest number that mallopt takes; only the free end of the heap is compared with it."""


def keep_freed_memory() -> None:
    """Let this process keep memory that it frees, if its C library is glibc; do nothing elsewhere.

    By default glibc requests every block of more than 32 MiB from the system anew, which clears it page by page: at
    batch size 256 a ResNet-18 causes hundreds of thousands of page faults a step (results/LOG.md). In return, the
    process holds about a quarter more memory than it uses at its peak.
    """
    if mallopt := _of_glibc("mallopt"):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, KEEP_BYTES)


def return_freed_memory() -> None:
    """Return free memory to the system; called after work that needs more or other memory than a step."""
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """Return a function of the C library; None if it has none of that name (musl), or not on Linux."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


Precision = Literal["fp32", "bf16", "fp64"]

BF16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")
"""Linux's names of the units that multiply bf16: AMX and AVX-512 on x86, and that of Arm."""


def cpu_flags() -> frozenset[str] | None:
    """Return the words of /proc/cpuinfo, among them what the processor supports; None if there is no such file."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().lower().split())
    except OSError:
        return None


def cpu_has_bf16() -> bool:
    """Return whether this processor multiplies bf16 natively."""
    return not (cpu_flags() or frozenset()).isdisjoint(BF16_UNITS)


def choose_accelerator(name: str) -> str:
    """Resolve `auto` to the fastest accelerator available."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def own_device(accelerator: str) -> str:
    """Return the device of this process; torchrun or SLURM give each process of a machine a device of its own."""
    name = choose_accelerator(accelerator)
    local = local_rank()
    # SLURM may show each task only its own GPU, hence the modulus.
    return name if name != "cuda" or local is None else f"cuda:{local % max(1, torch.cuda.device_count())}"


def choose_precision(accelerator: str) -> Precision:
    """Return bf16 where the hardware has it: 2 to 3 times as fast as fp32, with its range; weights stay fp32."""
    accelerator = choose_accelerator(accelerator)
    if accelerator == "cpu":
        return "bf16" if cpu_has_bf16() else "fp32"
    if accelerator in ("cuda", "gpu"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "fp32"
