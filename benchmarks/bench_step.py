"""Compare one step of a cohort: our executors, loops that users write, a package from PyPI.

    python -m benchmarks.bench_step [--arch resnet32 ...] [--contestants ...] [--json FILE]
    pytest benchmarks/bench_step.py --benchmark-only

Use the script to compare: contestants take turns within one run, each with all cores, and each must
first give the losses of the naive loop in fp32, before and after one update. On a CPU on which
others work, use ``--threads 1``: it counts the CPU time of one thread. pytest-benchmark times one
after the other on a small cohort; it shows that each runs. ``torch.compile`` takes a minute or more
for each architecture, so it needs ``--compile``, or DML_FAST_BENCH=all for pytest.

On a GPU a graph is timed by CUDA events over 20 replays. Other steps are timed by a wall clock, 3
in a row and then a wait. That is what a user pays: the host's time or the device's, the longer one.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import clocks, counting, tables, timing
from benchmarks.common.machine import installed, provenance
from benchmarks.common.step_case import (
    DTYPES,
    HOUR,
    INDEPENDENT,
    Step,
    StepCase,
    is_baseline,
    is_replay,
    names,
    precision,
)
from benchmarks.common.tables import Column
from benchmarks.peers.loss import COMPILE, AbsentError
from dml_fast.machine import keep_freed_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EVERYTHING = os.environ.get("DML_FAST_BENCH") == "all"
NAIVE = "naive fp32"
REPLAYS, STEPS = 20, 3  # in one reading, on a GPU
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # of a loss of about 4.6, relative


@pytest.mark.parametrize("name", names(DEVICE))
def bench_step(benchmark: Any, name: str) -> None:
    """Time one contestant on a small cohort."""
    if COMPILE in name and not EVERYTHING:
        pytest.skip("compiling takes a minute: DML_FAST_BENCH=all, or the script with --compile")
    case = StepCase("resnet8", 2, 32, DEVICE)
    try:
        step = case.contestant(name)
    except AbsentError as reason:
        pytest.skip(str(reason))
    assert is_right(two_losses(step), two_losses(case.contestant(NAIVE)), name)
    benchmark.group = f"step of 2 resnet8, batch 32, {DEVICE.type}"
    flops = case.flops()
    benchmark.extra_info["flops"] = flops
    benchmark.extra_info.update(work_of(name, step))
    benchmark.pedantic(waiting(step), rounds=5, warmup_rounds=1)
    benchmark.extra_info["gflop_per_s"] = flops / benchmark.stats["min"] / 1e9


def two_losses(step: Step) -> Tensor:
    """(2, K): before the first update, and after it."""
    return torch.stack([step().cpu().float(), step().cpu().float()])


def is_right(losses: Tensor, expected: Tensor, name: str) -> bool:
    """Return whether its losses are the naive loop's, if it has as many students and teaches."""
    if INDEPENDENT in name or losses.shape != expected.shape:
        return bool(torch.isfinite(losses).all())
    return torch.allclose(losses, expected, rtol=TOLERANCE[precision(name)])


def waiting(step: Step) -> Step:
    """The step and a wait for the device."""

    def call() -> Tensor:
        losses = step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return losses

    return call


def work_of(name: str, step: Step) -> dict[str, int | None]:
    """Kernels launched; on a CPU operators run, bytes they read and write, and the peak."""
    if DEVICE.type == "cuda":
        found = counting.launched(step)
        count = {} if found is None else {"kernels": found.kernels, "moves": found.moves}
        return {**count, "peak_bytes": counting.device_bytes(step)}
    if COMPILE in name or name.startswith("threads"):
        return {}  # the dispatcher sees into neither
    work = counting.work(step)
    return {"operators": work.operators, "bytes": work.moved, "peak_bytes": work.peak}


def matrix_gflop_per_s(dtype: torch.dtype, stopwatch: timing.Stopwatch) -> float:
    """The rate of a square matrix product, median of ten; of one where a product takes a second.

    A CPU without instructions for bf16 takes that long for 1,024 rows.
    """
    size = 2048 if DEVICE.type == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=DEVICE)
    product = functools.partial(torch.mm, a, a)
    product()
    taken_ms = [stopwatch(product).ms]
    while len(taken_ms) < 10 and taken_ms[0] < 1e3:
        taken_ms.append(stopwatch(product).ms)
    return 2 * size**3 / statistics.median(taken_ms) / 1e6


