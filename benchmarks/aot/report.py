"""Compile the kernels for GPUs that need not be here, and count what is in the machine code.

    python -m benchmarks.aot.report                  # writes benchmarks/results/aot.{json,md}
    python -m benchmarks.aot.report --quick --print  # CI's part of it, printed as JSON

Not under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.aot.cases import (
    ARCHITECTURES,
    PATHS,
    Case,
    launches_of,
    look,
    quick_table,
    whole_table,
)

RESULTS = Path(__file__).parents[1] / "results"
EXTREMES = ("plain", "all statistics")
ROWS_OF_A_RUN = (1, 2, 3, 5, 96, 100, 127, 128, 1000, 1023, 1024, 1025, 4096, 8191)
WEIGHTS = (0, 1, 2, 0.5, 16)  # of the divergence: whole numbers may come as such


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only what CI compiles")
    parser.add_argument(
        "--print", action="store_true", help="JSON to the standard output, no files"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, and an interpreter has no machine code: unset it")
    figures = compile_all(list(quick_table() if args.quick else whole_table()), args.jobs)
    report = {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "commit": _commit(),
        **of_a_run(),
        "kernels": figures,
    }
    if args.print:
        json.dump(report, sys.stdout)
        return 0
    RESULTS.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in figures)
    head = json.dumps({**report, "kernels": []}).removesuffix("[]}")
    (RESULTS / "aot.json").write_text(f"{head}[\n{lines}\n]}}\n", encoding="utf-8")
    (RESULTS / "aot.md").write_text(markdown(report), encoding="utf-8")
    wrong = [row for row in figures if row["faults"]]
    for row in wrong:
        print(*(row[name] for name in Case.__dataclass_fields__), *row["faults"], file=sys.stderr)
    return 1 if wrong else 0


def compile_all(cases: Sequence[Case], jobs: int) -> list[dict[str, Any]]:
    """`look` at every case, in processes: most of a compilation holds Python's lock."""
    context = multiprocessing.get_context("spawn")
    figures = []
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for row in pool.map(look, cases, chunksize=4):
            figures.append(row)
            print(f"\r{len(figures)} of {len(cases)} kernels", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return figures


def of_a_run() -> dict[str, Any]:
    """How many kernels a run compiles, whatever its batch sizes and loss weights, and settings."""
    variants = {}
    unsettled = set()
    for path, students, classes, options in product(PATHS, (3, 4), (100, 32768), EXTREMES):
        case = Case(path, students, classes, "fp32", options, ARCHITECTURES[0])
        asked = [(rows, 1.0) for rows in ROWS_OF_A_RUN] + [(128, weight) for weight in WEIGHTS]
        launches = [launch for sizes in asked for launch in launches_of(case, *sizes)]
        name = f"{path}, K = {students}, C = {classes}, {options}"
        variants[name] = len({launch.variant for launch in launches})
        # Its default changes from one Triton to the next.
        without = [launch for launch in launches if "enable_fp_fusion" not in launch.options]
        unsettled |= {launch.kernel.__name__ for launch in without}
    return {"variants": variants, "fp_fusion_by_default": sorted(unsettled)}


def _commit() -> str:
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def markdown(report: dict[str, Any]) -> str:
    """A table of the plain loss, and one of the options."""
    rows = report["kernels"]
    of_table = [row for row in rows if not row["switch"]]
    plain = [row for row in of_table if row["options"] == "plain" and row["students"] in (2, 4, 8)]
    options = [row for row in of_table if row["options"] != "plain"]
    others = [row for row in rows if row["switch"]]
    spills, fp64 = (sum(row[name] for row in rows) for name in ("spills", "fp64"))
    return f"""# What the kernels' machine code says

Triton {report["triton"]}, {report["date"]}, commit {report["commit"]}, written by
`python -m benchmarks.aot.report`. Compiled without a GPU: nothing here is a time.

{len(rows)} kernels: {spills} loads and stores of spilled registers, {fp64} mentions of fp64.

- sm_80, sm_90, sm_100: registers a thread / SASS instructions a logit. One pass and gradient: all
  that a program runs up to the sums over programs. Two sweeps: the loops alone, added up.
- access: bits of each load of logits and store of gradients, the most that the rows' alignment
  allows. rows x columns: what a program holds at a time.
- engine: losses, cheap statistics and gradients in one launch. forward, backward: autograd's.

{_table(plain, ("path", "kernel", "students", "classes", "dtype"))}

Options, K = 4:

{_table(options, ("options", "path", "kernel", "classes", "dtype"))}

Two sweeps as DML_FAST_TWO_SWEEP has them, which `python -m benchmarks.gpu.variants` times: warps,
hints to the cache, sums per reduction (batch).

{_table(others, ("switch", "path", "students", "classes", "dtype"))}
"""


def _table(rows: Iterable[dict[str, Any]], names: Sequence[str]) -> str:
    """One line for each combination of ``names``, the architectures side by side."""
    lines: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(tuple(row[name] for name in names), {})[row["arch"]] = row
    seen = [arch for arch in ARCHITECTURES if any(arch in of for of in lines.values())]
    heads = [*names, "rows x columns", "warps", "access", *(f"sm_{arch}" for arch in seen)]
    table = [heads, ["---"] * len(heads)]
    for key, of in lines.items():
        first = next(iter(of.values()))
        held = f"{first['rows']} x {first['columns']}"
        figures = [_figures(of[a]) if a in of else "" for a in seen]
        table.append([*key, held, first["warps"], first["access_bits"], *figures])
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in table)


def _figures(row: dict[str, Any]) -> str:
    spills = f", {row['spills']} spills" if row["spills"] else ""
    barriers = f", {row['barriers']} barriers" if row["switch"] else ""
    return f"{row['registers']} / {row['instructions_per_logit']}{spills}{barriers}"


if __name__ == "__main__":
    sys.exit(main())
