"""A run with averages of weights: what evaluate, predict and export take, and what they refuse."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_cases import json_of, refusal_of
from resume_cases import SHORT
from resume_cases import train as train_here
from run_cases import reconfigure
from safetensors.torch import load_file

from dml_fast import evaluate, export, predict
from dml_fast.config import TrainConfig
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import Trained
from dml_fast.runs.weights import load_student


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("averages") / "run"
    short: dict[str, Any] = {**SHORT, "epochs": 1, "train_fraction": 0.1, "batch_size": 24}
    assert train_here(path, TrainConfig(**short, ema=0.5, weights="ema", device="cpu"))
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "run"))


def test_validation_and_evaluate_measure_the_averages(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [line] = Run(folder).metrics()
    result = json_of(
        evaluate.main, capsys, folder, "--split", "val", "--device", "cpu", "--weights", "ema"
    )
    recorded = [student["val_acc"] for student in line["students"]]
    assert result["weights"] == "ema" and result["ensemble_accuracy"] == line["ensemble_val_acc"]
    for key in ("accuracy", "val_acc"):
        assert [student[key] for student in result["students"]] == recorded


def test_the_students_own_weights_are_others_and_it_is_said(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("dml_fast"), "propagate", True)
    caplog.set_level(logging.INFO)
    result = json_of(evaluate.main, capsys, folder, "--split", "val", "--device", "cpu")
    assert result["weights"] == "student"
    assert [student["val_acc"] for student in result["students"]] == [None, None]
    assert "was validated by averages of weights, and these are the students' own" in caplog.text
    own, averages = (Trained.load(Run(folder), "last", weights=w) for w in ("student", "ema"))
    for mine, theirs in zip(own.states, averages.states, strict=True):
        assert mine.keys() == theirs.keys()
        assert any(not torch.equal(mine[name], theirs[name]) for name in mine)


def test_export_and_the_end_of_training_write_the_averages(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (str(folder), "--student", "1", "--checkpoint", "last", "--weights", "ema")
    assert export.main(arguments) == 0
    assert "averages of weights, student 1" in capsys.readouterr().out
    exported = load_file(folder / "student_1-last-ema.safetensors")
    final = load_file(folder / "student_1-ema.safetensors")
    own = load_file(folder / "student_1.safetensors")
    assert all(torch.equal(exported[name], final[name]) for name in final)
    assert any(not torch.equal(own[name], final[name]) for name in final)
    model, _ = load_student(folder / "student_1-ema.safetensors")
    state = Trained.load(Run(folder), "last", weights="ema").model(1).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_predict_takes_the_averages(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.new("L", (8, 8), 99).save(tmp_path / "grey.png")
    rows = []
    for weights in ("student", "ema"):
        out = tmp_path / f"{weights}.csv"
        files = str(tmp_path / "grey.png"), "--out", str(out), "--device", "cpu"
        assert predict.main([str(folder), *files, "--weights", weights, "--student", "0"]) == 0
        rows.append(next(iter(csv.DictReader(out.open()))))
    assert "averages of weights, student 0" in capsys.readouterr().out
    assert float(rows[0]["probability_1"]) != float(rows[1]["probability_1"])


def test_a_run_without_averages_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reconfigure(copy, ema="off", weights="student")
    for command, *arguments in (
        (evaluate.main, copy),
        (export.main, copy),
        (predict.main, copy, copy / "config.json", "--out", "-"),
    ):
        printed = refusal_of(command, capsys, *arguments, "--weights", "ema")
        assert f"--weights ema is for averages of weights, and {copy} kept none: leave" in printed


def test_a_checkpoint_that_lost_its_averages_is_damaged(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "best.pt").unlink()  # another name of last.pt
    state = torch.load(copy / "last.pt", weights_only=True)
    for student in state["students"]:
        del student["average"]
    torch.save(state, copy / "last.pt")
    printed = refusal_of(evaluate.main, capsys, copy, "--checkpoint", "last", "--weights", "ema")
    assert "last.pt is damaged (it has no averages)" in printed
    assert json.loads((copy / "config.json").read_text())["config"]["ema"] == 0.5
