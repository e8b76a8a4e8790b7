"""Where a run begins and what ends it early: what is refused, and what follows from more epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dml_fast.comparison.methods import contestants
from dml_fast.config import TrainConfig
from dml_fast.config.checks_longer import check_patience
from dml_fast.config.files import CHANGES_A_RUN, check_same_run, difference
from dml_fast.errors import UserError
from dml_fast.runs.named import students_named
from dml_fast.selection.rounds import Plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_time": "0m"}, r"--max-time is '0m': give hours, minutes or seconds \(90m\)"),
        ({"max_steps": -1}, "--max-steps is -1: give a whole number, 0 or more"),
        ({"patience": -1}, "--patience is -1: give a whole number, 0 or more"),
        ({"patience": 2, "method": "distill"}, "--patience 2 means nothing with --method d"),
        ({"init_from": "a", "pretrained": "timm"}, "--pretrained timm both give weights"),
        ({"init_from": "a,b"}, "--init-from is a,b: give one run, RUN, or one student of it"),
    ],
)
def test_what_cannot_begin_or_end_so_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**options).check()


def test_patience_needs_a_validation_that_may_choose() -> None:
    config = TrainConfig(patience=3, val_fraction=0.0)
    with pytest.raises(UserError, match=r"as roughly aligned as .* tells nothing: leave it out$"):
        check_patience(config, retrieval=False, kind="pair")
    with pytest.raises(UserError, match=r"test images .* or give --val-fraction 0\.1$"):
        check_patience(config, retrieval=True, kind="image")
    check_patience(TrainConfig(patience=3), retrieval=True, kind="image")


def test_commands_that_need_whole_runs_refuse_limits() -> None:
    from dml_fast.distributed.launch import Launch
    from dml_fast.selection.simulation import simulate

    limited = TrainConfig(max_steps=3)
    with pytest.raises(UserError, match="--max-steps is 3 and methods are compared when they"):
        contestants(("independent,dml",), limited, lambda flags, base: base)
    with pytest.raises(UserError, match="--max-time is 2h and rounds of --simulate choose rows"):
        plan = Plan(start=1, acquire=1, rounds=1, score="entropy", how="topk")
        simulate(TrainConfig(max_time="2h", executor="sequential"), plan, Path("x"), Launch())


def test_a_run_that_is_no_run_or_lacks_the_student_gives_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--init-from .*x: .* is not a run folder"):
        students_named(str(tmp_path / "x"), "--init-from")


def test_epochs_alone_may_change_what_a_run_gives() -> None:
    own, wanted = TrainConfig(epochs=5), TrainConfig(epochs=9, patience=1, max_time="2h")
    assert difference(own, wanted) == "epochs"
    check_same_run(own, wanted, "r", CHANGES_A_RUN)
    with pytest.raises(UserError, match="--lr is"):
        check_same_run(own, TrainConfig(epochs=9, lr=0.3), "r", CHANGES_A_RUN)
    with pytest.raises(UserError, match="--teachers is runs/a and the run r has empty: leave"):
        check_same_run(own, TrainConfig(teachers="runs/a"), "r", CHANGES_A_RUN)


def test_an_automatic_ramp_follows_the_epochs_and_a_given_one_stays() -> None:
    with_rows = TrainConfig(epochs=10).settled(unlabelled=True)
    assert with_rows.kl_warmup == 3.0
    assert with_rows.with_epochs(20) == TrainConfig(epochs=20).settled(unlabelled=True)
    for given in (TrainConfig(kl_warmup=2.0), TrainConfig()):
        own = given.settled(unlabelled=False)
        assert own.with_epochs(40).kl_warmup == own.kl_warmup
