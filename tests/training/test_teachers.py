"""Teachers of a run: students of finished runs, heard as those runs trained them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from data_cases import batch_of
from resume_cases import SHORT, digest, train
from run_cases import facts_of_three_classes, facts_of_vectors

from dml_fast.config import TrainConfig
from dml_fast.errors import UserError
from dml_fast.models import InputSpec, create_model
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import Trained
from dml_fast.training.build import build_trainer
from dml_fast.training.signals import StopRequest
from dml_fast.training.teachers import RunTeacher, check_fit

DATA = TrainConfig(arch="resnet8", cohort=1, teachers="RUN")


def teacher(**changes: Any) -> RunTeacher:
    model = create_model("resnet8", num_classes=3, in_channels=1, image_size=8)
    return RunTeacher("RUN:1", "resnet8", model, facts_of_three_classes(**changes), 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ("a", "b")}, "RUN:1 knows 2 classes, and --data digits has 3: give a run on"),
        ({"classes": ("a", "c", "b")}, "RUN:1 calls class 1 'c', and --data digits calls it 'b'"),
        (
            {"inputs": (InputSpec("image", (3, 8, 8)),)},
            "takes images of 3 x 8 x 8, and --data digits gives images of 1 x 8 x 8",
        ),
        ({"retrieval": True}, "RUN:1 learned identities, and --data digits has classes"),
        ({"features": "0" * 64}, "takes other features of texts or vectors"),
        (
            {"inputs": facts_of_vectors().inputs, "mean": (), "std": ()},
            "takes vectors of 5 and vectors of 3 and vectors of 7, and",
        ),
    ],
)
def test_a_teacher_of_other_data_is_refused(changes: dict[str, Any], words: str) -> None:
    check_fit([teacher()], facts_of_three_classes(), DATA)
    with pytest.raises(UserError, match=words):
        check_fit([teacher(), teacher(**changes)], facts_of_three_classes(), DATA)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "independent"}, "--teachers means nothing with --method independent, which"),
        ({"method": "distill", "cohort": 2}, "--teachers means nothing with --method distill"),
        ({"teachers": "RUN,"}, "--teachers is 'RUN,': give runs, as in RUN,RUN:0"),
        ({"teachers": ""}, r"needs at least 2 students: give .*, or --teachers RUN"),
    ],
)
def test_options_that_mean_nothing_beside_teachers(options: dict[str, Any], words: str) -> None:
    DATA.check()
    with pytest.raises(UserError, match=words):
        replace(DATA, **options).check()


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two students."""
    folder = tmp_path_factory.mktemp("teachers") / "run"
    assert train(folder, TrainConfig(**{**SHORT, "epochs": 2}))
    return folder


@pytest.mark.slow
def test_a_teacher_gets_images_as_its_own_run_gave_them(
    taught: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path / "run")
    run.prepare(0)
    config = TrainConfig(arch="resnet8", cohort=1, teachers=f"{taught}:1,{taught}:0")
    trainer = build_trainer(config, run, None, StopRequest())
    mine, theirs = trainer.data, Run(taught).facts
    assert mine.mean != list(theirs.mean)
    batch = batch_of(trainer.loader, 0, 0)
    pixels = batch.inputs * torch.tensor(mine.std) + torch.tensor(mine.mean)
    images = (pixels - torch.tensor(theirs.mean)) / torch.tensor(theirs.std)
    best = Trained.load(Run(taught), "best")
    with torch.no_grad():
        said = [best.model(k)(images) for k in (1, 0)]
    before = trainer.engine.cohort.students[0].predict(batch.inputs, training=True)
    result = trainer.engine.step(batch.inputs, batch.target)
    for one, expected in zip(trainer.engine.teachers, said, strict=True):
        torch.testing.assert_close(one([batch.inputs]), expected, rtol=1e-4, atol=1e-4)
    own = before.log_softmax(-1)
    kl = [F.kl_div(own, t.softmax(-1), reduction="batchmean") for t in said]
    torch.testing.assert_close(result.kl[0], sum(kl) / 2, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cohort", [1, 2])
def test_a_run_goes_on_without_the_run_of_its_teachers(
    taught: Path, tmp_path: Path, cohort: int
) -> None:
    there = tmp_path / "there"
    shutil.copytree(taught, there)
    options = {**SHORT, "epochs": 2, "seed": 6, "cohort": cohort}
    config = TrainConfig(**options, teachers=f"{there}:1" if cohort == 1 else str(there))
    config.check()
    assert train(tmp_path / "straight", config)
    split = tmp_path / "split"
    assert not train(split, config, steps=3)
    shutil.rmtree(there)
    assert train(split, Run(split).config, resume=True)
    assert digest(split) == digest(tmp_path / "straight")
    assert len([*split.glob("teacher_*.safetensors")]) == cohort
    untaught = TrainConfig(**{**options, "method": "independent"})
    assert train(tmp_path / "untaught", untaught)
    weights = "student_0.safetensors"
    assert (tmp_path / "untaught" / weights).read_bytes() != (split / weights).read_bytes()
    (split / "teacher_0.safetensors").unlink()
    with pytest.raises(UserError, match=r"teacher_0.safetensors .*restore it"):
        train(split, Run(split).config, resume=True)


@pytest.mark.slow
def test_a_teacher_of_another_prior_or_that_is_not_trained_is_refused(
    taught: Path, tmp_path: Path
) -> None:
    config = TrainConfig(**SHORT, cohort=1, teachers=str(taught))
    with pytest.raises(UserError, match="was trained with --prior none and this run has --prior b"):
        train(tmp_path / "a", replace(config, prior="balance"))
    there = tmp_path / "there"
    shutil.copytree(taught, there)
    for path in there.glob("*.pt"):
        path.unlink()
    with pytest.raises(UserError, match="has no checkpoint to start from: train it for an epoch"):
        train(tmp_path / "b", replace(config, teachers=str(there)))
