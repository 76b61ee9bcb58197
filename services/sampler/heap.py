"""What the C library keeps of host memory that was freed.

glibc gives every thread a heap of its own and returns only what lies free at its end: after a hundred pictures in a
dozen threads that is hundreds of MB, in each sampler of a host. Other C libraries have neither call.
"""

from __future__ import annotations

import ctypes
import os

HEAP_COUNT = 2
_M_ARENA_MAX = -8  # malloc.h


def share_heaps() -> None:
    """Let threads share a few heaps; before there are threads. MALLOC_ARENA_MAX in the environment has its way."""
    libc = ctypes.CDLL(None)
    if "MALLOC_ARENA_MAX" not in os.environ and hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, HEAP_COUNT)


def give_back() -> None:
    """Return to the kernel what is free, wherever it lies; takes a few milliseconds."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
