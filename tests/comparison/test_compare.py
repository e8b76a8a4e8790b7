"""Comparisons as a user runs them: killed and continued, extended, and what their tables say."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Forked

from dml_fast import cli, compare
from dml_fast.comparison.measures import churn

pytestmark = [pytest.mark.processes, pytest.mark.slow]

OPTIONS = ["--arch", "resnet8", "--train-fraction", "0.3", "--epochs", "3", "--device", "cpu"]


def arguments(out: Path, *more: str, seeds: int = 2) -> list[str]:
    methods = ("--methods", "independent,dml", "warm=--kl-warmup 2")
    return [*OPTIONS, *methods, "--seeds", str(seeds), "--out", str(out), *more]


def without_times(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    for method in found["methods"].values():
        for figures in method["by_seed"].values():
            assert figures.pop("seconds") > 0
    return found  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "straight"
    assert cli.run(compare.main, arguments(out, "--jobs", "1")) == 0
    return out


def test_killed_three_times_it_ends_with_the_same_tables(straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    for epochs, number in ((1, signal.SIGKILL), (6, signal.SIGTERM), (10, signal.SIGKILL)):
        process = Forked("dml_fast.compare", *arguments(out, "--jobs", "2"))
        lines = 0
        while lines < epochs and process.poll() is None:
            time.sleep(0.05)
            lines = sum(len(p.read_text().splitlines()) for p in out.glob("*/metrics.jsonl"))
        assert process.poll() is None, "it was done before it was killed"
        process.send_signal(number)
        assert process.wait(60) == (143 if number == signal.SIGTERM else -9)
        assert not (out / "compare.md").exists()
    assert Forked("dml_fast.compare", *arguments(out, "--jobs", "2")).wait(120) == 0
    for name in ("compare.md", "compare.png"):
        assert (out / name).read_bytes() == (straight / name).read_bytes()
    assert without_times(out / "compare.json") == without_times(straight / "compare.json")


def test_the_tables_are_those_of_the_runs(straight: Path) -> None:
    result = json.loads((straight / "compare.json").read_text())
    assert result["baseline"] == "independent"
    accuracy: dict[str, list[float]] = {}
    for name in ("independent", "dml", "warm"):
        for seed in (0, 1):
            test = json.loads((straight / f"{name}-s{seed}" / "test.json").read_text())
            accuracy.setdefault(name, []).append(test["measures"]["students"])
            answers = np.load(straight / f"{name}-s{seed}" / "test_answers.npy")
            assert answers.shape == (3, 359)
        assert result["methods"][name]["mean"]["students"] == pytest.approx(np.mean(accuracy[name]))
    gain = np.subtract(accuracy["dml"], accuracy["independent"])
    found = result["methods"]["dml"]["differences"]["students"]
    assert found["mean"] == pytest.approx(gain.mean())
    text = (straight / "compare.md").read_text()
    assert f"{100 * np.mean(accuracy['dml']):.2f}" in text
    assert "2 seeds leave" in text
    assert "| independent |        2 |" in text


def test_seeds_may_be_added_and_other_options_are_refused(
    straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (straight / "dml-s0" / "last.pt").stat().st_mtime_ns
    assert cli.run(compare.main, arguments(straight, "--lr", "0.3")) == 2
    assert "--lr is 0.3 and the run" in capsys.readouterr().err
    table = (straight / "compare.md").read_bytes()
    assert cli.run(compare.main, arguments(straight, "--jobs", "2", seeds=3)) == 0
    assert (straight / "dml-s0" / "last.pt").stat().st_mtime_ns == before
    assert (straight / "dml-s2").is_dir()
    assert "3 seeds (0 to 2)" in capsys.readouterr().out
    assert cli.run(compare.main, arguments(straight)) == 0
    assert (straight / "compare.md").read_bytes() == table


def test_a_run_that_fails_is_named_with_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*OPTIONS, "--lr", "1e30", "--max-skipped", "1", "--schedule", "constant"]
    more = ["--methods", "independent,dml", "--seeds", "1", "--warmup", "0"]
    assert cli.run(compare.main, [*options, *more, "--out", str(tmp_path / "c")]) == 1
    error = capsys.readouterr().err
    assert "failed (error: student" in error
    assert ".log has all of its output" in error
    assert os.path.exists(tmp_path / "c" / "independent-s0.log")


def test_churn_is_the_mean_over_pairs_of_seeds() -> None:
    answers = [np.array([[0, 1, 2, 3], [0, 0, 0, 0]]), np.array([[0, 1, 2, 0], [0, 0, 1, 1]])]
    assert churn(answers) == (0.25, 0.5)
    assert churn([*answers, answers[0]]) == pytest.approx((0.5 / 3, 1 / 3))
    assert churn(answers[:1]) is None