def compare(
    case: StepCase, wanted: Sequence[str], budget_s: float, cpu_time: bool = False
) -> dict[str, Any]:
    """Time the contestants, which take turns; ``cpu_time``: by the CPU time of this thread."""
    expected = two_losses(case.contestant(NAIVE))
    steps: dict[str, Step] = {}
    rows: list[dict[str, Any]] = []
    for name in wanted:
        row: dict[str, Any] = {"name": name}
        rows.append(row)
        try:
            if cpu_time and name.startswith("threads"):
                raise AbsentError("it works in other threads, whose CPU time is not counted")
            step = case.contestant(name)
            losses = two_losses(step)
            if not is_right(losses, expected, name):
                row["failed"] = f"losses {losses.tolist()} for {expected.tolist()}"
                continue
            row |= work_of(name, step)
        except AbsentError as reason:
            row["left_out"] = str(reason)
        except Exception as error:  # a peer's fault must not lose the others' results
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            steps[name] = step
    on_cpu = DEVICE.type == "cpu"
    before = None if on_cpu else clocks.read()
    stopwatch: timing.Stopwatch = timing.thread_time if cpu_time else timing.wall_time
    if not on_cpu:
        stopwatch = timing.DeviceTime(cold=False)
    copies = [timing.copy_gb_per_s(DEVICE, stopwatch)]
    rates = {
        kind: matrix_gflop_per_s(DTYPES[kind] or torch.float32, stopwatch)
        for kind in sorted({precision(name) for name in steps})
    }
    turns, together = {}, {}
    for name, step in steps.items():
        together[name] = REPLAYS if is_replay(name) else 1
        own = None if on_cpu or is_replay(name) else timing.back_to_back(STEPS)
        turns[name] = timing.Turn(timing.repeated(step, together[name]), stopwatch=own)
    rounds = (3 if on_cpu else timing.ROUNDS["cuda"][0], 100)
    samples = timing.interleaved(turns, stopwatch, budget_s, rounds, warm_up=1)
    copies.append(timing.copy_gb_per_s(DEVICE, stopwatch))
    flops = case.flops()
    figures = {name: timing.figures(readings, together[name]) for name, readings in samples.items()}
    for row in rows:
        if (name := row["name"]) not in figures:
            continue
        row |= figures[name]
        row["gflop_per_s"] = flops * case.count(name) / case.students / row["median_ms"] / 1e6
        row["of_matrix"] = row["gflop_per_s"] / rates[precision(name)]
        if moved := row.get("bytes"):
            row["gb_per_s"] = moved / row["median_ms"] / 1e6
            row["of_copy"] = row["gb_per_s"] / statistics.median(copies)
        if NAIVE in figures:
            row["naive_over_this"] = figures[NAIVE]["median_ms"] / row["median_ms"]
    result = {
        "arch": case.arch,
        "students": case.students,
        "batch": case.batch,
        "cpu_time": cpu_time,
        "rounds": len(next(iter(samples.values()), [])),
        "flops": flops,
        "copy_gb_per_s": statistics.median(copies),
        "matrix_gflop_per_s": rates,
        "contestants": rows,
    }
    if before is not None:
        result["clocks"] = {"before": before, "after": clocks.read()}
    return result


COLUMNS = [
    tables.BEST,
    tables.NAIVE,
    Column("median_ms", "median ms"),
    Column("min_ms", "min ms"),
    Column("host_ms", "host ms"),
    Column("gflop_per_s", "GFLOP/s", style=".0f"),
    Column("of_matrix", "of matrix %", 100, ".0f"),
    Column("of_copy", "of copy %", 100, ".0f"),
    Column("operators", "operators", style="d"),
    Column("kernels", "kernels", style="d"),
    Column("moves", "copies and fills", style="d"),
    Column("peak_bytes", "peak MiB", 2**-20, ".0f"),
]
NO_HOUR = (
    'Measured before the contestant "hour" existed, which is what a good engineer writes in an '
    "hour: the best baseline of this table is a weaker one."
)


def describe(result: dict[str, Any]) -> str:
    """Return a result as Markdown: a table, which are missing and why."""
    rows = result["contestants"]
    best = tables.best(rows, is_baseline, "median_ms")
    clock = ", CPU time of one thread" if result.get("cpu_time") else ""
    caveats = []
    if not any(row["name"].startswith(HOUR) and "median_ms" in row for row in rows):
        caveats.append(NO_HOUR)
    return "\n\n".join(
        [
            tables.prose(
                f"{result['students']} x {result['arch']}, batch {result['batch']}, 3 x 32 x 32, "
                f"100 classes; {result['rounds']} rounds in turns{clock}; the best baseline: "
                f"{best['name'] if best else 'none'}"
            ),
            tables.describe(tables.compared(rows, is_baseline), COLUMNS),
            *map(tables.prose, [*caveats, *tables.remarks(result)]),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each architecture; 1 if a contestant failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = names(DEVICE)
    parser.add_argument("--arch", nargs="+", default=["resnet32", "mobilenet_v1"])
    parser.add_argument("--students", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--contestants", nargs="+", choices=known)
    parser.add_argument("--compile", action="store_true", help="also those that are compiled")
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument(
        "--threads",
        type=int,
        help="on a CPU; with 1 its CPU time counts, which other work on the machine changes little",
    )
    parser.add_argument("--budget", type=float, default=60, help="seconds of timing a table")
    args = parser.parse_args(argv)
    wanted = args.contestants or [n for n in known if args.compile or COMPILE not in n]
    keep_freed_memory()  # as dml_fast.train does; all contestants gain from it
    cpu_time = DEVICE.type == "cpu" and args.threads == 1
    if DEVICE.type == "cpu" and args.threads:
        torch.set_num_threads(args.threads)
    report = {"benchmark": "step", **provenance(DEVICE), "results": []}
    report["versions"]["pytorch-dml"] = installed("pytorch-dml")
    print(f"{report['machine']['device']}, torch {report['versions']['torch']}, "
          f"{report['machine']['torch_threads']} threads, {report['date']}")  # fmt: skip
    for arch in args.arch:
        torch.compiler.reset()
        case = StepCase(arch, args.students, args.batch, DEVICE)
        result = compare(case, wanted, args.budget, cpu_time)
        report["results"].append(result)
        print(f"\n{describe(result)}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any("failed" in row for r in report["results"] for row in r["contestants"]))


if __name__ == "__main__":
    sys.exit(main())
