"""Ways to launch our kernels that only a GPU can choose between; all give the same answers.

    python -m benchmarks.gpu.variants [--json FILE] [--budget 6]

- two sweeps: 4, 8 and 16 warps per row, with and without hints to the L2 cache, sums over the
  threads one at a time or in batches, and from Triton 3.9 on a cluster per row
  (`dml_fast.kernels.launch_table.SWITCH`), in fp32 and bf16;
- other divergences: their kernels beside the closed form, and the paper's;
- small batches in a CUDA graph: sums of few programs at once or in two levels, counters kept or
  set to zero by a node of the graph;
- linear heads: rows per chunk, products added to fp32 sums as they are made or by a pass of their
  own, gradients over the logits or beside them.

What wins becomes a row of the launch table, or a default. --rehearse runs all of it on a CPU, in
the interpreter, at tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.common import clocks, counting, tables, timing
from benchmarks.common.machine import provenance
from benchmarks.common.tables import Column
from dml_fast.kernels import autograd, launch, launch_table
from dml_fast.loss import mutual_loss_and_grad, products
from dml_fast.loss.divergences import DIVERGENCES
from dml_fast.loss.linear import linear_mutual_loss

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SWITCHES = ("4", "8", "16", "4,hints", "8,hints", "16,hints", "4,batch=1", "16,hints,batch=32")
CLUSTERS = ("8,hints,batch=32,ctas=4", "8,hints,batch=32,ctas=8")
COLUMNS = (
    Column("median_ms", "median ms"),
    Column("min_ms", "min ms"),
    Column("of_copy", "of copy %", 100, ".0f"),
    Column("graph_ms", "ms in a graph"),
    Column("nodes", "nodes"),
    Column("peak_gib", "peak GiB", style=".2f"),
    Column("error", "error", style=".1e"),
)

Row = dict[str, Any]


def two_sweeps(
    shape: tuple[int, int, int], dtype: torch.dtype, switches: Sequence[str], budget_s: float
) -> list[Row]:
    """Time the kernel for long rows; errors are of the gradients, relative to the first row's."""
    logits, target = _logits(shape, dtype)

    def calls(switch: str) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with patch.object(launch_table, "SWITCH", switch):
                _, grads, _ = mutual_loss_and_grad(logits, target, backend="triton")
            return tuple(grads)

        return call

    contestants = {switch: calls(switch) for switch in switches}
    rows = _timed(contestants, budget_s)
    moved = 2 * sum(z.nbytes for z in logits)
    copy = timing.copy_gb_per_s(DEVICE, _stopwatch())
    for row in rows:
        row["of_copy"] = moved / row["median_ms"] / 1e6 / copy
    return rows


def small_batches(shape: tuple[int, int, int], budget_s: float) -> list[Row]:
    """Time the kernel for short rows in a CUDA graph."""
    logits, target = _logits(shape, torch.float32)

    @contextmanager
    def as_before(counters: bool, sums: bool) -> Iterator[None]:
        new, few = launch.counters, launch.FEW
        fresh = patch.object(
            launch, "counters", lambda device, size, keep: new(device, size, False)
        )
        levels = patch.object(launch, "FEW", 0 if sums else few)
        with levels:
            if counters:
                with fresh:
                    yield
            else:
                yield

    def calls(counters: bool, sums: bool) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with as_before(counters, sums):
                _, grads, _ = mutual_loss_and_grad(logits, target, backend="triton")
            return tuple(grads)

        return call

    contestants = {
        "counters kept, sums at once": calls(False, False),
        "counters kept, sums in two levels": calls(False, True),
        "counters set, sums at once": calls(True, False),
        "counters set, sums in two levels": calls(True, True),
    }
    rows = _timed(contestants, budget_s / 2)
    if ON_GPU:
        graphs, refusals = timing.in_graphs(contestants, budget_s)
        for row in rows:
            if found := graphs.get(row["name"]):
                row["graph_ms"], row["nodes"] = statistics.median(found.ms), found.nodes
            else:
                row["failed"] = refusals[row["name"]]
    return rows


def divergences(shape: tuple[int, int, int], dtype: torch.dtype, budget_s: float) -> list[Row]:
    """Time the kernels of each divergence beside the closed form, whose gradients are the measure.

    Side by side are the two of one divergence.
    """
    logits, target = _logits(shape, dtype)

    def calls(divergence: str, backend: str) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            _, grads, _ = mutual_loss_and_grad(
                logits, target, backend=backend, divergence=divergence
            )
            return tuple(grads)

        return call

    rows = []
    for divergence in DIVERGENCES:
        ways = {f"{divergence}, {way}": calls(divergence, way) for way in ("closed_form", "triton")}
        rows += _timed(ways, budget_s / len(DIVERGENCES))
    moved = 2 * sum(z.nbytes for z in logits)
    copy = timing.copy_gb_per_s(DEVICE, _stopwatch())
    for row in rows:
        row["of_copy"] = moved / row["median_ms"] / 1e6 / copy
    return rows


