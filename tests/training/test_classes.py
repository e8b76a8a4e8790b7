"""What a run does about classes of unequal frequency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from resume_cases import SHORT, train

from dml_fast.config import TrainConfig
from dml_fast.errors import UserError
from dml_fast.runs.folder import Run
from dml_fast.training.build import build_trainer
from dml_fast.training.signals import StopRequest
from dml_fast.training.trainer import Trainer


def build(folder: Path, **options: Any) -> Trainer:
    config = TrainConfig(**{**SHORT, **options})
    return build_trainer(config, Run(folder), None, StopRequest())


def test_weights_are_inverse_to_the_labels_that_training_has(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    noisy = build(tmp_path / "all", class_weights="auto", label_noise=0.4)
    labels = noisy.data.train.labels
    expected = len(labels) / (10 * np.bincount(labels))
    torch.testing.assert_close(
        noisy.engine.term.class_weight, torch.from_numpy(expected).float(), rtol=1e-6, atol=0
    )
    assert f"class weights: from {expected.min():.3g} to" in capfd.readouterr().err
    few = [f"{name}\t{int(name) % 3}" for name in noisy.data.train.names[:40]]
    (tmp_path / "labels.tsv").write_text("\n".join(few))
    options = {"labels": str(tmp_path / "labels.tsv"), "unlabelled_share": 0.0, "batch_size": 9}
    weights = build(tmp_path / "few", class_weights="auto", **options).engine.term.class_weight
    assert weights is not None and (weights[3:] == 4).all()  # 40 / (10 * 1)
    assert "a class without a label counts as if it had one" in capfd.readouterr().err
    balanced = build(tmp_path / "balance", balance=True, **options)
    assert "balance: a class without a label is in no batch" in capfd.readouterr().err
    targets = torch.stack([batch.target for batch in balanced.loader.epoch(0)])
    assert (targets.sort(1).values.view(-1, 3, 3) == torch.arange(3).view(3, 1)).all()


def test_a_run_keeps_the_weights_that_it_began_with(tmp_path: Path) -> None:
    """The user's file may change, or go."""
    file = tmp_path / "weights.tsv"
    file.write_text("".join(f"{c}\t{1 + c / 2}\n" for c in range(10)))
    config = TrainConfig(**{**SHORT, "epochs": 1}, class_weights=str(file))
    assert not train(tmp_path / "run", config, steps=2)
    file.unlink()
    resumed = Run(tmp_path / "run")
    trainer = build_trainer(config, resumed, resumed.folder, StopRequest())
    torch.testing.assert_close(trainer.engine.term.class_weight, 1 + torch.arange(10) / 2)
    with pytest.raises(UserError, match=r"weights\.tsv cannot be read .* a file, or auto"):
        build(tmp_path / "new", class_weights=str(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"balance": True, "data": "market1501:d"},
            "--balance means nothing with --data market1501:d",
        ),
        (
            {"balance": True, "data": "pairs:p.npz"},
            "--balance means nothing with --data pairs:p.npz",
        ),
        (
            {"class_weights": "auto", "data": "pairs:p.npz"},
            "--class-weights means nothing with --data",
        ),
        (
            {"class_weights": "auto", "data": "market1501:d"},
            "--class-weights means nothing with --data",
        ),
        (
            {"class_weights": "auto", "small_loss": 0.2},
            "which --class-weights auto multiplies: leave",
        ),
        (
            {"class_weights": "auto", "balance": True},
            "--class-weights auto makes rare classes count more",
        ),
        (
            {"prior": "balance", "balance": True},
            "--prior balance corrects shares of classes, and with",
        ),
        (
            {"prior": "balance", "class_weights": "auto"},
            "both make up for rare classes: leave out one",
        ),
        (
            {"augment_policy": "trivial", "data": "text:t.tsv"},
            "--augment-policy means nothing with",
        ),
        (
            {"augment_policy": "trivial", "data": "pairs:p.npz"},
            "--augment-policy means nothing with",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**options).check()
