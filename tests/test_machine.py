"""Threads are counted by one rule; freed memory is kept, except where a user chose otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dml_fast.errors import UserError
from dml_fast.machine import cores

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


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_blocks_are_reused_without_page_faults() -> None:
    told, faults = run()
    if told == "False":
        pytest.skip("no mallopt in this C library")
    assert int(faults) < 20 * 600
    told, faults = run(MALLOC_TRIM_THRESHOLD_="131072")
    assert told == "False"
    assert int(faults) > 20 * 12_000  # each of the 12,288 pages, each time


@pytest.mark.parametrize(
    ("environment", "sharing", "alone"),
    [
        ({}, 8, 8),
        ({"DML_FAST_THREADS": ""}, 8, 8),
        ({"DML_FAST_THREADS": "3"}, 3, 3),
        ({"LOCAL_WORLD_SIZE": "4"}, 8, 8),  # no torchrun
        ({"WORLD_SIZE": "4"}, 2, 8),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 4, 8),
        ({"WORLD_SIZE": "3"}, 2, 8),
        ({"WORLD_SIZE": "16"}, 1, 8),
        ({"WORLD_SIZE": "4", "DML_FAST_THREADS": "20"}, 20, 20),
    ],
)
def test_one_rule_says_how_many_threads(
    environment: dict[str, str], sharing: int, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable is final; else the CPUs, which the ranks on one machine share if they must."""
    for name in ("DML_FAST_THREADS", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert (cores(), cores(shared=False)) == (sharing, alone)
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS and Windows
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert (cores(), cores(shared=False)) == (sharing, alone)


@pytest.mark.parametrize("name", ["DML_FAST_THREADS", "WORLD_SIZE", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_number_of_threads_or_ranks_that_is_none_is_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DML_FAST_THREADS", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}={value} is not a number of"):
        cores()
