"""A file that names code does not get it run, unless the user names it too."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from dml_fast import cli, evaluate, export, predict, train
from dml_fast.config import TrainConfig
from dml_fast.engine import Precision
from dml_fast.errors import UserError
from dml_fast.models import InputSpec
from dml_fast.models.pretrained import check_pretrained, is_run
from dml_fast.runs.trained import weights_of_run
from dml_fast.runs.weights import load_student
from dml_fast.training.start import Start, weights_to_start
from dml_fast.training.students import build_cohort

CODE = """
import sys
from torch import nn

sys.code_ran = True

def build(num_classes, in_channels, image_size):
    height, width = image_size
    return nn.Sequential(
        nn.Flatten(), nn.Linear(in_channels * height * width, 9), nn.Linear(9, num_classes)
    )
"""
OPTIONS = ["--epochs", "1", "--batch-size", "16", "--train-fraction", "0.1", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run whose students are built by a module that lies in its folder."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    folder.mkdir()
    (folder / "notes_of_a_run.py").write_text(CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        arguments = [*OPTIONS, "--arch", "notes_of_a_run:build", "--out", str(folder)]
        assert train.main(arguments) == 0
    return folder


@pytest.fixture
def ran(run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Forget the module, and return whether it was imported since."""
    monkeypatch.syspath_prepend(str(run))
    monkeypatch.delitem(sys.modules, "notes_of_a_run", raising=False)
    monkeypatch.setattr(sys, "code_ran", False, raising=False)
    return lambda: bool(sys.code_ran)  # type: ignore[attr-defined]


Command = Callable[[Sequence[str]], int]


@pytest.mark.parametrize(
    ("command", "arguments", "advice"),
    [
        (evaluate.main, ["RUN"], "--allow-code"),
        (export.main, ["RUN", "--out", "OUT.safetensors"], "--allow-code"),
        (predict.main, ["RUN", "IMAGE.png", "--out", "-"], "--allow-code"),
        (train.main, ["--resume", "RUN"], "--arch"),
    ],
)
def test_a_run_gets_its_code_run_only_if_the_user_names_it(
    command: Command,
    arguments: list[str],
    advice: str,
    run: Path,
    ran: Callable[[], bool],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    names = {
        "RUN": str(run),
        "OUT.safetensors": str(tmp_path / "out.safetensors"),
        "IMAGE.png": str(tmp_path / "image.png"),
    }
    given = [names.get(argument, argument) for argument in arguments]
    for more in ([], [advice, "notes_of_a_run:other"]):
        assert cli.run(command, [*given, *more]) == 2
        assert not ran()
    said = capsys.readouterr().err.splitlines()
    assert (
        f"{run} names code to run, notes_of_a_run:build: if you trust it, add {advice}" in said[0]
    )
    assert cli.run(command, [*given, advice, "notes_of_a_run:build"]) == 0
    assert ran()


def test_a_students_file_does_not_get_its_code_run(run: Path, ran: Callable[[], bool]) -> None:
    path = run / "student_1.safetensors"
    with pytest.raises(
        UserError, match=r"names code to run.*allow_code=\['notes_of_a_run:build'\]"
    ):
        load_student(path)
    assert not ran()
    model, _ = load_student(path, allow_code=["notes_of_a_run:build"])
    assert ran() and isinstance(model, nn.Sequential)


def test_a_teacher_does_not_get_its_code_run(
    run: Path, ran: Callable[[], bool], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*OPTIONS, "--cohort", "1", "--arch", "resnet8", "--out", str(tmp_path / "new")]
    assert cli.run(train.main, [*arguments, "--teachers", f"{run}:0"]) == 2
    assert not ran()
    assert "names code to run, notes_of_a_run:build" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["", "best.pt", "last.pt", "student_1.safetensors"])
def test_weights_are_taken_from_a_run_without_its_code(
    source: str, run: Path, ran: Callable[[], bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student K gets those of student K; the network is another function's."""
    (tmp_path / "net_of_a_user.py").write_text(CODE.replace("sys.code_ran = True", ""))
    monkeypatch.syspath_prepend(str(tmp_path))
    config = TrainConfig(arch="net_of_a_user:build", pretrained=str(run / source))
    check_pretrained(config.pretrained, config.architectures)
    cohort = build_cohort(
        config,
        Precision.choose(False, "auto", torch.device("cpu")),
        num_classes=10,
        inputs=[InputSpec("image", (1, 8, 8))],
        start=Start("--pretrained", config.pretrained, weights_to_start(config)),
    )
    assert not ran()
    for k, student in enumerate(cohort.students):
        number = 1 if source.startswith("student") else k
        state = load_file(run / f"student_{number}.safetensors")
        assert torch.equal(student.model[1].weight, state["1.weight"])  # type: ignore[index]
    del sys.modules["net_of_a_user"]


def test_a_run_with_too_few_students_is_refused(run: Path) -> None:
    config = TrainConfig(cohort=3, arch="resnet8", pretrained=str(run))
    with pytest.raises(UserError, match=r"has 2 students and this run 3: give the file of one"):
        weights_to_start(config)


def test_a_run_without_checkpoints_gives_no_weights(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "config.json", tmp_path)
    with pytest.raises(UserError, match="has no checkpoint to start from: give one of its files"):
        weights_of_run(str(tmp_path))


def test_a_config_json_of_another_program_makes_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["ResNetForImageClassification"]}')
    (tmp_path / "best.pt").write_bytes(b"PK")
    check_pretrained(str(tmp_path / "best.pt"), ["resnet8"])
    assert not is_run(str(tmp_path / "best.pt")) and not is_run(str(tmp_path))
