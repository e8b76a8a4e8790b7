"""Cohorts that learn displacements of pairs: trained, killed, resumed, evaluated by command."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_cases import json_of
from distributed_cases import finish
from kill_cases import start, wait_for_checkpoints
from pair_cases import config_of_pairs, make_pairs
from resume_cases import digest, train

from dml_fast import cli
from dml_fast.compare import main as compare
from dml_fast.config import TrainConfig
from dml_fast.data import PairSet
from dml_fast.data.offset_files import offsets_text
from dml_fast.evaluate import main as evaluate
from dml_fast.predict import main as predict
from dml_fast.report import main as report
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import open_data
from dml_fast.select import main as select
from dml_fast.train import main as train_command

OPTIONS = "--arch displacement_8 --patch 12 --search 3 --batch-size 16 --device cpu"
CHANCE = 3.6  # px: the mean distance of two displacements that have nothing to do with each other


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two students that learned from 300 pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    data = make_pairs(folder / "pairs.npz", 300)
    options = f"--data {data} {OPTIONS} --epochs 7 --lr 0.04 --out {folder / 'run'}"
    assert cli.run(train_command, options.split()) == 0
    return folder / "run"


def scores(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    return json_of(evaluate, capsys, *arguments, "--device", "cpu")


@pytest.mark.slow
def test_students_learn_and_are_measured_in_pixels(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = Run(run).metrics()[-1]
    assert line["ensemble_val_acc"] > 0.4  # of 49 displacements
    found = scores(capsys, run, "--split", "val")
    assert found["images"] == found["labelled"] == 30
    assert found["ensemble_error_px"] == pytest.approx(line["ensemble_val_error_px"], rel=1e-12)
    assert found["ensemble_error_px"] < CHANCE / 3
    assert found["epoch"] == line["epoch"]  # of best.pt
    # another scene, whose pairs are displaced, and tell by how much
    other = make_pairs(tmp_path / "other.npz", 100, aligned=False, offset=True, seed=1)
    found = scores(capsys, run, "--data", other)
    assert found["images"] == 100
    for entry in found["students"]:
        assert entry["error_px"] < CHANCE / 2
        assert entry["within_1.5px"] > 0.6 > entry["recall"].get("0,0", 0) - 0.5
    assert found["ensemble_error_px"] < CHANCE / 3
    hidden = make_pairs(tmp_path / "hidden.npz", 100, aligned=False, seed=1)
    wrong = scores(capsys, run, "--data", hidden)
    assert wrong["ensemble_error_px"] > found["ensemble_error_px"] + 0.7  # the untold bias
    assert evaluate([str(run), "--data", other, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "within 1.5 px, %" in printed
    assert "100 pairs of the test split" in printed


@pytest.mark.slow
def test_other_commands_say_pairs_or_refuse_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report([str(run), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "pairs/s" in printed
    assert "Pairs per second: median epoch, a pair counted once for" in printed
    assert "mage" not in printed
    for command, arguments, message in (
        (predict, f"{run} x.npz --out -", "learned displacements of pairs: python -m dml_fast.reg"),
        (select, f"{run} --acquire 5 --out -", "which need no labels: give a run that learned cl"),
        (evaluate, f"{run} --device cpu", "has no test split: give --split val"),
        (evaluate, f"{run} --data digits --device cpu", "students take pairs of 12 x 12 pixels"),
        (evaluate, f"{run} --data pairs:no.npz --device cpu", "no.npz does not exist"),
    ):
        assert cli.run(command, arguments.split()) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1


def test_rounds_of_labels_and_comparisons_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_pairs(tmp_path / "p.npz", 20)
    simulated = f"--simulate --start 5 --acquire 5 --rounds 2 --out {tmp_path / 'rounds'}"
    assert cli.run(select, f"{simulated} --data {data} {OPTIONS}".split()) == 2
    assert "has pairs, which need no labels: give data with classes" in capsys.readouterr().err
    compared = f"--methods independent,dml --data {data} {OPTIONS} --out {tmp_path / 'compared'}"
    assert cli.run(compare, compared.split()) == 2
    assert "are compared on test rows and --data pairs:" in capsys.readouterr().err


@pytest.fixture
def offsets(tmp_path: Path) -> str:
    path = tmp_path / "given.tsv"
    path.write_text(offsets_text({str(k): (k % 3 - 1, 1) for k in range(0, 150, 2)}))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"dither": 1.5, "amp": True}, {"epoch_steps": 5, "method": "distill", "symmetrise": False}],
)
def test_a_run_stopped_within_an_epoch_ends_as_one_that_never_was(
    tmp_path: Path, offsets: str, options: dict[str, Any]
) -> None:
    data = make_pairs(tmp_path / "p.npz", 150)
    config = config_of_pairs(data, epochs=2, offsets=offsets, **options)
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert train(whole, config)
    steps = Run(whole).metrics()[0]["step"]
    assert not train(split, config, steps=steps - 1)
    Path(offsets).unlink()  # the run has its own copy
    assert not train(split, config, steps=steps + 2, resume=True)
    assert train(split, config, resume=True)
    assert digest(split) == digest(whole)
    used = open_data(Run(split)).train
    kept = open_data(Run(split), unlabelled=True).train
    assert isinstance(used, PairSet)
    assert isinstance(kept, PairSet)
    assert len(kept) == 135
    assert 60 < len(used) < 75
    assert used.offset.tolist() == [[int(name) % 3 - 1, 1] for name in used.names]


@pytest.mark.processes
@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_never_was(tmp_path: Path) -> None:
    data = make_pairs(tmp_path / "p.npz", 150)
    given = ("--data", data, *OPTIONS.split(), "--dither", "1", "--epochs", "3")
    options = (*given, "--save-every", "3", "--seed", "4")
    whole, split = tmp_path / "whole", tmp_path / "split"
    finish(start(whole, *options, "--out", str(whole)))
    process = start(split, *options, "--out", str(split))
    wait_for_checkpoints(process, split, 4)
    process.kill()
    finish(process, -signal.SIGKILL)
    assert Run(split).metrics()
    finish(start(split, "--resume", str(split)))
    assert digest(split) == digest(whole)


@pytest.mark.slow
def test_threads_train_as_one_student_after_the_other(tmp_path: Path) -> None:
    data = make_pairs(tmp_path / "p.npz", 120)
    digests = set()
    for executor in ("sequential", "threads"):
        config = config_of_pairs(data, cohort=3, epochs=1, dither=1.0, executor=executor)
        assert train(tmp_path / executor, config)
        digests.add(digest(tmp_path / executor))
    assert len(digests) == 1


def test_a_run_is_not_continued_with_other_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_pairs(tmp_path / "p.npz", 40)
    config = config_of_pairs(data, epochs=1)
    assert not train(tmp_path / "run", config, steps=1)
    make_pairs(tmp_path / "p.npz", 40, seed=1)
    assert cli.run(train_command, ["--resume", str(tmp_path / "run")]) == 2
    assert "was trained on other rows or labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--labels x.tsv", "--labels means nothing with --data pairs:"),
        ("--small-loss 0.2", "--small-loss means nothing with --data pairs:"),
        ("--no-augment", "--augment means nothing with --data pairs:"),
        ("--views per-student", "--views per-student means nothing with --data pairs:"),
        ("--offsets no.tsv", "no.tsv cannot be read (No such file or directory): give --offsets"),
        ("--search 20", "a margin of 8 pixels, and --search 20 needs 24"),
        ("--patch 17", "--patch is 17: give --patch 16 or less"),
        ("--batch-size 500", "batch size 500 does not fit 36 training rows"),
    ],
)
def test_options_that_do_not_fit_pairs_are_refused(
    tmp_path: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_pairs(tmp_path / "p.npz", 40)
    line = f"--data {data} {OPTIONS} {options} --out {tmp_path / 'run'}"
    assert cli.run(train_command, line.split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert not (tmp_path / "run").exists()


def test_images_have_no_options_of_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(train_command, ["--data", "digits", "--dither", "1"]) == 2
    assert "--dither means nothing with --data digits" in capsys.readouterr().err
    assert TrainConfig(data="pairs:x.npz").architectures == ("displacement_16",) * 2


def test_figures_agree_with_their_definition() -> None:
    from dml_fast.eval.displacements import displacement_scores

    rng = np.random.default_rng(0)
    answers, target = rng.integers(0, 25, (3, 200)), rng.integers(0, 25, 200)
    for scores, row in zip(displacement_scores(answers, target, 2), answers, strict=True):
        distances = [
            ((p // 5 - t // 5) ** 2 + (p % 5 - t % 5) ** 2) ** 0.5
            for p, t in zip(row.tolist(), target.tolist(), strict=True)
        ]
        assert scores.error == pytest.approx(sum(distances) / 200)
        assert scores.near == sum(d <= 1.5 for d in distances) / 200
        assert scores.to_json("x_").keys() == {"x_error_px", "x_within_1.5px"}
