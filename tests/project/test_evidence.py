"""benchmarks.evidence: seeds of several comparisons in one table, which says what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evidence


def comparison(folder: Path, seeds: list[int], gain: float, churn: float | None) -> Path:
    """Write what `compare` leaves of two methods; the second is better by `gain`."""

    def runs(score: float) -> dict[str, Any]:
        figures = {"students": score, "best_student": score, "ensemble": score}
        return {str(s): {"measures": figures, "images": 1, "parameters": 1} for s in seeds}

    changed = None if churn is None else {"students": churn, "ensemble": churn}
    methods = {
        "independent": {"by_seed": runs(0.5), "churn": changed},
        "dml": {"by_seed": runs(0.5 + gain), "churn": changed},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps({"seeds": seeds, "methods": methods}))
    return folder


def test_seeds_measured_later_are_added(tmp_path: Path) -> None:
    evidence.keep(comparison(tmp_path / "x", [0, 1, 2], 0.1, 0.2), "a machine", tmp_path)
    evidence.keep(comparison(tmp_path / "x", [3, 4], 0.2, 0.6), "another", tmp_path)
    path = tmp_path / "evidence_x.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    of_dml = [line for line in lines if line["method"] == "dml"]
    assert [line["seed"] for line in of_dml] == [0, 1, 2, 3, 4]
    assert evidence._churn(of_dml) == pytest.approx((0.3, 0.3))  # of 3 pairs and of 1
    text = evidence.tables(path)
    assert "`x`, 5 of 5 seeds; a machine; and another." in text
    assert "+14.00" in text and "5/5" in text  # the mean of 3 times 10 and 2 times 20 points


def test_missing_seeds_are_said_and_a_run_again_replaces(tmp_path: Path) -> None:
    for gain in (0.1, 0.3):
        evidence.keep(comparison(tmp_path / "x", [0], gain, None), "a machine", tmp_path)
    text = evidence.tables(tmp_path / "evidence_x.jsonl")
    assert "`x`, 1 of 5 seeds: **the others are missing**; a machine." in text
    assert "+30.00" in text and "## Cost" not in text
