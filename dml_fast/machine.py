"""What this machine has for this process: cores, memory, locks; and memory that malloc keeps.

What Windows lacks is used here alone, each with what is done there.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dml_fast.errors import UserError, reason

_log = logging.getLogger("dml_fast")

# of malloc.h
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1
_ONE_POSITION = threading.Lock()  # of every file, where reading at an offset moves it

MOST_THREADS = 1024  # csrc/parallel.hpp starts no more
_MOST_RANKS = 10**6


def cores(*, shared: bool = True) -> int:
    """Return how many threads this process may use at once.

    The environment variable ``DML_FAST_THREADS``, a number for each process, is final. Without it
    the number is that of the CPUs which the process may use (its affinity). If torchrun started
    several ranks on this machine, each takes an equal share of them, at least one.

    Args:
        shared: whether the other ranks on this machine work at the same time, as they do while they
            load data. False where they wait: rank 0 alone ranks a gallery, with all CPUs.

    Raises:
        UserError: ``DML_FAST_THREADS`` is not in 1..1024, or there is no number of ranks.
    """
    if os.environ.get("DML_FAST_THREADS"):
        return _positive(
            "DML_FAST_THREADS",
            MOST_THREADS,
            f"is not a number of threads: give 1 to {MOST_THREADS}",
        )
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, count // local_ranks()) if shared else count


def available_bytes() -> int:
    """Return how much memory is available without swapping.

    Where only all of it is known, that; where nothing is known, as if there were no bound.
    """
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def locked(folder: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Keep other processes from locking a folder while inside, or until this process ends.

    Where the platform or the file system has no locks, one line says so.

    Args:
        folder: it exists.
        busy: called if another process has locked it. Unless it raises, this waits for the lock.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        import fcntl
    except ImportError:
        _log.warning("this platform has no file locks: let one process at a time use %s", folder)
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            _log.warning(
                "%s cannot be locked (%s): let one process at a time use it", folder, reason(error)
            )
        yield
    finally:
        os.close(descriptor)


def read_at(descriptor: int, count: int, offset: int) -> bytes:
    """Read up to ``count`` bytes of an open file at an offset, also in several threads at once."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, count, offset)
    with _ONE_POSITION:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, count)


def sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk, so that renames in it survive a power failure."""
    if not hasattr(os, "O_DIRECTORY"):  # nor can a folder be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def local_ranks() -> int:
    """Return how many ranks torchrun started on this machine, 1 without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        return 1
    name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "WORLD_SIZE"
    problem = "is not a number of processes: start them with torchrun, which sets it"
    return _positive(name, _MOST_RANKS, problem)


def _positive(name: str, most: int, problem: str) -> int:
    text = os.environ[name]
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= most:
        raise UserError(f"{name}={text[:40]} {problem}")
    return int(text)


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