def linear_heads(
    shape: tuple[int, int, int, int], chunks: Sequence[int], budget_s: float
) -> list[Row]:
    """Time linear heads; errors are of the weights' gradients, relative to the first row's."""
    students, rows, classes, width = shape
    g = torch.Generator(DEVICE).manual_seed(0)
    draw: dict[str, Any] = {"generator": g, "dtype": torch.bfloat16, "device": DEVICE}
    hidden = [torch.randn(rows, width, **draw).requires_grad_() for _ in range(students)]
    weight = [
        (torch.randn(classes, width, **draw) * width**-0.5).requires_grad_()
        for _ in range(students)
    ]
    target = torch.randint(classes, (rows,), generator=g, device=DEVICE)

    def calls(chunk: int, added: bool, over: bool) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            own = products._adds_in_fp32
            how = patch.object(products, "_adds_in_fp32", lambda device: added and own(device))
            solve = autograd.solve
            beside = patch.object(autograd, "solve", lambda problem, *rest: solve(
                _not_in_place(problem) if not over else problem, *rest
            ))  # fmt: skip
            with how, beside:
                losses = linear_mutual_loss(
                    hidden, weight, target, chunk_rows=chunk, backend="triton"
                )
                assert isinstance(losses, Tensor)
                return torch.autograd.grad(losses.sum(), [*weight, *hidden])

        return call

    contestants = {}
    for chunk in chunks:
        for added, over in ((False, False), (True, False), (True, True)):
            how = "added as made" if added else "added by a pass"
            where = "over the logits" if over else "beside them"
            contestants[f"{chunk} rows, {how}, {where}"] = calls(chunk, added, over)
    found = _timed(contestants, budget_s)
    if ON_GPU:
        for row in found:
            row["peak_gib"] = counting.device_bytes(contestants[row["name"]]) / 2**30
    return found


def _not_in_place(problem: Any) -> Any:
    problem.in_place = False
    return problem


def _logits(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    students, rows, classes = shape
    g = torch.Generator(DEVICE).manual_seed(0)
    logits = [
        torch.randn(rows, classes, generator=g, device=DEVICE).mul_(2).to(dtype)
        for _ in range(students)
    ]
    return logits, torch.randint(classes, (rows,), generator=g, device=DEVICE)


def _stopwatch() -> timing.Stopwatch:
    return timing.DeviceTime(cold=True) if ON_GPU else timing.wall_time


def _timed(
    contestants: Mapping[str, Callable[[], tuple[Tensor, ...]]], budget_s: float
) -> list[Row]:
    """A row for each contestant, with the error against the first one's answers."""
    first: tuple[Tensor, ...] = ()
    rows = []
    for name, call in contestants.items():
        answers = call()
        first = first or tuple(a.clone() for a in answers)
        gaps = [
            float((a.double() - b.double()).norm() / b.double().norm())
            for a, b in zip(answers, first, strict=True)
        ]
        rows.append({"name": name, "error": max(gaps)})
        del answers
    turns = {name: timing.Turn(call) for name, call in contestants.items()}
    rounds = timing.ROUNDS["cuda"] if ON_GPU else (1, 1)
    samples = timing.interleaved(turns, _stopwatch(), budget_s, rounds, warm_up=1)
    return [row | timing.figures(samples[row["name"]]) for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of each part; 1 if answers differ by more than roundings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument("--budget", type=float, default=6, help="seconds of timing a table")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes")
    args = parser.parse_args(argv)
    small, middle, long = (4, 128, 100), (4, 8192, 1000), (4, 4096, 32768)
    switches = SWITCHES + CLUSTERS * (launch_table.possible(2) > 1)
    heads, chunks = (4, 4096, 131072, 1024), (256, 512, 1024, 2048)
    if args.rehearse:
        small, middle, long = (2, 4, 10), (2, 4, 10), (2, 1, 16384)
        switches = switches[:1] + switches[-2:]
        heads, chunks = (2, 8, 64, 8), (4,)
    report: dict[str, Any] = {"benchmark": "variants", **provenance(DEVICE), "parts": {}}
    if ON_GPU:
        report["clocks"] = {"before": clocks.read()}
    parts: dict[str, Callable[[], list[Row]]] = {
        "small batches": lambda: small_batches(small, args.budget),
        "two sweeps, fp32": lambda: two_sweeps(long, torch.float32, switches, args.budget),
        "two sweeps, bf16": lambda: two_sweeps(long, torch.bfloat16, switches, args.budget),
        "divergences, bf16": lambda: divergences(middle, torch.bfloat16, args.budget),
        "divergences, fp32": lambda: divergences(long, torch.float32, args.budget),
        "linear heads": lambda: linear_heads(heads, chunks, 2 * args.budget),
    }
    wrong = []
    for name, part in parts.items():
        rows = report["parts"][name] = part()
        print(f"\n{name}:\n\n{tables.describe(rows, COLUMNS)}", flush=True)
        wrong += [f"{name}, {row['name']}" for row in rows if not row["error"] < 2e-2]
        if ON_GPU:
            report["clocks"]["after"] = clocks.read()
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    for one in wrong:
        print(f"WRONG ANSWERS: {one}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
