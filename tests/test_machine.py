"""Freed memory is kept, and a user's own choice of an allocator is left alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from dml_fast.machine import keep_freed_memory
print(keep_freed_memory())
def touch():
    torch.empty(48 * 2**20, dtype=torch.uint8).fill_(1)
for _ in range(30):  # glibc's memalign finds room between freed blocks only after a while
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(**environment: str) -> list[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_blocks_are_reused_without_page_faults() -> None:
    told, faults = run()
    if told == "False":
        pytest.skip("no mallopt in this C library")
    assert int(faults) < 20 * 600
    told, faults = run(MALLOC_TRIM_THRESHOLD_="131072")
    assert told == "False"
    assert int(faults) > 20 * 12_000  # each of the 12,288 pages, each time
