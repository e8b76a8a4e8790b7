"""Runs that go on longer than planned, and runs that stop or end before their epochs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_cases import train as command
from distributed_cases import content, differences, finish, start
from resume_cases import SHORT, digest, train

from dml_fast.config import TrainConfig
from dml_fast.engine.optim import lr_factor
from dml_fast.errors import UserError
from dml_fast.eval import validation
from dml_fast.eval.classification import Classified, ClassScores
from dml_fast.runs.folder import Run
from dml_fast.training.build import build_trainer
from dml_fast.training.signals import StopRequest

PLAIN = TrainConfig(**{**SHORT, "epochs": 2}, executor="sequential", schedule="constant")


@pytest.mark.slow
def test_a_run_that_becomes_longer_is_the_longer_run_where_no_schedule_differs(
    tmp_path: Path,
) -> None:
    """Ended after its epochs, or stopped by --max-steps; and then stopped again."""
    assert train(tmp_path / "straight", replace(PLAIN, epochs=3))
    expected = digest(tmp_path / "straight")
    per_epoch = Run(tmp_path / "straight").metrics()[0]["step"]
    ended, stopped = tmp_path / "ended", tmp_path / "stopped"
    assert train(ended, PLAIN)
    assert train(ended, replace(PLAIN, epochs=3), resume=True)
    assert digest(ended) == expected
    assert [(c["from"], c["to"], c["epoch"]) for c in Run(ended).changes] == [(2, 3, 2)]
    assert not train(stopped, replace(PLAIN, max_steps=per_epoch - 1))
    assert not train(stopped, replace(PLAIN, epochs=3, max_steps=2 * per_epoch), resume=True)
    before = (stopped / "last.pt").stat().st_ino
    assert not train(stopped, Run(stopped).config, resume=True)  # the limit is of the whole run
    assert (stopped / "last.pt").stat().st_ino == before
    assert not train(
        stopped, replace(Run(stopped).config, max_steps=2 * per_epoch + 1), resume=True
    )
    assert train(stopped, replace(Run(stopped).config, max_steps=0), resume=True)
    assert digest(stopped) == expected
    assert [change["step"] for change in Run(stopped).changes] == [per_epoch - 1]


@pytest.mark.slow
def test_the_schedule_is_the_new_one_from_there_on_also_if_stopped_again(tmp_path: Path) -> None:
    folder, split = tmp_path / "run", tmp_path / "split"
    config = replace(PLAIN, schedule="cosine", labels_per_class=6, batch_size=32)
    assert train(folder, config)
    per_epoch = Run(folder).metrics()[0]["step"]
    short = Run(folder).config
    assert short.kl_warmup == 0.6
    shutil.copytree(folder, split)
    longer = short.with_epochs(4)
    assert longer.kl_warmup == 1.2
    assert train(folder, longer, resume=True)
    build_trainer(longer, Run(split), split, StopRequest()).close()  # and killed before a step
    assert not train(split, Run(split).config, steps=2 * per_epoch + 1, resume=True)
    assert not train(split, Run(split).config, steps=3 * per_epoch, resume=True)
    assert train(split, Run(split).config, resume=True)
    assert digest(split) == digest(folder)
    rates = [line["lr"] for line in Run(folder).metrics()]
    expected = [
        0.1 * lr_factor("cosine", epoch - 1 / per_epoch, epochs, 1.0)
        for epoch, epochs in ((1, 2), (2, 2), (3, 4), (4, 4))
    ]
    assert rates == pytest.approx(expected)
    with pytest.raises(UserError, match="--epochs is 3 and the run has begun epoch 4"):
        train(folder, longer.with_epochs(3), resume=True)


def scored(scores: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let validation give these scores, epoch after epoch."""
    left = iter(scores)

    def evaluate(models: Any, *rest: Any, **options: Any) -> Classified:
        score = ClassScores(next(left), 0.5, ())
        return Classified((score,) * len(models), score, 1)

    monkeypatch.setattr(validation, "evaluate", evaluate)


@pytest.mark.slow
def test_patience_ends_a_run_also_across_a_stop_and_more_patience_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, straight = tmp_path / "run", tmp_path / "straight"
    scores = (0.3, 0.6, 0.6, 0.5, 0.7)
    scored(scores, monkeypatch)
    config = replace(PLAIN, epochs=5, patience=2)
    assert not train(folder, config, steps=12)  # within the third epoch
    assert train(folder, config, resume=True)
    run = Run(folder)
    assert len(run.metrics()) == 4
    line = "--patience 2: no epoch since 2 is better, so the run ends after epoch 4 of 5"
    assert capfd.readouterr().err.count(line) == 1
    best = torch.load(run.checkpoint("best"), weights_only=True)
    assert best["step"] == run.metrics()[1]["step"]
    assert run.weights(1).is_file()
    assert train(folder, config, resume=True)  # it has ended
    assert len(Run(folder).metrics()) == 4
    assert train(folder, replace(config, patience=3), resume=True)
    scored(scores, monkeypatch)
    assert train(straight, replace(config, patience=0))
    assert digest(folder) == digest(straight)


@pytest.mark.slow
def test_time_that_is_up_stops_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Run(folder).prepare(0)
    stop = StopRequest(seconds=0.0)
    assert stop.overdue and not StopRequest(seconds=1e9).overdue and not StopRequest().overdue
    trainer = build_trainer(PLAIN, Run(folder), None, stop)
    assert not trainer.fit()
    assert Run(folder).checkpoint().is_file() and stop.exit_code == 0


@pytest.mark.slow
def test_the_command_says_how_a_limited_run_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = ["--arch", "resnet8", "--train-fraction", "0.2", "--epochs", "1"]
    options += ["--executor", "sequential", "--out", str(folder)]
    assert command(*options, "--max-steps", "2") == 0
    again = f"stopped at step 2 by --max-steps 2; continue with --resume {folder} --max-steps 0\n"
    assert capfd.readouterr().err.endswith(again)
    resume = ["--resume", str(folder), "--max-steps", "0"]
    assert command(*resume, "--max-time", "0.01s", "--epochs", "2") == 0
    again = f"stopped at step 2 by --max-time 0.01s; continue with --resume {folder}\n"
    output = capfd.readouterr().err
    assert output.endswith(again)
    assert "the run has --epochs 1, then 2 from step 2 (after epoch 0): from here on" in output
    assert command(*resume, "--lr", "0.3") == 2
    assert "--lr is 0.3 and the run" in capfd.readouterr().err
    assert command(*resume, "--max-time", "1h") == 0
    assert len(Run(folder).metrics()) == 2


@pytest.mark.slow
@pytest.mark.processes
def test_ranks_stop_together_and_go_on_longer(tmp_path: Path) -> None:
    """On rows of students the bits are those of one process."""
    straight, folder = tmp_path / "straight", tmp_path / "run"
    assert train(straight, replace(PLAIN, epochs=4, patience=3))
    options = ["--arch", "resnet8", "--epochs", "2", "--train-fraction", "0.25", "--seed", "5"]
    options += ["--executor", "sequential", "--schedule", "constant", "--out", str(folder)]
    output = finish(start(2, *options, "--max-steps", "7"))
    assert output.count("stopped at step 7 by --max-steps 7") == 1
    finish(start(2, "--resume", str(folder), "--max-steps=0", "--epochs=4", "--patience=3"))
    assert not differences(content(folder), content(straight))
