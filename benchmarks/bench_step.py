"""Compare one step of a cohort: our executors, the loop that users write, a package from PyPI.

    python -m benchmarks.bench_step [--arch resnet32 ...] [--contestants ...] [--json FILE]
    pytest benchmarks/bench_step.py --benchmark-only

Use the script to compare: contestants take turns within one run, each with all cores, and each must
first give the losses of the naive loop in fp32, before and after one update. pytest-benchmark times
one after the other on a small cohort; it shows that each runs. ``torch.compile`` takes a minute for
each architecture, so it needs ``--compile``, or DML_FAST_BENCH=all for pytest.
"""

from __future__ import annotations

import argparse
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

from benchmarks.common import counting, timing
from benchmarks.common.machine import installed, provenance
from benchmarks.common.step_case import DTYPES, INDEPENDENT, Step, StepCase, names
from benchmarks.peers.loss import COMPILE, AbsentError
from dml_fast.machine import keep_freed_memory
from dml_fast.reporting.markdown import table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EVERYTHING = os.environ.get("DML_FAST_BENCH") == "all"
NAIVE = "naive fp32"
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
    kind = name.removesuffix(COMPILE).split(" ")[1]
    return torch.allclose(losses, expected, rtol=TOLERANCE[kind])


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
        return {"kernels": counting.kernels(step), "peak_bytes": counting.device_bytes(step)}
    if COMPILE in name or name.startswith("threads"):
        return {}  # the dispatcher sees into neither
    work = counting.work(step)
    return {"operators": work.operators, "bytes": work.moved, "peak_bytes": work.peak}


def matrix_gflop_per_s(dtype: torch.dtype, size: int = 2048) -> float:
    """The rate of a square matrix product, median of ten."""
    a = torch.ones(size, size, dtype=dtype, device=DEVICE)
    stopwatch = timing.wall_time if DEVICE.type == "cpu" else timing.device_time(cold=False)
    torch.mm(a, a)
    taken_ms = statistics.median(stopwatch(lambda: torch.mm(a, a)) for _ in range(10))
    return 2 * size**3 / taken_ms / 1e6


def compare(case: StepCase, wanted: Sequence[str], budget_s: float) -> dict[str, Any]:
    """Time the contestants, which take turns."""
    expected = two_losses(case.contestant(NAIVE))
    steps: dict[str, Step] = {}
    rows: list[dict[str, Any]] = []
    for name in wanted:
        row: dict[str, Any] = {"name": name}
        rows.append(row)
        try:
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
            steps[name] = waiting(step)
    copies = [timing.copy_gb_per_s(DEVICE, timing.wall_time)]
    rates = {kind: matrix_gflop_per_s(dtype or torch.float32) for kind, dtype in DTYPES.items()}
    turns = {name: timing.Turn(step) for name, step in steps.items()}
    samples = timing.interleaved(turns, timing.wall_time, budget_s, (3, 100), warm_up=1)
    copies.append(timing.copy_gb_per_s(DEVICE, timing.wall_time))
    flops = case.flops()
    for row in rows:
        if (taken := samples.get(row["name"])) is None:
            continue
        row["median_ms"], row["min_ms"] = statistics.median(taken), min(taken)
        kind = "bf16" if "bf16" in row["name"] else "fp32"
        share = 1 / case.students if row["name"].startswith("one") else 1
        row["gflop_per_s"] = share * flops / row["median_ms"] / 1e6
        row["of_matrix"] = row["gflop_per_s"] / rates[kind]
        if moved := row.get("bytes"):
            row["gb_per_s"] = moved / row["median_ms"] / 1e6
            row["of_copy"] = row["gb_per_s"] / statistics.median(copies)
        if NAIVE in samples:
            row["naive_over_this"] = statistics.median(samples[NAIVE]) / row["median_ms"]
    return {
        "arch": case.arch,
        "students": case.students,
        "batch": case.batch,
        "rounds": len(next(iter(samples.values()), [])),
        "flops": flops,
        "copy_gb_per_s": statistics.median(copies),
        "matrix_gflop_per_s": rates,
        "contestants": rows,
    }


COLUMNS = [  # key, heading, factor, format
    ("median_ms", "median ms", 1, ".0f"),
    ("min_ms", "min ms", 1, ".0f"),
    ("naive_over_this", "naive/this", 1, ".2f"),
    ("gflop_per_s", "GFLOP/s", 1, ".0f"),
    ("of_matrix", "of matrix %", 100, ".0f"),
    ("of_copy", "of copy %", 100, ".0f"),
    ("operators", "operators", 1, "d"),
    ("kernels", "kernels", 1, "d"),
    ("peak_bytes", "peak MiB", 2**-20, ".0f"),
]


def describe(result: dict[str, Any]) -> str:
    """Return a result as Markdown: a table, and which are missing and why."""
    timed = [row for row in result["contestants"] if "median_ms" in row]
    shown = [c for c in COLUMNS if any(row.get(c[0]) is not None for row in timed)]
    cells = [
        [
            row["name"],
            *(
                format(row[key] * factor, style) if row.get(key) is not None else "-"
                for key, _, factor, style in shown
            ),
        ]
        for row in timed
    ]
    missing = [
        f"- {row['name']}: {row.get('left_out') or 'FAILED, ' + row['failed']}"
        for row in result["contestants"]
        if "median_ms" not in row
    ]
    return "\n".join(
        [
            f"{result['students']} x {result['arch']}, batch {result['batch']}, 3 x 32 x 32, 100 "
            f"classes; {result['rounds']} rounds in turns:",
            "",
            table(["contestant", *(heading for _, heading, _, _ in shown)], cells),
            *(["", "Not timed:", *missing] if missing else []),
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
    parser.add_argument("--budget", type=float, default=60, help="seconds of timing a table")
    args = parser.parse_args(argv)
    wanted = args.contestants or [n for n in known if args.compile or COMPILE not in n]
    keep_freed_memory()  # as dml_fast.train does; all contestants gain from it
    report = {"benchmark": "step", **provenance(DEVICE), "results": []}
    report["versions"]["pytorch-dml"] = installed("pytorch-dml")
    print(f"{report['machine']['device']}, torch {report['versions']['torch']}, "
          f"{report['machine']['torch_threads']} threads, {report['date']}")  # fmt: skip
    for arch in args.arch:
        torch.compiler.reset()
        case = StepCase(arch, args.students, args.batch, DEVICE)
        result = compare(case, wanted, args.budget)
        report["results"].append(result)
        print(f"\n{describe(result)}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any("failed" in row for r in report["results"] for row in r["contestants"]))


if __name__ == "__main__":
    sys.exit(main())
