"""Curves and a comparison of runs: ``python -m dml_fast.report runs/A runs/B``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from dml_fast import cli
from dml_fast.errors import UserError


@dataclass(frozen=True)
class ReportArguments:
    """Curves (curves.png) and a comparison (report.md) of runs; the comparison is also printed."""

    runs: Positional[tuple[Path, ...]]
    """Folders of runs. Those that differ only by seed are also averaged."""
    out: str = ""
    """Folder to write to; by default the run's own, or ./report for several runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, compare, write and print; return 0."""
    args = cli.parse(ReportArguments, argv, "report")
    if not args.runs:
        raise UserError("no run was named: give the folder of at least one")

    from dml_fast.reporting.comparison import read_entries, write_report

    entries = read_entries(args.runs)
    default = entries[0].run.folder if len(entries) == 1 else Path("report")
    print(write_report(entries, Path(args.out) if args.out else default), end="")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
