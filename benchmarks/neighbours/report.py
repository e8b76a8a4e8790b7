"""Write the tables of this folder's experiments into docs/few_labels.md.

    python -m benchmarks.neighbours.report            # rewrites them
    python -m benchmarks.neighbours.report --check    # only says whether they are so (1: no)

It reads benchmarks/results/neighbours_*.jsonl, and replaces what stands between
``<!-- NAME begin -->`` and ``<!-- NAME end -->``. The rest of that page is written by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.common.report import fill
from benchmarks.neighbours import harness, selection, unlabelled, views

PAGE = harness.ROOT / "docs" / "few_labels.md"
EXPERIMENTS = {"unlabelled": unlabelled, "selection": selection, "views": views}


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the page; with --check only compare it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    before = page = PAGE.read_text(encoding="utf-8")
    for name, experiment in EXPERIMENTS.items():
        lines = harness.read(harness.RESULTS / f"{experiment.NAME}.jsonl")
        source = harness.origin(lines, f"python -m {experiment.__name__}")
        page = fill(page, name, f"{experiment.tables(lines)}\n\n{source}")
    if not args.check:
        PAGE.write_text(page, encoding="utf-8")
    elif page != before:
        print(f"{PAGE} is not what `python -m benchmarks.neighbours.report` makes", file=sys.stderr)
    return int(args.check and page != before)


if __name__ == "__main__":
    sys.exit(main())
