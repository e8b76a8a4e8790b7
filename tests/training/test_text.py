"""Cohorts that read text: three levels, resumed bit for bit, evaluated, predicted and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from resume_cases import digest, train
from text_pairs import COUNT, PARTS, RELATIONS, text_pairs

from dml_fast.config import TrainConfig
from dml_fast.data import VectorSet
from dml_fast.errors import UserError
from dml_fast.eval.of_run import evaluate_run
from dml_fast.export import main as export
from dml_fast.predict import main as predict
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import Trained, open_data
from dml_fast.runs.weights import load_student

LEVELS = ("args", "pairs", "edges")
DIM = 40


def config(table: Path, **options: Any) -> TrainConfig:
    usual = {
        "data": f"text:{table}",
        "views": "levels",
        "levels": ",".join(LEVELS),
        "cohort": 3,
        "dim": DIM,
        "epochs": 4,
        "batch_size": 32,
        "lr": 0.03,
    }
    return TrainConfig(**(usual | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_pairs(tmp_path_factory.mktemp("pairs") / "pairs.tsv")


@pytest.fixture(scope="module")
def run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "run"
    assert train(folder, config(table))
    return folder


def test_three_students_read_three_levels_and_learn(run: Path) -> None:
    facts = Run.open(run).facts
    assert [spec.shape for spec in facts.inputs] == [(4 * (DIM // 2),), (DIM,), (DIM,)]
    assert facts.classes == RELATIONS
    found = evaluate_run(run, checkpoint="last", device="cpu")
    assert found["images"] == PARTS["test"]
    chance = 1 / len(RELATIONS)
    for score in [student["accuracy"] for student in found["students"]]:
        assert score > chance + 0.1
    assert found["ensemble_accuracy"] > chance + 0.2


def test_a_stopped_run_ends_as_one_that_never_was(run: Path, table: Path, tmp_path: Path) -> None:
    per_epoch = Run(run).metrics()[0]["step"]
    split = tmp_path / "split"
    assert not train(split, config(table), steps=per_epoch - 2)
    before = {name: (split / name).stat().st_ino for name in ("features.npz", "vocabulary.json")}
    assert not train(split, config(table), steps=2 * per_epoch, resume=True)
    assert train(split, config(table), resume=True)
    assert digest(split) == digest(run)
    for name, inode in before.items():  # the files were neither fitted nor written again
        assert (split / name).stat().st_ino == inode
        assert (split / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("student", range(3))
def test_without_teaching_a_student_is_that_of_a_cohort_of_its_level(
    table: Path, tmp_path: Path, student: int
) -> None:
    short = {"method": "independent", "epochs": 1, "device": "cpu"}
    weights = {}
    for levels in (",".join(LEVELS), LEVELS[student]):
        folder = tmp_path / levels
        assert train(folder, config(table, **short, levels=levels))
        weights[levels] = Trained.load(Run.open(folder), "last").states[student]
    three, one = weights.values()
    assert all(torch.equal(three[name], one[name]) for name in three)


def test_features_are_not_fitted_again_for_other_data(run: Path, tmp_path: Path) -> None:
    other = text_pairs(tmp_path / "other.tsv", seed=1)
    data = open_data(Run.open(run), f"text:{other}")
    assert data.features is not None
    assert data.features.digest == Run.open(run).facts.features
    found = evaluate_run(run, data=f"text:{other}", checkpoint="last", device="cpu")
    assert found["ensemble_accuracy"] > 1 / len(RELATIONS) + 0.2


def swapped(run: Path, table: Path, folder: Path) -> Path:
    """A copy of a run with the features of another, which have the same shapes."""
    assert train(folder / "other", config(table, epochs=1, train_fraction=0.95))
    copy = Path(shutil.copytree(run, folder / "copy"))
    for name in ("features.npz", "vocabulary.json"):
        shutil.copy(folder / "other" / name, copy / name)
    return copy


def test_features_of_another_run_are_refused(run: Path, table: Path, tmp_path: Path) -> None:
    copy = swapped(run, table, tmp_path)
    for use in (
        lambda: train(copy, config(table), resume=True),
        lambda: evaluate_run(copy, device="cpu"),
        lambda: predict([str(copy), str(table), "--out", str(tmp_path / "p.csv")]),
    ):
        with pytest.raises(UserError, match=r"holds other features \(features.npz, vocabulary.js"):
            use()
    (copy / "features.npz").unlink()
    with pytest.raises(UserError, match=r"features.npz cannot be read .*: restore it"):
        evaluate_run(copy, device="cpu")


def test_rows_of_a_file_are_predicted_as_in_evaluation(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = text_pairs(tmp_path / "new.tsv", seed=2, columns="arg2 arg1 id")
    out = tmp_path / "p.jsonl"
    options = ["--student", "ensemble", "--top", "3", "--device", "cpu", "--checkpoint", "last"]
    assert predict([str(run), str(new), "--out", str(out), *options]) == 0
    assert "of 400 rows" in capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == COUNT
    assert [line["name"] for line in lines[:2]] == ["pair 000", "pair 001"]
    labelled = text_pairs(tmp_path / "labelled.tsv", seed=2)
    true = [line.split("\t")[2] for line in labelled.read_text().splitlines()[1:]]
    parts = [line.split("\t")[1] for line in labelled.read_text().splitlines()[1:]]
    right = [line["classes"][0] == y for line, y in zip(lines, true, strict=True)]
    found = evaluate_run(run, data=f"text:{labelled}", checkpoint="last", device="cpu")
    test = [hit for hit, part in zip(right, parts, strict=True) if part == "test"]
    assert found["ensemble_accuracy"] == pytest.approx(np.mean(test))


@pytest.mark.parametrize("student", range(3))
def test_an_exported_student_reads_its_own_level(run: Path, tmp_path: Path, student: int) -> None:
    out = tmp_path / "student.safetensors"
    assert export([str(run), "--student", str(student), "--out", str(out)]) == 0
    model, header = load_student(out)
    assert header["view"] == student
    test = open_data(Run.open(run)).test
    assert isinstance(test, VectorSet)
    with torch.no_grad():
        logits = model(torch.from_numpy(test.views[student]))
    scores = evaluate_run(run, checkpoint="best", device="cpu")["students"][student]
    right = logits.argmax(1).numpy() == test.labels
    assert scores["accuracy"] == pytest.approx(right.mean())


def test_more_levels_than_students_are_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 3 views and the cohort 2 students"):
        train(tmp_path / "run", config(table, cohort=2))
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixup": 0.2}, "--mixup means nothing with --data .*, which has no images"),
        ({"skip_corrupt": True}, "--skip-corrupt means nothing with --data .*, which has no imag"),
        ({"arch": "resnet8"}, "resnet8 is a network for images and its inputs are vectors"),
        ({"levels": "words,chars,tags"}, "--levels is 'tags', which is none of words, chars, args"),
        ({"views": "shared", "levels": "words"}, "--levels is 'words' without --views levels"),
        ({"data": "text:none.tsv"}, "none.tsv cannot be read .*No such file"),
        ({"data": "text:"}, "data 'text:' needs a file: write text:FILE.tsv"),
        ({"classes": "cause,contrast"}, "line [0-9]+, has the label 'sequence', which is none of"),
    ],
)
def test_wrong_options_are_refused(
    table: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    wrong = config(table, **options)
    with pytest.raises(UserError, match=words):
        wrong.check()
        train(tmp_path / "run", wrong)
    assert not (tmp_path / "run" / "config.json").exists()
