"""Put the tables of comparisons, finished or not, on docs/results.md.

    python -m benchmarks.evidence DIR...    # folders of `python -m dml_fast.compare`

adds the figures of each finished run to benchmarks/results/evidence_NAME.jsonl, NAME being the
folder's, and puts the tables of all that are there between the marks ``evidence`` of the page. So
seeds may be measured one after the other, on machines that keep nothing; churn is then that of the
seeds that were measured together. A folder without compare.json is passed over. DIR/origin.json may
say the machine; else --machine does.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common.machine import cpu_name
from benchmarks.common.report import RESULTS, ROOT, fill
from dml_fast.comparison.methods import Contestant
from dml_fast.comparison.tables import Result, to_markdown
from dml_fast.config import TrainConfig

PAGE = ROOT / "docs" / "results.md"
SEEDS = 5


def keep(folder: Path, machine: str, results: Path = RESULTS) -> None:
    """Add a line for each finished run; one of the same method and seed replaces the older one."""
    found = json.loads((folder / "compare.json").read_text())
    about = folder / "origin.json"
    origin = json.loads(about.read_text()) if about.exists() else {"machine": machine}
    path = results / f"evidence_{folder.name}.jsonl"
    lines = {(line["method"], line["seed"]): line for line in _lines(path)}
    for name, one in found["methods"].items():
        for seed, figures in one["by_seed"].items():
            line = {"method": name, "seed": int(seed), **figures, "churn": one["churn"], **origin}
            lines[name, int(seed)] = line
    text = "".join(json.dumps(line) + "\n" for line in lines.values())
    path.write_text(text, encoding="utf-8")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables(path: Path) -> str:
    """Return what stands on the page of one comparison: the seeds that all methods have."""
    lines = _lines(path)
    names = tuple(dict.fromkeys(line["method"] for line in lines))
    runs = {(line["method"], line["seed"]): line for line in lines}
    common = [{line["seed"] for line in lines if line["method"] == name} for name in names]
    seeds = tuple(sorted(set.intersection(*common)))
    result = Result(
        tuple(Contestant(name, TrainConfig()) for name in names),
        seeds,
        {name: [runs[name, seed] for seed in seeds] for name in names},
        {name: _churn([runs[name, seed] for seed in seeds]) for name in names},
    )
    text = to_markdown(result).partition("\n## Cost")[0].partition("\n")[2]
    text = re.sub(r"^## .*$", "", text, flags=re.MULTILINE)
    missing = "" if len(seeds) >= SEEDS else ": **the others are missing**"
    origins = dict.fromkeys(_origin(line) for line in lines)
    name = path.stem.removeprefix("evidence_")
    head = f"`{name}`, {len(seeds)} of {SEEDS} seeds{missing}; {'; and '.join(origins)}."
    parts = [head, *(part.strip() for part in text.split("\n\n") if part.strip())]
    wrap = textwrap.TextWrapper(100, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join(part if part[0] == "|" else wrap.fill(part) for part in parts)


def _origin(line: Mapping[str, Any]) -> str:
    known = (line.get(key) for key in ("command", "commit", "machine"))
    return "; ".join(text for text in known if text)


def _churn(lines: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Return the mean over the pairs of seeds that were compared with each other."""
    groups = Counter(_origin(line) for line in lines)
    by_origin = {_origin(line): line["churn"] for line in lines}
    pairs = {origin: n * (n - 1) / 2 for origin, n in groups.items() if by_origin[origin]}
    if not sum(pairs.values()):
        return None
    weights = list(pairs.values())
    students, ensemble = (
        fmean((by_origin[origin][of] for origin in pairs), weights)
        for of in ("students", "ensemble")
    )
    return students, ensemble


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
    kept = [tables(path) for path in sorted(RESULTS.glob("evidence_*.jsonl"))]
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(fill(page, "evidence", "\n\n".join(kept)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
