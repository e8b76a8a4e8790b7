"""Put the tables of comparisons, finished or not, on docs/results.md.

    python -m benchmarks.evidence DIR...    # folders of `python -m dml_fast.compare`

writes the figures of each finished run to benchmarks/results/evidence_NAME.jsonl, NAME being the
folder's, and the tables of all that are there between the marks ``evidence`` of the page. A folder
without compare.json is passed over. DIR/origin.json may say the machine; else --machine does.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.machine import cpu_name
from benchmarks.common.report import RESULTS, ROOT, fill

PAGE = ROOT / "docs" / "results.md"
SEEDS = 5


def keep(folder: Path, machine: str, results: Path = RESULTS) -> None:
    """Write a line for each finished run, and beside them the tables of `compare`."""
    found = json.loads((folder / "compare.json").read_text())
    about = folder / "origin.json"
    origin = json.loads(about.read_text()) if about.exists() else {"machine": machine}
    lines = [
        {"method": name, "seed": int(seed), **figures, "churn": one["churn"], **origin}
        for name, one in found["methods"].items()
        for seed, figures in one["by_seed"].items()
    ]
    out = results / f"evidence_{folder.name}"
    out.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out.with_suffix(".md").write_text(tables(folder, len(found["seeds"]), origin) + "\n")


def tables(folder: Path, seeds: int, origin: dict[str, str]) -> str:
    """Return what stands on the page of one comparison."""
    text = (folder / "compare.md").read_text().partition("\n## Cost")[0].partition("\n")[2]
    text = re.sub(r"^## .*$", "", text, flags=re.MULTILINE)
    missing = "" if seeds >= SEEDS else ": **the others are missing**"
    head = f"`{folder.name}`, {seeds} of {SEEDS} seeds{missing}; {'; '.join(origin.values())}."
    parts = [head, *(part.strip() for part in text.split("\n\n") if part.strip())]
    wrap = textwrap.TextWrapper(100, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join(part if part[0] == "|" else wrap.fill(part) for part in parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the folders, and rewrite the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--machine", default=cpu_name(), help="with date and commit")
    args = parser.parse_args(argv)
    for folder in args.folders:
        if (folder / "compare.json").exists():
            keep(folder, args.machine)
    kept = [path.read_text().strip() for path in sorted(RESULTS.glob("evidence_*.md"))]
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(fill(page, "evidence", "\n\n".join(kept)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
