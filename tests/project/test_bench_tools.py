"""What the benchmarks measure with: a wrong answer is seen, work is counted right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import bench_loss
from benchmarks.common import counting, loss_summary, timing
from benchmarks.common.loss_case import LossCase
from benchmarks.peers import loss as peers

CPU = torch.device("cpu")
TINY = (3, 5, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("losses", [peers.naive, peers.careful])
def test_the_peers_do_the_same_job(losses: peers.Losses, dtype: torch.dtype) -> None:
    case = LossCase(TINY, dtype, CPU)
    found, grads = peers.through_autograd(losses)(case.logits, case.target)
    assert case.is_right(case.errors(found, grads))
    assert not case.is_right(case.errors(found * 1.02, grads))
    assert not case.is_right(case.errors(found, [grads[1], grads[0], grads[2]]))
    grads[2][4, 6] = torch.nan
    assert not case.is_right(case.errors(found, grads))


def test_the_reference_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LossCase(TINY, torch.float32, CPU)
    monkeypatch.setattr(
        "benchmarks.common.loss_case.REFERENCE_NUMBERS", 2 * 3 * 7
    )  # two rows at a time
    parts = LossCase(TINY, torch.float32, CPU)
    assert max(whole.errors(parts._losses, parts._grads)) < 1e-14


def test_spoilt_logits_are_restored() -> None:
    case = LossCase(TINY, torch.float32, CPU)
    with torch.no_grad():
        case.logits[1].zero_()
    case.restore()
    assert all(torch.equal(z, p) for z, p in zip(case.logits, case.pristine, strict=True))


def test_operators_and_memory_are_counted() -> None:
    x = torch.ones(1000)

    def call() -> torch.Tensor:
        doubled = x.view(10, 100) * 2  # 4,000 bytes
        total = doubled + 1  # 4,000 more
        del doubled
        return total.mul_(3) - 1  # and 4,000 in place of the first

    assert counting.operators_and_bytes(call) == (4, 8000)


def test_everyone_has_as_many_turns_and_mending_is_not_timed() -> None:
    seen: list[str] = []
    turns = {
        "a": timing.Turn(lambda: seen.append("a"), after=lambda: seen.append("mend a")),
        "b": timing.Turn(lambda: seen.append("b")),
    }

    def stopwatch(call: timing.Call) -> timing.Reading:
        timed_from = len(seen)
        call()
        assert seen[timed_from:] in (["a"], ["b"])
        return timing.Reading(len(seen))

    samples = timing.interleaved(turns, stopwatch, budget_s=0, rounds=(6, 6))
    assert [len(samples[name]) for name in turns] == [6, 6]
    calls = [name for name in seen if name in turns]
    assert calls.count("a") == calls.count("b") == 6 + 3
    assert all(seen[i + 1] == "mend a" for i, name in enumerate(seen) if name == "a")
    assert len({tuple(calls[i : i + 2]) for i in range(0, len(calls), 2)}) == 2  # both orders


def test_a_failing_contestant_is_reported_and_the_others_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_loss, "DEVICE", CPU)
    monkeypatch.setattr(peers, "careful", lambda logits, target: peers.naive(logits, target) * 1.1)
    threads = torch.get_num_threads()
    file = tmp_path / "report.json"
    command = ["--shapes", "2x4x5", "--dtype", "float32", "--budget", "0", "--json", str(file)]
    status = bench_loss.main(
        [*command, "--contestants", "naive", "careful", "liger", "closed_form"]
    )
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert status == 1
    assert "- careful: FAILED, wrong by 1.0e-01" in printed
    assert "- liger: Liger's kernels need a GPU" in printed
    result = bench_loss.json.loads(file.read_text())["results"][0]
    rows = {row["name"]: row for row in result["contestants"]}
    assert "median_ms" not in rows["careful"]
    naive, ours = rows["naive"], rows["closed_form"]
    assert naive["naive_over_this"] == 1
    assert ours["naive_over_this"] == pytest.approx(naive["median_ms"] / ours["median_ms"])
    # 2 students x 4 rows x 5 classes x 4 bytes, read and written
    assert ours["gb_per_s"] == pytest.approx(320 / ours["median_ms"] / 1e6)


def test_the_summary_leaves_out_what_nobody_measured() -> None:
    contestants = [
        {"name": "naive", "median_ms": 3.0, "this_over_ours": 3.0},
        {"name": "liger", "left_out": "no GPU"},
        {"name": "closed_form", "median_ms": 1.0, "this_over_ours": 1.0, "of_copy": 0.25},
    ]
    result = {"shape": [2, 3, 4], "dtype": "float32", "ours": "closed_form"}
    heading, _, line = loss_summary.summary([result | {"contestants": contestants}]).splitlines()
    assert [cell.strip() for cell in heading.split("|")[1:-1]] == [
        "K x N x C",
        "dtype",
        "best baseline",
        "best / ours",
        "closed_form, us",
        "closed_form, % of copy",
        "naive",
    ]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "2x3x4",
        "float32",
        "naive",
        "3",
        "1000",
        "25",
        "3",
    ]
