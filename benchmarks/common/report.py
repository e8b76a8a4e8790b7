"""Write the reports of bench_step.py and bench_train.py into docs/performance.md.

    python -m benchmarks.common.report            # rewrites them, and docs/step_DEVICE.svg
    python -m benchmarks.common.report --check    # only says whether they are up to date (1: no)

It reads benchmarks/results/step_*.json and train_*.json, and replaces what stands between
``<!-- NAME begin -->`` and ``<!-- NAME end -->``. The rest of that page is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import bench_step, bench_train
from benchmarks.common import tables
from benchmarks.common.step_case import is_baseline

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"


def load(kind: str, folder: Path) -> list[dict[str, Any]]:
    """Read the reports of one benchmark, sorted by file name.

    Raises:
        ValueError: a file is of another benchmark.
    """
    reports = []
    for path in sorted(folder.glob(f"{kind}_*.json")):
        report = json.loads(path.read_text())
        if report.get("benchmark") != kind:
            raise ValueError(f"{path} is no report of bench_{kind}.py")
        reports.append(report)
    return reports


def origin(report: dict[str, Any]) -> str:
    """Say where the figures come from: machine, versions, date, commit, command."""
    machine, versions = report["machine"], report["versions"]
    parts = [
        f"{machine['device']}, {machine['cpus']} CPUs, {machine['torch_threads']} threads",
        f"torch {versions['torch']}, Python {versions['python']}",
        f"{report['date'][:10]}, commit {report['commit']}",
    ]
    # Earlier reports have `python benchmarks/bench_step.py`: now the scripts are modules.
    command = re.sub(r"^python benchmarks/(\w+)\.py", r"python -m benchmarks.\1", report["command"])
    return "; ".join(parts) + f"\n\n    {command}"


def section(kind: str, reports: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown between the marks."""
    if not reports:
        return "Not measured yet."
    describe = bench_step.describe if kind == "step" else bench_train.describe
    parts = []
    for report in reports:
        parts += [origin(report), *(describe(result) for result in report["results"])]
    if kind == "step":
        parts += [f"![Steps]({plot_name(report)})" for report in devices(reports).values()]
    return "\n\n".join(parts)


def devices(reports: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return one report for each kind of device."""
    return {_kind(report): report for report in reports}


def _kind(report: dict[str, Any]) -> str:
    return "cpu" if report["machine"]["device"] == report["machine"]["cpu"] else "cuda"


def plot_name(report: dict[str, Any]) -> str:
    """Return the name of the plot, a file in the page's folder."""
    return f"step_{_kind(report)}.svg"


def plot(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw bars of the best baseline's median time divided by each contestant's."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "dml_fast"  # the same figures give the same file
    from matplotlib.figure import Figure

    results = [result for report in reports for result in report["results"]]
    bests = [tables.best(r["contestants"], is_baseline, "median_ms") for r in results]
    found = [(r, best) for r, best in zip(results, bests, strict=True) if best is not None]
    figure = Figure(figsize=(8, 2.6 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    for axes, (result, best) in zip(panels, found, strict=True):
        rows = tables.compared(result["contestants"], is_baseline)[::-1]
        rows = [row for row in rows if tables.BEST.key in row]
        values = [row[tables.BEST.key] for row in rows]
        bars = axes.barh([row["name"] for row in rows], values, color="#0072B2")
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
        axes.set_title(f"{result['students']} x {result['arch']}, batch {result['batch']}")
        axes.set_xlabel(f"times as fast as the best baseline, {best['name']}")
        axes.margins(x=0.12)
    figure.savefig(path, metadata={"Date": None})


def fill(page: str, name: str, text: str) -> str:
    """Return the page with a new text between the marks of that name.

    Raises:
        ValueError: the page has no such marks.
    """
    marks = re.compile(rf"(<!-- {name} begin -->\n).*?(\n<!-- {name} end -->)", re.DOTALL)
    if not marks.search(page):
        raise ValueError(f"{PAGE.name} has no section between <!-- {name} begin --> and end")
    return marks.sub(lambda found: f"{found[1]}\n{text}\n{found[2]}", page)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the page; with --check only compare it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    before = page = PAGE.read_text()
    for kind in ("step", "train"):
        page = fill(page, kind, section(kind, load(kind, RESULTS)))
    if args.check:
        if page != before:
            print(f"{PAGE} is not what `python -m benchmarks.common.report` makes", file=sys.stderr)
        return int(page != before)
    PAGE.write_text(page)
    steps = load("step", RESULTS)
    for kind, report in devices(steps).items():
        mine = [other for other in steps if _kind(other) == kind]
        plot(mine, PAGE.parent / plot_name(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
