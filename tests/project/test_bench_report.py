"""The page of figures is what the committed reports make, and the tools behind it measure right."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import bench_step
from benchmarks.common import counting, report
from benchmarks.common.step_case import StepCase

ROOT = Path(__file__).parents[2]


def profile_step() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "profile_step", ROOT / "benchmarks" / "gpu" / "profile_step.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(**rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "arch": "resnet8",
        "students": 2,
        "batch": 4,
        "rounds": 3,
        "contestants": [{"name": name, **row} for name, row in rows.items()],
    }


def test_the_page_is_what_the_reports_make() -> None:
    assert report.main(["--check"]) == 0


def test_a_section_is_replaced_and_nothing_else() -> None:
    page = "a\n<!-- step begin -->\nold\nlines\n<!-- step end -->\nb\n<!-- train begin -->\nx\n"
    filled = report.fill(page, "step", r"new \1")
    assert "\n<!-- step begin -->\n\nnew \\1\n\n<!-- step end -->\nb\n" in filled
    assert filled.startswith("a\n") and filled.endswith("x\n")
    assert report.fill(filled, "step", r"new \1") == filled
    with pytest.raises(ValueError, match="no section between <!-- train"):
        report.fill(page, "train", "x")


def test_a_table_says_who_is_missing_and_why() -> None:
    text = bench_step.describe(
        result(
            a={"median_ms": 12.4, "min_ms": 11.0, "operators": 7},
            b={"left_out": "not installed"},
            c={"failed": "wrong"},
        )
    )
    assert "| a          |      12.4 |     11 |         7 |" in text
    assert "- b: not installed\n- c: FAILED, wrong" in text


def test_foreign_reports_are_refused(tmp_path: Path) -> None:
    (tmp_path / "step_x.json").write_text('{"benchmark": "loss"}')
    with pytest.raises(ValueError, match=r"step_x.json is no report of bench_step.py"):
        report.load("step", tmp_path)


def test_the_union_of_intervals() -> None:
    covered = profile_step().covered
    assert covered([]) == 0
    assert covered([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == 4
    assert covered([(5, 6), (0, 10)]) == 10


def test_bytes_of_arguments_and_results_are_counted() -> None:
    x = torch.ones(1000)
    assert counting.work(lambda: x.view(10, 100) + 1).moved == 8000
    assert counting.work(lambda: x.mul_(1)).moved == 4000  # one tensor, read and written in place


@pytest.mark.slow
def test_a_contestant_that_does_another_job_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = StepCase("resnet8", 2, 8, torch.device("cpu"))
    honest = case.contestant

    def contestant(name: str) -> Any:
        step = honest(name)
        return (lambda: 1.01 * step()) if name == "sequential fp32" else step

    monkeypatch.setattr(case, "contestant", contestant)
    found = bench_step.compare(case, ["naive fp32", "sequential fp32", "threads fp32"], 0.1)
    rows = {row["name"]: row for row in found["contestants"]}
    assert "failed" in rows["sequential fp32"] and "median_ms" not in rows["sequential fp32"]
    assert rows["naive fp32"]["naive_over_this"] == 1
    assert rows["threads fp32"]["of_matrix"] > 0


def test_work_is_counted_for_all_students() -> None:
    one, two = (StepCase("resnet8", k, 4, torch.device("cpu")) for k in (1, 2))
    assert two.flops() == 2 * one.flops() > 10**8
