"""--init-from: which weights students start from, and how the run resumes without them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_cases import tree
from resume_cases import SHORT, digest, train

from dml_fast.config import TrainConfig
from dml_fast.errors import UserError
from dml_fast.runs import checkpoint
from dml_fast.runs.folder import Run
from dml_fast.training.build import build_trainer
from dml_fast.training.signals import StopRequest
from dml_fast.training.start import Start
from dml_fast.training.trainer import Trainer

pytestmark = pytest.mark.slow

PLAIN = TrainConfig(**{**SHORT, "epochs": 2}, executor="sequential", lr=0.3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a run: b"
    assert train(folder, PLAIN)
    return folder


def build(folder: Path, **options: Any) -> Trainer:
    Run(folder).prepare(0)
    return build_trainer(replace(PLAIN, **options), Run(folder), None, StopRequest())


def states(trainer: Trainer) -> list[dict[str, torch.Tensor]]:
    return [student.model.state_dict() for student in trainer.engine.cohort]


def equal(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """The names of the tensors that are the same, bit for bit."""
    assert mine.keys() == theirs.keys()
    return [name for name in mine if torch.equal(mine[name], theirs[name])]


def test_students_begin_as_those_of_the_best_epoch_or_all_as_one(run: Path, tmp_path: Path) -> None:
    best = [s["model"] for s in checkpoint.load(run / "best.pt")["students"]]
    last = [s["model"] for s in checkpoint.load(run / "last.pt")["students"]]
    assert len(equal(best[0], best[1])) < len(best[0])
    for mine, theirs in zip(states(build(tmp_path / "a", init_from=str(run))), best, strict=True):
        assert equal(mine, theirs) == [*theirs]
    alone = {"method": "independent", "cohort": 3, "init_from": f"{run}:1"}
    for mine in states(build(tmp_path / "b", **alone)):
        assert equal(mine, best[1]) == [*best[1]]
    without = tmp_path / "without"
    shutil.copytree(run, without, ignore=shutil.ignore_patterns("best.pt"))
    for mine, theirs in zip(
        states(build(tmp_path / "c", init_from=str(without))), last, strict=True
    ):
        assert equal(mine, theirs) == [*theirs]


def test_of_other_classes_the_head_is_new_and_differs_between_students(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """So students of one network's weights are different, and can teach each other."""
    best = checkpoint.load(run / "best.pt")["students"][1]["model"]
    head = ["classifier.weight", "classifier.bias"]
    data = {"data": f"folder:{tree(tmp_path / 'images')}", "batch_size": 4}
    with pytest.raises(UserError, match=r"--init-from .*:1 does not fit resnet8: 1 of 42 tensors"):
        build(tmp_path / "a", **data, init_from=f"{run}:1")  # images of three channels
    line = "has other classes than this run: the students' heads are new\n"
    assert capfd.readouterr().err.count(line) == 1
    first, second = states(build(tmp_path / "c", head="hash", bits=20, init_from=f"{run}:1"))
    line = "has another head than this run: the students' heads are new\n"
    assert capfd.readouterr().err.count(line) == 1
    body = [f"backbone.{name}" for name in best if name not in head]
    assert equal(first, second)[: len(body)] == body
    for name in body:
        assert torch.equal(first[name], best[name.removeprefix("backbone.")])
    assert not torch.equal(first["classifier.weight"], second["classifier.weight"])
    facts = Run(run).facts
    other = replace(facts, classes=("x", *facts.classes[1:]))
    config = replace(PLAIN, init_from=str(run))
    assert not Start.of(config, other).whole and Start.of(config, facts).whole


def test_what_cannot_begin_so_is_refused(run: Path, tmp_path: Path) -> None:
    for name, options, message in (
        ("a", {"init_from": f"{run}:1"}, r"same weights, and --method dml needs students that"),
        ("b", {"init_from": str(run), "cohort": 3}, r"has 2 students and this run 3: give the nu"),
        ("c", {"init_from": f"{run}:2"}, r"the students of that run are 0 to 1: give one of"),
        ("d", {"init_from": str(run), "arch": "resnet14"}, r"--init-from .* does not fit resnet14"),
    ):
        with pytest.raises(UserError, match=message):
            build(tmp_path / name, **options)


def test_a_run_resumes_without_the_run_that_it_began_from(run: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    shutil.copytree(run, given)
    config = replace(PLAIN, init_from=f"{given}:0", arch="wrn_10_1_drop0.3")
    with pytest.raises(UserError, match="does not fit wrn_10_1"):
        train(tmp_path / "no", config)
    config = replace(PLAIN, init_from=str(given))
    assert train(tmp_path / "straight", config)
    assert not train(tmp_path / "split", config, steps=3)
    shutil.rmtree(given)
    assert train(tmp_path / "split", config, resume=True)
    assert digest(tmp_path / "split") == digest(tmp_path / "straight")
