"""On a CPU, memory freed in one step is kept for the next instead of being returned to the system."""

import ctypes
import sys
from collections.abc import Callable

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
