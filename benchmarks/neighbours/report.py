"""Write the tables of this folder's experiments into pages of docs/.

    python -m benchmarks.neighbours.report            # rewrites them
    python -m benchmarks.neighbours.report --check    # only says whether they are so (1: no)

It reads benchmarks/results/neighbours_*.jsonl, and replaces what stands between
``<!-- NAME begin -->`` and ``<!-- NAME end -->``. The rest of these pages is written by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.common.report import fill
from benchmarks.neighbours import (
    harness,
    hashing,
    registration,
    selection,
    sets,
    small_loss,
    teachers,
    unlabelled,
    views,
)

DOCS = harness.ROOT / "docs"
PAGES = {
    DOCS / "few_labels.md": {"unlabelled": unlabelled, "selection": selection, "views": views},
    DOCS / "reid.md": {"sets": sets},
    DOCS / "results.md": {"small_loss": small_loss, "teachers": teachers},
    DOCS / "hashing.md": {"hashing": hashing},
    DOCS / "registration.md": {"registration": registration},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the pages; with --check only compare them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    stale = 0
    for path, experiments in PAGES.items():
        before = page = path.read_text(encoding="utf-8")
        for name, experiment in experiments.items():
            lines = harness.read(harness.RESULTS / f"{experiment.NAME}.jsonl")
            source = harness.origin(lines, f"python -m {experiment.__name__}")
            page = fill(page, name, f"{experiment.tables(lines)}\n\n{source}")
        if not args.check:
            path.write_text(page, encoding="utf-8")
        elif page != before:
            stale = 1
            print(f"{path} differs from `python -m benchmarks.neighbours.report`", file=sys.stderr)
    return stale


if __name__ == "__main__":
    sys.exit(main())
