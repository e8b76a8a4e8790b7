"""What config.json says of a run that --resume has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_cases import checkpoint_state, facts_of_three_classes

from dml_fast.config import TrainConfig
from dml_fast.errors import UserError
from dml_fast.reporting.comparison import Entry, to_markdown
from dml_fast.runs import checkpoint
from dml_fast.runs.description import Change, check_epochs, earlier, in_words, with_new
from dml_fast.runs.folder import Run

OWN = TrainConfig(arch="resnet8", cohort=2, epochs=5, kl_warmup=1.5)
FIRST: Change = {"step": 40, "epoch": 4, "field": "epochs", "from": 3, "to": 5}


def test_changes_are_recorded_with_the_step_from_which_they_hold() -> None:
    wanted = TrainConfig(arch="resnet8", cohort=2, epochs=8, kl_warmup=2.4)
    changes = with_new([FIRST], OWN, wanted, 50, 5)
    assert changes == [
        FIRST,
        {"step": 50, "epoch": 5, "field": "epochs", "from": 5, "to": 8},
        {"step": 50, "epoch": 5, "field": "kl_warmup", "from": 1.5, "to": 2.4},
    ]
    assert in_words(changes[1:]) == (
        "--epochs 5, then 8 from step 50 (after epoch 5); "
        "--kl-warmup 1.5, then 2.4 from step 50 (after epoch 5)"
    )
    assert [(c.epochs, c.kl_warmup) for c in earlier(wanted, changes)] == [
        (8, 2.4), (8, 1.5), (5, 1.5), (3, 1.5),
    ]  # fmt: skip
    assert with_new([FIRST], OWN, OWN, 50, 5) == [FIRST]


def test_steps_that_are_done_anew_have_the_newest_values() -> None:
    """A run that goes on from a checkpoint before the change, or from its start."""
    (moved,) = with_new([FIRST], OWN, OWN, 30, 2)
    assert (moved["step"], moved["epoch"]) == (30, 2)
    assert not with_new([FIRST], OWN, OWN, 0, 0)


@pytest.mark.parametrize(
    ("own", "epochs", "ended", "begun", "message"),
    [
        (OWN, 3, 3, 4, "--epochs is 3 and the run has begun epoch 4: give at least that"),
        (TrainConfig(method="distill", epochs=5), 6, 5, 5, "the teacher .* has ended its 5"),
    ],
)
def test_epochs_that_are_over_cannot_change(
    own: TrainConfig, epochs: int, ended: int, begun: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_epochs(own, TrainConfig(epochs=epochs), ended, begun)
    check_epochs(own, own, ended, begun)
    check_epochs(TrainConfig(method="distill", epochs=6), TrainConfig(epochs=5), 5, 5)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.prepare(0)
    students = [{"arch": "resnet8", "parameters": 1}] * 2
    run.describe(OWN, facts_of_three_classes(), students, [FIRST])  # type: ignore[arg-type]
    return run


def test_checkpoints_of_before_a_change_are_of_the_run(run: Run) -> None:
    for epochs, fits in ((5, True), (3, True), (4, False)):
        saved = TrainConfig(arch="resnet8", cohort=2, epochs=epochs, kl_warmup=1.5)
        state = {**checkpoint_state(3), "config": json.dumps(saved.to_dict())}
        if fits:
            checkpoint.check_run(run, state, run.checkpoint())  # type: ignore[arg-type]
        else:
            with pytest.raises(UserError, match=r"it has --epochs 4 and not 5"):
                checkpoint.check_run(run, state, run.checkpoint())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "damage",
    [
        {"step": 1},
        [{**FIRST, "field": "lr"}],
        [{**FIRST, "from": 2.5}],
        [{**FIRST, "from": 0}],
        [{**FIRST, "from": "3"}],
    ],
)
def test_damaged_changes_are_refused(run: Run, damage: object) -> None:
    description = json.loads(run.config_file.read_text())
    run.config_file.write_text(json.dumps(description | {"changes": damage}))
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        _ = Run(run.folder).changes


def test_a_report_names_what_was_changed_and_counts_a_run_that_lost_patience(run: Run) -> None:
    scores = [0.5, 0.6, 0.6, 0.4]
    history = [
        {
            "epoch": n, "step": 10 * n, "images_per_s": 9.0, "ensemble_val_acc": score,
            "students": [{"val_acc": score}] * 2,
        }
        for n, score in enumerate(scores, start=1)
    ]  # fmt: skip
    entry = Entry("run", run, history)  # type: ignore[arg-type]
    text = to_markdown([entry])
    assert "run was changed by `--resume`: --epochs 3, then 5 from step 40 (after epoch 4)." in text
    assert not entry.complete
    for patience, complete in ((2, True), (3, False)):
        config = {**OWN.to_dict(), "patience": patience}
        description = json.loads(run.config_file.read_text()) | {"config": config}
        run.config_file.write_text(json.dumps(description))
        assert Entry("run", Run(run.folder), history).complete is complete  # type: ignore[arg-type]
    unchanged = {**dict(entry.setting), "changes": ""}
    assert unchanged != dict(entry.setting)  # its seeds are not averaged with those of whole runs
