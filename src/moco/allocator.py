"""On a CPU, memory freed in one step is kept for the next instead of being returned to the system."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)
KEPT = 2**31 - 1
"""Bytes of freed memory that are kept at most, the largest number that mallopt takes."""


def keep_freed_memory() -> None:
    """Changes how this process allocates, where its C library is glibc; does nothing elsewhere.

    By default glibc takes every block of more than 32 MiB from the system anew, which clears it page by page: at batch
    256 a ResNet-18 has hundreds of thousands of page faults a step (results/LOG.md).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, KEPT)
