"""A line for each problem that bench_loss.py measured, small enough for the end of a log."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dml_fast.markdown import table

PEERS = ("naive", "careful", "liger", "naive + compile", "closed_form", "closed_form + compile")


def line(result: dict[str, Any]) -> list[str]:
    """Our time, the share of a copy's bandwidth, and how many times as long the others take."""
    rows = {row["name"]: row for row in result["contestants"]}
    ours = rows.get(result["ours"], {"left_out": f"without {result['ours']}"})
    shape = "x".join(map(str, result["shape"]))
    if "median_ms" not in ours:
        reason = ours.get("left_out") or ours["failed"]
        return [shape, result["dtype"], reason, *["-"] * (len(PEERS) + 3)]

    def number(row: dict[str, Any], key: str, factor: float = 1.0) -> str:
        return f"{row[key] * factor:.3g}" if row.get(key) is not None else "-"

    ratios = [number(rows.get(name, {}), "this_over_ours") for name in PEERS]
    return [
        shape,
        result["dtype"],
        number(ours, "median_ms", 1e3),
        number(ours, "of_copy", 100),
        number(ours, "kernels"),
        number(ours, "graph_ms", 1e3),
        *ratios,
    ]


def main(files: list[str]) -> None:
    """Print the table; files that are not there, or of another benchmark, are passed over."""
    found = [json.loads(Path(file).read_text()) for file in files if Path(file).is_file()]
    lines = [
        line(result)
        for report in found
        if report["benchmark"] == "loss"
        for result in report["results"]
    ]
    if lines:
        heading = ["K x N x C", "dtype", "ours us", "of copy %", "kernels", "graph us"]
        print(table([*heading, *(f"{name} / ours" for name in PEERS)], lines))


if __name__ == "__main__":
    main(sys.argv[1:])
