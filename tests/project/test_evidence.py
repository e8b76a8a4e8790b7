"""benchmarks.evidence: what it keeps of a comparison, and that a table says what is missing."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import evidence


def test_a_comparison_with_missing_seeds_says_so(tmp_path: Path) -> None:
    runs = {str(seed): {"measures": {"students": 0.5}} for seed in (0, 1)}
    found = {"seeds": [0, 1], "methods": {"dml": {"by_seed": runs, "churn": None}}}
    (tmp_path / "compare.json").write_text(json.dumps(found))
    (tmp_path / "compare.md").write_text("# title\n\nTwo seeds.\n\n| a |\n|---|\n\n## Cost\n\nx\n")
    evidence.keep(tmp_path, "a machine", tmp_path)
    lines = (tmp_path / f"evidence_{tmp_path.name}.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1]
    text = (tmp_path / f"evidence_{tmp_path.name}.md").read_text()
    assert "2 of 5 seeds: **the others are missing**; a machine." in text
    assert "| a |\n|---|" in text and "Cost" not in text
