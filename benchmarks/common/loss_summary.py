"""Print the reports of bench_loss.py, one line for each problem.

    python -m benchmarks.common.loss_summary benchmarks/results/loss_*.json

The best baseline's median time over ours, and which it is; then the naive loop's over ours, which
most re-implementations have. Our time, and the share of a copy's bandwidth that it makes of the
fewest bytes. Of each other one, its median time over ours. As Markdown, and short enough for the
end of a log.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import tables
from benchmarks.peers.loss import is_baseline
from dml_fast.reporting.markdown import table

OURS = [  # key, heading, factor
    ("median_ms", "us", 1e3),
    ("of_copy", "% of copy", 100.0),
    ("kernels", "kernels", 1.0),
    ("call_ms", "eager call us", 1e3),
    ("graph_ms", "in a graph us", 1e3),
    ("nodes", "nodes", 1.0),
]


IN_GRAPH = {"median_ms": "", "graph_ms": " in a graph"}


def summary(results: Sequence[dict[str, Any]]) -> str:
    """A table of results that have the same ``ours``."""
    ours = results[0]["ours"]
    rows = [{row["name"]: row for row in result["contestants"]} for result in results]
    mine = [row.get(ours, {}) for row in rows]
    own = [column for column in OURS if any(row.get(column[0]) is not None for row in mine)]
    kinds = [key for key in ("median_ms", "graph_ms") if key in {column[0] for column in own}]
    names = list(dict.fromkeys(name for row in rows for name in row))
    timed = [name for name in names if name != ours and any(_has(row, name) for row in rows)]
    heading = ["K x N x C", "dtype"]
    for key in kinds:
        heading += [f"best baseline{IN_GRAPH[key]}", f"best / ours{IN_GRAPH[key]}"]
    heading += [f"{ours}, {title}" for _, title, _ in own]
    lines = []
    for result, row in zip(results, rows, strict=True):
        line = ["x".join(map(str, result["shape"])), result["dtype"]]
        for key in kinds:
            line += _best(list(row.values()), row.get(ours, {}), key)
        line += [_number(row.get(ours, {}), key, factor) for key, _, factor in own]
        lines.append([*line, *(_number(row.get(name, {}), "this_over_ours") for name in timed)])
    return table([*heading, *timed], lines)


def _best(rows: Sequence[dict[str, Any]], ours: dict[str, Any], key: str) -> list[str]:
    """The fastest baseline, and its time over ours."""
    best = tables.best(rows, is_baseline, key)
    if best is None or not ours.get(key):
        return ["-", "-"]
    return [best["name"], _number({"ratio": best[key] / ours[key]}, "ratio")]


def _has(row: dict[str, dict[str, Any]], name: str) -> bool:
    return "median_ms" in row.get(name, {})


def _number(row: dict[str, Any], key: str, factor: float = 1.0) -> str:
    """Three digits; a dash where it was not measured, the reason being in the report."""
    if row.get(key) is None:
        return "-"
    value = row[key] * factor
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; files that are not there, or of another benchmark, are passed over."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    files = parser.parse_args(argv).files
    reports = [json.loads(file.read_text()) for file in files if file.is_file()]
    found = [result for r in reports if r["benchmark"] == "loss" for result in r["results"]]
    for ours in sorted({result["ours"] for result in found}):
        mine = [result for result in found if result["ours"] == ours]
        print(f"Times as long as {ours}:\n\n{summary(mine)}\n")
        if any(map(tables.is_starved, mine)):
            print(f"{tables.prose(tables.STARVED)}\n")


if __name__ == "__main__":
    main()
