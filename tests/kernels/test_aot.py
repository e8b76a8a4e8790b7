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

pytestmark = [pytest.mark.slow, pytest.mark.compat]

ROOT = Path(__file__).parents[2]


def run_compiled(*command: str | Path) -> Any:
    """What a program prints as JSON, in a process where Triton compiles, not interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def specimens() -> Any:
    return run_compiled(Path(__file__).parents[1] / "support" / "aot_specimens.py", ROOT)


def test_widths_of_loads_and_stores_are_read(specimens: Any) -> None:
    wide = specimens["copy"]["whole"]
    assert wide["loads"] == wide["stores"] == {"128": 1}
    for name in ("copy of unaligned pointers", "copy of odd rows"):
        narrow = specimens[name]["whole"]
        assert narrow["loads"] == narrow["stores"] == {"32": 4}


def test_registers_and_spills_are_read(specimens: Any) -> None:
    assert specimens["hoard"]["spills"] == 0
    assert specimens["hoard"]["registers"] > 64  # 8192 values on 128 threads
    assert specimens["hoard in few registers"]["registers"] == 32
    assert specimens["hoard in few registers"]["spills"] > 64


def test_arithmetic_in_fp64_is_seen(specimens: Any) -> None:
    assert specimens["scale in fp32"]["fp64"] == 0
    assert specimens["scale in fp64"]["fp64"] > 0


def test_products_fused_with_another_lanes_sum_are_seen(specimens: Any) -> None:
    assert specimens["norm"]["fused_sums"] == 1
    assert specimens["norm of rounded products"]["fused_sums"] == 0


def test_the_loops_are_found(specimens: Any) -> None:
    first, second = specimens["two sweeps"]["loops"]
    assert first["loads"] and not first["stores"]
    assert second["loads"] == second["stores"] == {"128": 1}
    for loop in (first, second):
        assert 0 < loop["instructions"] < specimens["two sweeps"]["whole"]["instructions"]
    assert specimens["copy"]["loops"] == []


def test_what_is_jumped_over_and_what_waits_for_a_barrier_are_found(specimens: Any) -> None:
    repair = specimens["repair if broken"]
    assert repair["seldom"] > 64  # 8 square roots and 8 quotients a thread
    assert repair["body"]["instructions"] > repair["seldom"]
    assert specimens["copy"]["seldom"] == 0
    assert repair["start"]["loads"] == {"128": 2}
    assert repair["body"]["loads"] == {"128": 4}


def test_the_body_ends_at_the_first_atomic_operation(specimens: Any) -> None:
    assert specimens["repair if broken"]["body"]["stores"] == {"128": 2}
    assert specimens["repair if broken"]["whole"]["stores"] == {"32": 1, "128": 2}
    assert specimens["copy"]["body"] == specimens["copy"]["whole"]


@pytest.fixture(scope="module")
def report() -> Any:
    """CI's part of benchmarks/results/aot.json, made anew."""
    return run_compiled("-m", "benchmarks.aot.report", "--quick", "--print")


def test_no_kernel_has_a_fault(report: Any) -> None:
    names = ("path", "students", "classes", "dtype", "options", "arch", "switch")
    faults = {tuple(row[n] for n in names): row["faults"] for row in report["kernels"]}
    assert len(faults) >= 20
    assert not {case: found for case, found in faults.items() if found}


def test_kernels_take_no_more_registers_than_the_committed_table_says(report: Any) -> None:
    committed = json.loads((ROOT / "benchmarks" / "results" / "aot.json").read_text())
    if report["triton"] != committed["triton"]:
        pytest.skip(f"the table is of Triton {committed['triton']}, this is {report['triton']}")
    names = ("path", "students", "classes", "dtype", "options", "arch", "switch")
    bounds = {tuple(row[n] for n in names): row["registers"] for row in committed["kernels"]}
    taken = {tuple(row[n] for n in names): row["registers"] for row in report["kernels"]}
    # A few more change nothing; a step of the occupancy is 8 at the least.
    above = {case: n for case, n in taken.items() if n > bounds[case] + 8}
    assert not above, "the code has changed: python -m benchmarks.aot.report"


def test_a_run_compiles_few_kernels_whatever_its_batch_sizes(report: Any) -> None:
    """Few programs, more, more that do not count labels themselves, and what counts them."""
    assert report["variants"]
    assert not {run: n for run, n in report["variants"].items() if not 1 <= n <= 4}


def test_every_launch_says_whether_products_and_sums_are_fused(report: Any) -> None:
    """Triton 3.9 warns where none does, and 3.10 changes the default."""
    assert report["fp_fusion_by_default"] == []
