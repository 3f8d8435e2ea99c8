"""The device of this process, the precision it is fast in, and the memory it keeps."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from moco.parallel.launch import local_rank

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)
KEPT = 2**31 - 1
"""Bytes, the largest number that mallopt takes; it is compared with the free end of the heap alone."""


def keep_freed_memory() -> None:
    """Changes how this process allocates, where its C library is glibc; does nothing elsewhere.

    By default glibc takes every block of more than 32 MiB from the system anew, which clears it page by page: at batch
    256 a ResNet-18 has hundreds of thousands of page faults a step (results/LOG.md). The price: what lies free between
    blocks in use stays with the process, about a quarter more than it has at most in use.
    """
    if mallopt := _of_glibc("mallopt"):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, KEPT)


def return_freed_memory() -> None:
    """After work that needs more or other memory than a step: returns to the system what is free now."""
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None elsewhere, and of one that has no such function, as musl."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


Precision = Literal["fp32", "bf16", "fp64"]

BF16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")
"""What Linux calls the units that multiply bf16: AMX and AVX-512 on x86, and that of Arm."""


def cpu_flags() -> frozenset[str] | None:
    """What this processor says it can do; None where the system has no /proc/cpuinfo."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().lower().split())
    except OSError:
        return None


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 natively."""
    return not (cpu_flags() or frozenset()).isdisjoint(BF16_UNITS)


def choose_accelerator(name: str) -> str:
    """Resolve `auto` to the fastest accelerator available."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def own_device(accelerator: str) -> str:
    """The device of this process; processes that torchrun or SLURM starts on one machine have a device each."""
    name = choose_accelerator(accelerator)
    local = local_rank()
    # SLURM may show each of its tasks one GPU alone.
    return name if name != "cuda" or local is None else f"cuda:{local % max(1, torch.cuda.device_count())}"


def choose_precision(accelerator: str) -> Precision:
    """bf16 where the hardware has it: 2 to 3 times fp32's speed, same exponent range, weights stay fp32."""
    accelerator = choose_accelerator(accelerator)
    if accelerator == "cpu":
        return "bf16" if cpu_has_bf16() else "fp32"
    if accelerator in ("cuda", "gpu"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "fp32"
