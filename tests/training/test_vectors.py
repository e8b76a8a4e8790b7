"""Cohorts that read vectors in two views: trained, resumed, evaluated and predicted by command."""

from __future__ import annotations

import csv
import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed_cases import finish
from kill_cases import start, wait_for_checkpoints
from resume_cases import digest, train
from vector_cases import CLASSES, PARTS, two_views

from dml_fast import cli
from dml_fast.config import TrainConfig
from dml_fast.data import open_dataset
from dml_fast.evaluate import main as evaluate
from dml_fast.predict import main as predict
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import Trained
from dml_fast.train import main as train_command

OPTIONS = "--views levels --epochs 3 --batch-size 16 --lr 0.05 --device cpu"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_views(tmp_path_factory.mktemp("vectors") / "rows.npz")


@pytest.fixture(scope="module")
def run(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four students, of which two read each view."""
    folder = tmp_path_factory.mktemp("vectors") / "run"
    options = f"--data vectors:{rows} --cohort 4 {OPTIONS} --out {folder}"
    assert cli.run(train_command, options.split()) == 0
    return folder


def scores(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert evaluate([*map(str, arguments), "--json", "--device", "cpu"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def predicted(out: Path, *arguments: object) -> list[dict[str, str]]:
    options = ["--out", str(out), "--device", "cpu"]
    assert predict([*map(str, arguments), *options]) == 0
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_students_read_their_views_and_learn(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [state["hidden.weight"].shape[1] for state in Trained.load(Run(run), "last").states]
    assert sizes == [5, 3, 5, 3]
    found = scores(capsys, run)
    assert found["images"] == PARTS["test"]
    assert min(student["accuracy"] for student in found["students"]) > 0.6
    assert found["ensemble_accuracy"] > 0.8


def test_two_students_read_one_view_each(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--data vectors:{rows} --levels b,a {OPTIONS} --out {tmp_path / 'run'}"
    assert cli.run(train_command, options.split()) == 0
    states = Trained.load(Run(tmp_path / "run"), "last").states
    assert [state["hidden.weight"].shape[1] for state in states] == [3, 5]
    assert scores(capsys, tmp_path / "run")["ensemble_accuracy"] > 0.8


@pytest.mark.parametrize("student", ["0", "1", "ensemble"])
def test_predict_agrees_with_evaluate(
    run: Path, rows: Path, tmp_path: Path, student: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = scores(capsys, run)
    lines = predicted(tmp_path / "p.csv", run, rows, "--student", student)
    assert f"classes of {sum(PARTS.values())} rows" in capsys.readouterr().out
    with np.load(rows) as file:
        assert [line["name"] for line in lines] == file["id"].tolist()
        test = file["split"] == "test"
        right = np.array([line["class_1"] for line in lines])[test] == file["y"][test]
    mine = [s["accuracy"] for s in found["students"]]
    wanted = found["ensemble_accuracy"] if student == "ensemble" else mine[int(student)]
    assert right.mean() == pytest.approx(wanted)


def test_rows_without_labels_are_predicted_and_embedded(
    run: Path, rows: Path, tmp_path: Path
) -> None:
    with np.load(rows) as file:
        views = {name: file[name][:7].astype(np.float64) for name in ("x_b", "x_a")}
    np.savez(tmp_path / "new.npz", **views)
    out = ("--features", tmp_path / "f.npz", "--student", "1")
    lines = predicted(tmp_path / "p.csv", run, tmp_path / "new.npz", *out)
    known = predicted(tmp_path / "q.csv", run, rows, "--student", "1")[:7]
    assert [line["name"] for line in lines] == [str(i) for i in range(7)]
    for mine, theirs in zip(lines, known, strict=True):  # a batch of 7 may be rounded otherwise
        for key in mine.keys() - {"name"}:
            expected = (
                theirs[key] if "class" in key else pytest.approx(float(theirs[key]), abs=1e-6)
            )
            assert (mine[key] if "class" in key else float(mine[key])) == expected
    with np.load(tmp_path / "f.npz") as file:
        assert file["features"].shape == (7, 64) and file["names"].tolist() == [*"0123456"]


def test_other_rows_are_evaluated_by_the_features_and_classes_of_the_run(
    run: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = scores(capsys, run)
    with np.load(rows) as file:
        test = {name: file[name][file["split"] == "test"] for name in ("x_a", "x_b", "y")}
    other = tmp_path / "other.npz"
    np.savez(other, **test)
    again = scores(capsys, run, "--data", f"vectors:{other}")
    assert again["students"] == found["students"]
    few = {name: array[test["y"] == CLASSES[1]] for name, array in test.items()}
    np.savez(other, **few)  # one class, which is still the second of the run's
    recall = scores(capsys, run, "--data", f"vectors:{other}")["students"][0]["recall"]
    assert recall[CLASSES[1]] == pytest.approx(found["students"][0]["recall"][CLASSES[1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_b": None}, "has x_a and no x_b, which the run's students read: add it"),
        ({"x_b": np.ones((60, 4))}, "x_b has 4 columns, and the run's students take vectors of 3"),
        ({"y": np.array(["mule"] * 60)}, "the class 'mule' in y, which is none of the 3 classes"),
        ({"y": np.array([""] * 60)}, "none of 60 rows of .* has a label"),
        ({"split": np.array(["val"] * 60)}, "no row whose split is test: give another --split"),
    ],
)
def test_rows_that_do_not_fit_the_run_are_refused(
    run: Path, tmp_path: Path, change: dict[str, Any], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = tmp_path / "other.npz"
    whole = {"x_a": np.ones((60, 5)), "x_b": np.ones((60, 3)), "y": np.array([CLASSES[0]] * 60)}
    np.savez(other, **{name: a for name, a in (whole | change).items() if a is not None})
    arguments = [str(run), "--data", f"vectors:{other}", "--device", "cpu"]
    capsys.readouterr()
    assert cli.run(evaluate, arguments) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert re.search(message, printed), printed


@pytest.mark.slow
def test_a_run_stopped_within_an_epoch_ends_as_one_that_never_was(
    rows: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        data=f"vectors:{rows}", views="levels", cohort=3, epochs=3, batch_size=16, device="cpu",
        labels_per_class=6, seed=5,
    )  # fmt: skip
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert train(whole, config)
    steps = Run(whole).metrics()[0]["step"]
    assert not train(split, config, steps=steps - 1)
    features = (split / "features.npz").read_bytes()
    assert not train(split, config, steps=steps + 2, resume=True)
    assert train(split, config, resume=True)
    assert digest(split) == digest(whole)
    assert (
        (split / "features.npz").read_bytes() == features == (whole / "features.npz").read_bytes()
    )


@pytest.mark.processes
def test_a_killed_run_ends_as_one_that_never_was(rows: Path, tmp_path: Path) -> None:
    data = ("--data", f"vectors:{rows}", "--views", "levels", "--levels", "b,a", "--device", "cpu")
    options = (*data, "--epochs", "12", "--batch-size", "8", "--save-every", "4", "--seed", "4")
    whole, split = tmp_path / "whole", tmp_path / "split"
    finish(start(whole, *options, "--out", str(whole)))
    process = start(split, *options, "--out", str(split))
    for _ in range(2):
        wait_for_checkpoints(process, split, 3)
        process.kill()
        finish(process, -signal.SIGKILL)
        process = start(split, "--resume", str(split))
    finish(process)
    assert digest(split) == digest(whole)
    assert (split / "features.npz").read_bytes() == (whole / "features.npz").read_bytes()


def test_features_do_not_depend_on_which_labels_are_shown(rows: Path) -> None:
    spec = f"vectors:{rows}"
    shown = {"labels_per_class": 6}
    whole, few, left_out = (
        open_dataset(spec, levels=(), **options)  # type: ignore[arg-type]
        for options in ({}, shown, {**shown, "unlabelled_share": 0.0})
    )
    assert len(few.train) == len(whole.train) == PARTS["train"]
    assert len(left_out.train) == 6 * len(CLASSES)
    assert whole.features and few.features and left_out.features
    assert whole.features.digest == few.features.digest == left_out.features.digest
    assert len({whole.fingerprint, few.fingerprint, left_out.fingerprint}) == 3
