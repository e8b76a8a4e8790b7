"""The files of a run folder belong to that run: those of another are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_cases import tree
from data_cases import pieces

from dml_fast import cli, evaluate, export, report, train
from dml_fast.config import TrainConfig
from dml_fast.data import open_dataset
from dml_fast.errors import UserError
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import Trained, open_data
from dml_fast.runs.weights import load_student

OPTIONS = ["--arch", "resnet8", "--epochs", "1", "--batch-size", "16", "--device", "cpu"]
DIGITS = ["--train-fraction", "0.1"]
Place = Callable[[str], Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that differ by seed, by the number of students, and by the data."""
    folder = tmp_path_factory.mktemp("runs")
    options = {
        "mine": DIGITS,
        "seed": [*DIGITS, "--seed", "1"],
        "larger": [*DIGITS, "--cohort", "3"],
        "data": ["--data", f"folder:{tree(folder / 'images')}"],
    }
    for name, own in options.items():
        assert train.main([*OPTIONS, *own, "--out", str(folder / name)]) == 0
    return folder


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs / "mine", tmp_path / "copied and renamed"))


def refusal(capsys: pytest.CaptureFixture[str], command: object, *arguments: object) -> str:
    capsys.readouterr()
    assert cli.run(command, [str(a) for a in arguments]) == 2  # type: ignore[arg-type]
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


def swap(path: Path, other: Path) -> None:
    """Replace a file, and not the other names that it may have."""
    path.unlink()
    shutil.copyfile(other, path)


@pytest.mark.parametrize("other", ["seed", "larger", "data"])
@pytest.mark.parametrize("which", ["best", "last", "previous"])
def test_a_checkpoint_of_another_run_is_refused(
    runs: Path, run: Path, other: str, which: str
) -> None:
    shutil.copyfile(run / "last.pt", run / "previous.pt")
    swap(run / f"{which}.pt", runs / other / "last.pt")
    option = {"seed": "--seed 1", "larger": "--cohort 3", "data": "--train-fraction 1"}[other]
    with pytest.raises(UserError, match=rf"{which}\.pt is of another run.*{option}.*: restore the"):
        Trained.load(Run(run), which)


def test_each_command_refuses_it(runs: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for which in ("best", "last"):
        swap(run / f"{which}.pt", runs / "seed" / "last.pt")
    for command, *arguments in (
        (evaluate.main, run, "--device", "cpu"),
        (evaluate.main, run, "--device", "cpu", "--checkpoint", "last"),
        (export.main, run),
        (train.main, "--resume", run),
    ):
        assert "is of another run" in refusal(capsys, command, *arguments)
    assert not (run / "student_0-best.safetensors").exists()


def test_the_same_configuration_on_other_images_is_another_run(runs: Path, run: Path) -> None:
    """As where a data set was replaced under its name between two runs."""
    description = json.loads((run / "config.json").read_text())
    description["data"]["fingerprint"] = "0" * len(description["data"]["fingerprint"])
    (run / "config.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"best\.pt is of another run.*other images or labels"):
        Trained.load(Run(run), "best")


def test_a_runs_own_files_are_read_under_any_name(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copied run, a link to it, and one that continued with options that may change."""
    assert Trained.load(Run(run), "best").step
    link = run.parent / "link"
    link.symlink_to(run)
    assert Trained.load(Run.open(link), "last").step
    description = json.loads((run / "config.json").read_text())
    description["config"] |= {"device": "auto", "executor": "sequential", "log_every": 3}
    (run / "config.json").write_text(json.dumps(description))
    assert Trained.load(Run(run), "best").step
    monkeypatch.chdir(run.parent)
    assert Trained.load(Run.open(run.name), "best").step


@pytest.mark.parametrize("other", ["data", "larger"])
def test_metrics_of_another_run_are_refused(
    runs: Path, run: Path, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What tells them apart: how many students of which architecture, and of how many epochs."""
    shutil.copyfile(runs / other / "metrics.jsonl", run / "metrics.jsonl")
    if other == "data":
        lines = (run / "metrics.jsonl").read_text().replace("resnet8", "resnet14")
        (run / "metrics.jsonl").write_text(lines)
    assert "metrics.jsonl is damaged (it is of another run" in refusal(capsys, report.main, run)


def test_weights_of_another_run_are_refused(runs: Path, run: Path) -> None:
    """What tells them apart: the architecture and the data."""
    path = run / "student_1.safetensors"
    load_student(path)
    swap(path, runs / "data" / "student_1.safetensors")
    with pytest.raises(UserError, match=r"student_1\.safetensors is of another run"):
        load_student(path)
    elsewhere = run / "other.safetensors"  # a name that no run gives
    path.rename(elsewhere)
    load_student(elsewhere)


@pytest.mark.parametrize("loader", ["resident", "fallback"])
def test_corrupt_files_that_a_run_skipped_do_not_make_other_data_of_it(
    loader: str, tmp_path: Path
) -> None:
    """The resident loader leaves them out of the data set, the others do not."""
    pieces(tmp_path / "data", 6, [(16, 16)])
    (tmp_path / "data" / "train" / "china" / "000.jpg").write_bytes(b"no image")
    config = TrainConfig(data=f"folder:{tmp_path / 'data'}", loader=loader, skip_corrupt=True)
    found = open_dataset(config.data, **config.data_options).fingerprint
    run = Run(tmp_path / "run")
    facts = SimpleNamespace(fingerprint=found, features="")
    vars(run).update(config=config, facts=facts)  # as if it had read its config.json
    assert open_data(run).fingerprint == found
    (tmp_path / "data" / "train" / "china" / "001.jpg").unlink()
    with pytest.raises(UserError, match="no longer holds the images"):
        open_data(run)


def test_a_run_of_before_there_were_heads_is_as_it_was(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    new = ("head", "bits", "mihash_weight", "mihash_bins", "mihash_scale")
    for _ in range(2):
        assert evaluate.main([str(run), "--json"]) == 0
        found.append(capsys.readouterr().out)
        description = json.loads((run / "config.json").read_text())
        assert description["data"].pop("head", "linear") == "linear"
        for name in new:
            description["config"].pop(name, None)
        (run / "config.json").write_text(json.dumps(description))
    assert found[0] == found[1] and json.loads(found[0])["students"]
    assert not set(new) & json.loads((run / "config.json").read_text())["config"].keys()
    assert train.main(["--resume", str(run), "--device", "cpu"]) == 0
