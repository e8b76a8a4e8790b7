"""Measure how busy a step keeps the device: launches, share of time with work, overlap.

    python -m benchmarks.gpu.profile_step [--arch resnet32] [--json FILE]

For each executor, from PyTorch's profiler over some steps: kernels and host launches per step,
the share of the steps' time in which at least one kernel ran (busy), and the kernels' own time over
that (overlap: 1 where nothing runs side by side). On a CPU it rehearses with the operators of each
thread in place of the kernels of each stream; such figures say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import kinds
from benchmarks.common.counting import is_device_work
from benchmarks.common.machine import provenance
from benchmarks.common.step_case import COMBO, NO_COMBO, TOGETHER, StepCase
from benchmarks.peers.loss import COMPILE
from dml_fast.reporting.markdown import table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = 5
CONTESTANTS = {
    "cuda": [
        "naive fp32",
        "hour graph bf16" + COMPILE,
        "sequential bf16",
        "streams bf16",
        "graph bf16",
        "graph bf16" + COMPILE,
        "graph bf16" + COMPILE + COMBO,
        "graph bf16" + TOGETHER,
        "graph bf16" + TOGETHER + NO_COMBO,
        "one student graph bf16",
    ],
    "cpu": ["naive fp32", "hour bf16", "sequential bf16", "threads bf16"],
}
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for begun, done in sorted(intervals):
        total += max(0.0, done - max(begun, end))
        end = max(end, done)
    return total


def measure(case: StepCase, name: str) -> dict[str, Any]:
    """A row of the table."""
    step = case.contestant(name)
    for _ in range(3):
        step()
    _wait()
    activities = [ProfilerActivity.CPU]
    if DEVICE.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=activities, experimental_config=threads) as found:
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        _wait()
        wall_us = 1e6 * (time.perf_counter() - start)
    events = list(found.events())
    work = [event for event in events if _is_work(event)]
    spans = [(event.time_range.start, event.time_range.end) for event in work]
    busy = covered(spans)
    lanes: dict[int, list[tuple[float, float]]] = {}
    for event, span in zip(work, spans, strict=True):
        lane = event.device_resource_id if DEVICE.type == "cuda" else event.thread
        lanes.setdefault(lane, []).append(span)
    return {
        "name": name,
        "step_ms": wall_us / STEPS / 1e3,
        "kernels": len(work) / STEPS,
        "launches": sum(event.name.startswith(LAUNCHES) for event in events) / STEPS,
        "busy": busy / wall_us,
        "overlap": sum(covered(lane) for lane in lanes.values()) / busy if busy else 0.0,
        "lanes": len(lanes),
        "kinds": {  # per step; time in ms
            kind: {"ms": entry["time"] / STEPS / 1e3, "count": entry["count"] / STEPS}
            for kind, entry in kinds.by_kind((e.name, _own_us(e)) for e in work).items()
        },
    }


def _is_work(event: Any) -> bool:
    if DEVICE.type == "cuda":
        return is_device_work(event)
    return bool(event.name.startswith("aten::"))


def _own_us(event: Any) -> float:
    """Without the operators inside it, which are counted by themselves."""
    if DEVICE.type == "cuda":
        return float(event.time_range.elapsed_us())
    return float(event.self_cpu_time_total)


def describe_kinds(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of the kernels' time by kind, and their count; unused kinds are left out."""
    used = [k for k in (*kinds.KINDS, kinds.OTHER) if any(r["kinds"][k]["count"] for r in rows)]
    cells = [
        [r["name"], *(f"{r['kinds'][k]['ms']:.2f} ({r['kinds'][k]['count']:.0f})" for k in used)]
        for r in rows
    ]
    return table(["step: ms of kernels (count)", *used], cells)


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--students", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    rows = []
    for name in CONTESTANTS[DEVICE.type]:
        case = StepCase(args.arch, args.students, args.batch, DEVICE)
        rows.append(measure(case, name))
    what = "kernels" if DEVICE.type == "cuda" else "operators, nested ones too"
    lanes = "streams" if DEVICE.type == "cuda" else "threads"
    cells = [
        [
            row["name"],
            f"{row['step_ms']:.2f}",
            f"{row['kernels']:.0f}",
            f"{row['launches']:.0f}",
            f"{100 * row['busy']:.0f}",
            f"{row['overlap']:.2f}",
            f"{row['lanes']}",
        ]
        for row in rows
    ]
    print(f"profile of {args.students} x {args.arch}, batch {args.batch}, {DEVICE.type}")
    print(table(["step", "ms", what, "host launches", "busy %", "overlap", lanes], cells))
    print(f"\n{describe_kinds(rows)}")
    if args.json:
        report = {"benchmark": "profile", **provenance(DEVICE), "results": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
