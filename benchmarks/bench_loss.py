"""Compare our losses and gradients of a cohort with what a user would write or choose instead.

    python -m benchmarks.bench_loss [--shapes 4x128x100 ...] [--dtype float32] [--json FILE]
    pytest benchmarks/bench_loss.py --benchmark-only

Use the script to compare: contestants take turns within one run, and each is first checked against
the reference in float64, so that all do the same job. It prints a table for each shape and writes
a report. pytest-benchmark times one contestant after the other; it shows that each runs, and
roughly how fast.

On a CPU both leave out the shapes that take minutes: name them (``--shapes all``), or set
``DML_FAST_BENCH=all`` for pytest, which also lets it compile. The script uses one thread there and
counts its CPU time, unless you give ``--threads``.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import clocks, counting, tables, timing
from benchmarks.common.loss_case import DTYPES, SHAPES, LossCase
from benchmarks.common.machine import provenance
from benchmarks.common.tables import Column
from benchmarks.peers import loss as peers
from benchmarks.peers.loss import AbsentError, Contestant
from dml_fast.errors import UserError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EVERYTHING = os.environ.get("DML_FAST_BENCH") == "all"
CIFAR = SHAPES[:4]  # launches, not bytes, are what these cost
CPU_SHAPES = SHAPES[:5]
EAGER_CALLS = 20
MIB = 2**20


# ---------------------------------------------------------------- under pytest-benchmark


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: those of a busy machine wait for each other, sometimes for very long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.lru_cache(maxsize=1)
def problem(shape: tuple[int, int, int], dtype: str) -> LossCase:
    return LossCase(shape, DTYPES[dtype], DEVICE)


@pytest.mark.parametrize("name", peers.names())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    SHAPES if EVERYTHING or DEVICE.type == "cuda" else CIFAR,
    ids=lambda shape: "x".join(map(str, shape)),
)
def bench_loss(benchmark: Any, shape: tuple[int, int, int], dtype: str, name: str) -> None:
    """One contestant on one problem."""
    if peers.needs_compiling(name) and not EVERYTHING:
        pytest.skip("compiling all takes minutes: DML_FAST_BENCH=all, or the script")
    torch.compiler.reset()  # it gives up on a function that it has compiled 8 times
    case = problem(shape, dtype)
    try:
        contestant = peers.contestant(name, DEVICE, shape[0])
        case.restore()
        errors = case.errors(*contestant.run(case.logits, case.target))
    except (AbsentError, UserError) as reason:
        pytest.skip(str(reason))
    assert case.is_right(errors), errors

    def call() -> None:
        contestant.run(case.logits, case.target)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    case.restore()
    benchmark.group = f"mutual loss {shape} {dtype}"
    benchmark.extra_info["bytes"] = case.floor_bytes
    benchmark.extra_info.update(work_of(contestant, case))
    benchmark.pedantic(call, rounds=20 if shape in CIFAR else 5, warmup_rounds=3)


# ---------------------------------------------------------------- side by side


def work_of(contestant: Contestant, case: LossCase) -> dict[str, int | None]:
    """Kernels launched (on a CPU: operators run) and the memory needed beyond the logits."""

    def call() -> object:
        return contestant.run(case.logits, case.target)

    if case.device.type == "cuda":
        return {"kernels": counting.kernels(call), "peak_bytes": counting.device_bytes(call)}
    if peers.needs_compiling(contestant.name):
        return {"operators": None, "peak_bytes": None}  # nothing sees into compiled code
    operators, peak = counting.operators_and_bytes(call)
    return {"operators": operators, "peak_bytes": peak}


def admit(names: Sequence[str], case: LossCase) -> tuple[list[Contestant], list[dict[str, Any]]]:
    """Return the contestants that run here and are right, and a row of the report for each name.

    A row has the errors of the answer and the work done, or the reason why it was left out.
    """
    admitted, rows = [], []
    for name in names:
        row: dict[str, Any] = {"name": name}
        rows.append(row)
        try:
            contestant = peers.contestant(name, case.device, case.shape[0])
            case.restore()
            errors = case.errors(*contestant.run(case.logits, case.target))
            row["loss_error"], row["grad_error"] = errors
            if not case.is_right(errors):
                row["failed"] = f"wrong by {errors[0]:.1e} (losses) and {errors[1]:.1e} (gradients)"
                continue
            row |= work_of(contestant, case)
        except (AbsentError, UserError) as reason:
            row["left_out"] = str(reason)
        except torch.OutOfMemoryError:
            row["left_out"] = "out of memory"
        except Exception as error:  # a peer's fault must not lose the others' results
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            admitted.append(contestant)
    return admitted, rows


def compare(case: LossCase, names: Sequence[str], budget_s: float) -> dict[str, Any]:
    """Time the contestants on one problem, taking turns; a result for the report."""
    on_cpu = case.device.type == "cpu"
    admitted, rows = admit(names, case)
    turns = {
        c.name: timing.Turn(
            functools.partial(c.run, case.logits, case.target),
            case.restore if c.spoils_logits else None,
        )
        for c in admitted
    }
    if not on_cpu:
        stopwatch: timing.Stopwatch = timing.DeviceTime(cold=True)
    else:
        stopwatch = timing.thread_time if torch.get_num_threads() == 1 else timing.wall_time
    case.restore()
    before = None if on_cpu else clocks.read()
    copies = [timing.copy_gb_per_s(case.device, stopwatch)]
    samples = timing.interleaved(turns, stopwatch, budget_s, timing.ROUNDS[case.device.type])
    copies.append(timing.copy_gb_per_s(case.device, stopwatch))
    copy = statistics.median(copies)

    figures = {name: timing.figures(readings) for name, readings in samples.items()}
    ours = peers.champion(case.device)
    for row in rows:
        if row["name"] not in figures:
            continue
        row |= figures[row["name"]]
        median = row["median_ms"]
        row["gb_per_s"] = case.floor_bytes / median / 1e6
        row["of_copy"] = row["gb_per_s"] / copy
        if "naive" in figures:
            row["naive_over_this"] = figures["naive"]["median_ms"] / median
        if ours in figures:
            row["this_over_ours"] = median / figures[ours]["median_ms"]
    result = {
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "rounds": len(next(iter(samples.values()), [])),
        "floor_bytes": case.floor_bytes,
        "copy_gb_per_s": copy,
        "ours": ours,
        "contestants": rows,
    }
    if not on_cpu and case.shape in CIFAR:
        add_launch_costs(result, admitted, turns, budget_s)
    if before is not None:
        result["clocks"] = {"before": before, "after": clocks.read()}
    return result


def add_launch_costs(
    result: dict[str, Any],
    admitted: Sequence[Contestant],
    turns: dict[str, timing.Turn],
    budget_s: float,
) -> None:
    """For small problems on a GPU: milliseconds of an eager call, and of one in a CUDA graph."""
    eager = timing.interleaved(
        turns, timing.back_to_back(EAGER_CALLS), budget_s / 2, timing.ROUNDS["cuda"]
    )
    calls = {c.name: turns[c.name].call for c in admitted if not c.waits}
    in_graphs, refusals = timing.in_graphs(calls, budget_s / 2)
    for row in result["contestants"]:
        name = row["name"]
        if name in eager:
            row["call_ms"] = timing.figures(eager[name])["median_ms"]
        if name in in_graphs:
            row["graph_ms"] = statistics.median(in_graphs[name].ms)
            row["nodes"] = in_graphs[name].nodes
        if name in refusals:
            row["no_graph"] = refusals[name]


# ---------------------------------------------------------------- for people


COLUMNS = [
    tables.BEST,
    tables.NAIVE,
    Column("median_ms", "median ms"),
    tables.BEST_IN_GRAPH,
    Column("graph_ms", "in a graph us", 1e3),
    Column("nodes", "nodes", style="g"),
    Column("min_ms", "min ms"),
    Column("host_ms", "host ms"),
    Column("call_ms", "eager call us", 1e3),
    Column("this_over_ours", "this/ours", style=".2f"),
    Column("kernels", "kernels", style="d"),
    Column("operators", "operators", style="d"),
    Column("peak_bytes", "peak MiB", 1 / MIB),
    Column("gb_per_s", "GB/s"),
    Column("of_copy", "of copy %", 100, ".3g"),
]


def describe(result: dict[str, Any]) -> str:
    """Return a result as Markdown: a heading, a table, which are missing and why."""
    students, rows, classes = result["shape"]
    best = tables.best(result["contestants"], peers.is_baseline, "median_ms")
    return "\n\n".join(
        [
            f"(K, N, C) = ({students}, {rows}, {classes}), {result['dtype']}; "
            f"{result['rounds']} rounds; a copy has {result['copy_gb_per_s']:.4g} GB/s; "
            f"ours: {result['ours']}; the best baseline: {best['name'] if best else 'none'}",
            tables.describe(tables.compared(result["contestants"], peers.is_baseline), COLUMNS),
            *map(tables.prose, tables.remarks(result)),
        ]
    )


def shape_of(text: str) -> tuple[int, int, int]:
    """Read a shape such as 4x128x100."""
    try:
        students, rows, classes = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: write KxNxC or all") from None
    return students, rows, classes


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = list(DTYPES)
    parser.add_argument("--shapes", nargs="+", metavar="KxNxC", help="those, or: all")
    parser.add_argument("--dtype", nargs="+", choices=every, default=every)
    parser.add_argument("--contestants", nargs="+", choices=peers.names(), default=peers.names())
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument("--budget", type=float, default=8, help="seconds of timing a table")
    parser.add_argument("--time-limit", type=float, help="start no table after that many seconds")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    args = parser.parse_args(argv)
    if args.shapes == ["all"] or (args.shapes is None and DEVICE.type == "cuda"):
        args.shapes = SHAPES
    elif args.shapes is None:
        args.shapes = CPU_SHAPES
    else:
        try:
            args.shapes = [shape_of(text) for text in args.shapes]
        except argparse.ArgumentTypeError as error:
            parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each problem; 1 if a contestant failed, 3 if the time was up."""
    args = arguments(argv)
    started = time.monotonic()
    if DEVICE.type == "cpu":
        torch.set_num_threads(args.threads)
    report = {"benchmark": "loss", **provenance(DEVICE), "results": []}
    machine, versions = report["machine"], report["versions"]
    print(f"{machine['device']}, torch {versions['torch']}, triton {versions['triton']}, "
          f"{report['commit']}, {report['date']}")  # fmt: skip
    unfinished = False
    for shape in args.shapes:
        for dtype in args.dtype:
            if args.time_limit and time.monotonic() - started > args.time_limit:
                unfinished = True
                print(f"\n{shape}, {dtype}: not started, the time was up")
                continue
            torch.compiler.reset()  # as above
            result = compare(LossCase(shape, DTYPES[dtype], DEVICE), args.contestants, args.budget)
            report["results"].append(result)
            print(f"\n{describe(result)}", flush=True)
            if args.json:  # each time: a run that is stopped keeps what it has
                args.json.write_text(json.dumps(report, indent=1) + "\n")
            gc.collect()
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
    failed = any("failed" in row for result in report["results"] for row in result["contestants"])
    return 1 if failed else 3 if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
