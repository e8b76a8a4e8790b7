"""Rows without a label in a run: what the log says, what is refused, what an epoch's line means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dml_fast.config import TrainConfig
from dml_fast.data import open_dataset
from dml_fast.errors import UserError
from dml_fast.runs.folder import Run
from dml_fast.training.build import build_trainer
from dml_fast.training.signals import StopRequest
from dml_fast.training.trainer import Trainer
from dml_fast.training.unlabelled import settled

pytestmark = pytest.mark.usefixtures("logging_as_before")

FEW: dict[str, Any] = {
    "arch": "group_norm_net:build", "cohort": 3, "labels_per_class": 2, "batch_size": 100,
    "epochs": 1, "seed": 3,
}  # fmt: skip


def build(folder: Path, **options: Any) -> Trainer:
    run = Run(folder)
    run.prepare(0)
    return build_trainer(TrainConfig(**{**FEW, **options}), run, None, StopRequest())


def test_the_ramp_and_the_share_are_what_the_data_decides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def built(name: str, **options: Any) -> tuple[Trainer, str]:
        return build(tmp_path / name, **options), capsys.readouterr().err

    own, said = built("own", epochs=20)
    assert (own.config.kl_warmup, own.config.unlabelled_share) == (6.0, 0.67)
    line = "rows without a label, 67 % of each batch, teach by the mutual term alone"
    assert f"{line}, whose weight grows for 6 epochs (--kl-warmup)" in said
    assert Run(tmp_path / "own").config == own.config  # config.json has the numbers
    given, said = built("given", epochs=20, kl_warmup=0.0, unlabelled_share=0.5)
    assert (given.config.kl_warmup, given.config.unlabelled_share) == (0.0, 0.5)
    assert "50 % of each batch" in said and "grows" not in said
    without, said = built("without", labels_per_class=0, epoch_steps=7)
    assert (without.config.kl_warmup, without.config.unlabelled_share) == (0.0, 0.0)
    assert without.loader.steps_per_epoch == 7
    assert "digits" in said and "label" not in said
    _, said = built("none", labels_per_class=0, unlabelled_share=0.5)
    assert "--unlabelled-share 0.5: every training row has a label" in said


@pytest.mark.parametrize(
    ("batch", "columns", "labelled"),
    [(64, 1, 21), (64, 2, 22), (64, 4, 20), (64, 32, 32), (96, 2, 32), (4, 4, 1), (66, 3, 21)],
)
def test_only_the_usual_share_fits_the_columns_of_processes(
    batch: int, columns: int, labelled: int
) -> None:
    data = open_dataset("digits", labels_per_class=2)
    config = TrainConfig(labels_per_class=2, batch_size=batch)
    share = settled(config, data, columns).unlabelled_share
    assert isinstance(share, float) and batch - round(batch * share) == labelled
    if (batch, columns) in ((64, 1), (96, 2), (4, 4)):
        assert share == 0.67  # the number in the documents, wherever it fits or nothing does
    given = TrainConfig(labels_per_class=2, batch_size=batch, unlabelled_share=0.67)
    assert settled(given, data, columns).unlabelled_share == 0.67


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "independent"}, "--method independent learns nothing from the 1148 training"),
        ({"mixup": 0.2}, r"--mixup 0\.2 blends labels and 1148 training rows have none: leave it"),
        ({"cutmix": 1.0}, "--cutmix 1.0 blends labels .* or give --unlabelled-share 0"),
        ({"batch_size": 2000}, "has 1340 rows without a label .* --epoch-steps"),
    ],
)
def test_options_with_which_such_rows_do_nothing_are_refused(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        build(tmp_path / "run", **options)
    if "batch_size" not in options:
        build(tmp_path / "left_out", **{**options, "batch_size": 10, "unlabelled_share": 0.0})


def probabilities(trainer: Trainer, ids: Tensor) -> Tensor:
    """(K, N, C) float64, computed apart from the engine; the network has no batch statistics."""
    data = trainer.data
    pixels = torch.from_numpy(np.asarray(data.train.images)[ids.numpy()]).float() / 255  # type: ignore[union-attr]
    inputs = (pixels - torch.tensor(data.mean)[:, None, None]) / torch.tensor(data.std)[
        :, None, None
    ]
    with torch.no_grad():
        return torch.stack([m(inputs).double().softmax(-1) for m in trainer.engine.cohort.models])


@pytest.mark.parametrize("method", ["dml", "distill"])
def test_the_epochs_line_has_means_over_labelled_rows_and_over_all(
    method: str, tmp_path: Path
) -> None:
    """With a rate of almost 0, all steps of an epoch see the same networks."""
    trainer = build(
        tmp_path / "run", method=method, lr=1e-30, augment=False, weight_decay=0.0, kl_warmup=0.0
    )
    assert trainer.loader.steps_per_epoch == 1148 // 67
    batches = list(trainer.loader.epoch(trainer.config.total_epochs - 1))
    ids, target = (torch.cat([getattr(b, part) for b in batches]) for part in ("ids", "target"))
    p, labelled = probabilities(trainer, ids), target >= 0
    assert int(labelled.sum()) == 33 * len(batches)
    assert trainer.fit()
    students = Run(tmp_path / "run").metrics()[-1]["students"]
    teachers = {
        k: [0] if method == "distill" else [j for j in range(3) if j != k] for k in range(3)
    }
    for k in range(3) if method == "dml" else (1, 2):
        right = p[k][labelled].gather(1, target[labelled, None])
        kl = torch.stack([(p[j] * (p[j] / p[k]).log()).sum(1).mean() for j in teachers[k]]).mean()
        line = students[k]
        assert line["ce"] == pytest.approx(-right.log().mean().item(), rel=1e-5)
        assert line["kl"] == pytest.approx(kl.item(), rel=1e-5)
        assert line["loss"] == pytest.approx(line["ce"] + line["kl"], rel=1e-5)
        correct = p[k][labelled].argmax(1) == target[labelled]
        assert line["train_acc"] == pytest.approx(correct.double().mean().item())


def test_a_teacher_learns_from_labelled_rows_alone(tmp_path: Path) -> None:
    """The networks of a row see no other row, so that dropping rows changes no gradient."""
    trainer = build(tmp_path / "run", method="distill", augment=False)
    other = build(tmp_path / "other", method="distill", augment=False)
    batch = next(trainer.loader.epoch(0))
    known = batch.target >= 0
    assert isinstance(batch.inputs, Tensor)
    trainer.engine.step(batch.inputs, batch.target, learners=(0,))
    other.engine.step(batch.inputs[known], batch.target[known], learners=(0,))
    for mine, theirs in zip(
        *(t.engine.cohort.models[0].parameters() for t in (trainer, other)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
