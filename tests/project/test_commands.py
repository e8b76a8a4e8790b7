"""Each command once as users start it: a fresh interpreter, from the command line to its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.compat]

TRAIN = ("--arch", "resnet8", "--epochs", "1", "--train-fraction", "0.1", "--device", "cpu")


def command(module: str, *arguments: object) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "run"
    command("dml_fast.train", "--cohort", 2, *TRAIN, "--out", folder)
    return folder


def test_train_leaves_a_file_per_student(trained: Path) -> None:
    students = sorted(path.name for path in trained.glob("*.safetensors"))
    assert students == ["student_0.safetensors", "student_1.safetensors"]


def test_evaluate_prints_json(trained: Path) -> None:
    assert json.loads(command("dml_fast.evaluate", trained, "--json"))["images"] > 0


def test_predict_writes_classes(trained: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black.png")
    printed = command("dml_fast.predict", trained, tmp_path, "--out", tmp_path / "classes.csv")
    assert "classes of 1 images" in printed
    assert (tmp_path / "classes.csv").read_text().startswith("path,class_1,probability_1,")


def test_report_writes_curves(trained: Path) -> None:
    command("dml_fast.report", trained)
    assert (trained / "curves.png").is_file()


def test_export_writes_weights(trained: Path, tmp_path: Path) -> None:
    command("dml_fast.export", trained, "--out", tmp_path / "student.safetensors")
    assert (tmp_path / "student.safetensors").is_file()


def test_torchrun_trains_two_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = ("--standalone", "--nproc-per-node", 2, "-m", "dml_fast.train")
    command("torch.distributed.run", *launcher, "--cohort", 2, *TRAIN, "--out", folder)
    assert len(list(folder.glob("*.safetensors"))) == 2
