"""What the kernels' machine code does on GPUs that are not here: spills, widths, registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed (Linux x86-64 only)")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run_compiled(script: Path, *arguments: str | Path) -> Any:
    """What ``script`` prints as JSON, in a process where Triton compiles, not interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def specimens() -> Any:
    return run_compiled(Path(__file__).with_name("aot_specimens.py"), BENCHMARKS)


def test_widths_of_loads_and_stores_are_read(specimens: Any) -> None:
    assert specimens["copy"]["loads"] == specimens["copy"]["stores"] == {"128": 1}
    for narrow in ("copy of unaligned pointers", "copy of odd rows"):
        assert specimens[narrow]["loads"] == specimens[narrow]["stores"] == {"32": 4}


def test_registers_and_spills_are_read(specimens: Any) -> None:
    assert specimens["hoard"]["spills"] == 0
    assert specimens["hoard"]["registers"] > 64  # 8192 values on 128 threads
    assert specimens["hoard in few registers"]["registers"] == 32
    assert specimens["hoard in few registers"]["spills"] > 64


def test_arithmetic_in_fp64_is_seen(specimens: Any) -> None:
    assert specimens["scale in fp32"]["fp64"] == 0
    assert specimens["scale in fp64"]["fp64"] > 0


def test_the_loops_are_found(specimens: Any) -> None:
    first, second = specimens["two sweeps"]["loops"]
    assert first["store_bytes"] == 0 < first["load_bytes"]
    assert second["store_bytes"] == second["load_bytes"] > 0
    for loop in (first, second):
        assert 0 < loop["instructions"] < specimens["two sweeps"]["instructions"]
    assert specimens["copy"]["loops"] == []
