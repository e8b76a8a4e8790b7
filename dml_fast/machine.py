"""Memory that a step frees is kept for the next one, where the C library would give it back."""

from __future__ import annotations

import ctypes
import os
import sys

# of malloc.h
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to reuse large blocks instead of unmapping them.

    By default each block over 32 MiB is mapped and unmapped anew, and every page of it costs a
    fault: steps of four MobileNet v1 had 175,000 to 460,000 faults and took 1.3 to 1.7 times as
    long (docs/log.md, 2026-11-24). The process then keeps the most memory that it ever needed.

    An environment that sets malloc's options, or another allocator by LD_PRELOAD, is left as it is.

    Returns:
        Whether it was told.
    """
    if not sys.platform.startswith("linux"):
        return False
    chosen = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if any(name.startswith(chosen) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    options = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_ARENA_MAX, 1))
    return all([mallopt(option, value) for option, value in options])
