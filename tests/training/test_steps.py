"""Parts, clipping, groups and students' own optimizers: a run is a plain loop over its batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from data_cases import batch_of
from torch import Tensor, nn

from dml_fast.config import TrainConfig
from dml_fast.engine.optim import lr_factor, zero_momentum
from dml_fast.loss import mutual_loss
from dml_fast.runs.folder import Run
from dml_fast.training.build import build_trainer
from dml_fast.training.signals import StopRequest
from dml_fast.training.trainer import Trainer

OPTIONS: dict[str, Any] = {
    "arch": "group_norm_net:build",
    "cohort": 2,
    "train_fraction": 0.25,
    "epochs": 1,
    "accumulate": 4,
    "clip_norm": 0.5,
    "no_decay": "norm,bias",
    "optimizer": "sgd,adamw",
    "lr": "0.125,0",
    "momentum": "0.5,0.9",
    "weight_decay": "0.01,0.125",
}


def build(folder: Path, **options: Any) -> Trainer:
    run = Run(folder)
    run.prepare(0)
    return build_trainer(TrainConfig(**{**OPTIONS, **options}), run, None, StopRequest())


def optimizer(k: int, model: nn.Module) -> torch.optim.Optimizer:
    """Made with torch alone; in these networks vectors are biases or of normalisation."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    rate = torch.tensor(0.125 if k == 0 else 1e-3)  # as the schedule fills it
    if k:
        return torch.optim.AdamW(groups, lr=rate, weight_decay=0.125, fused=True)
    made = torch.optim.SGD(
        groups, lr=rate, momentum=0.5, nesterov=True, weight_decay=0.01, fused=True
    )
    zero_momentum(made)
    return made


@pytest.mark.slow
def test_a_run_is_a_plain_loop_bit_for_bit(tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", executor="sequential")
    models = [copy.deepcopy(model).train() for model in trainer.engine.cohort.models]
    optimizers = [optimizer(k, model) for k, model in enumerate(models)]
    steps = trainer.loader.steps_per_epoch
    for step in range(steps):
        batch = batch_of(trainer.loader, 0, step)
        assert len(batch.target) == 64
        for x, y in zip(batch.inputs.split(16), batch.target.split(16), strict=True):
            losses = mutual_loss([model(x) for model in models], y, reduction="sum")
            assert isinstance(losses, Tensor)
            (losses.sum() / 64).backward()
        for model, one, peak in zip(models, optimizers, (0.125, 1e-3), strict=True):
            parameters = [p for group in one.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            for group in one.param_groups:
                group["lr"].fill_(peak * lr_factor("cosine", step / steps, 1, 1.0))
            one.step()
            model.zero_grad()
    assert trainer.fit()
    trainer.close()
    for mine, theirs in zip(trainer.engine.cohort.models, models, strict=True):
        for name, p in mine.named_parameters():
            torch.testing.assert_close(p, theirs.get_parameter(name), rtol=0, atol=0, msg=name)
    factor = lr_factor("cosine", (steps - 1) / steps, 1, 1.0)
    assert Run(tmp_path / "run").metrics()[0]["lr"] == [0.125 * factor, 1e-3 * factor]


def test_options_of_each_student_reach_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = build(tmp_path / "run", arch="resnet8", cohort=3, optimizer="sgd,adamw,auto",
                    lr="0,0,0.5", momentum="0.5,0.9,0", weight_decay="0.1,0.2,0.3")  # fmt: skip
    seen = [
        (type(s.optimizer).__name__, g.get("momentum"), g["weight_decay"], round(float(g["lr"]), 6))
        for s in trainer.engine.cohort
        for g in s.optimizer.param_groups
    ]
    assert seen == [
        ("SGD", 0.5, 0.1, 0.1), ("SGD", 0.5, 0.0, 0.1),
        ("AdamW", None, 0.2, 0.001), ("AdamW", None, 0.0, 0.001),
        ("SGD", 0.0, 0.3, 0.5), ("SGD", 0.0, 0.0, 0.5),
    ]  # fmt: skip
    assert (trainer.engine.parts, trainer.engine.clip_norm) == (4, 0.5)
    assert "--accumulate: BatchNorm normalises each part of 16 rows" in capfd.readouterr().err
    plain = build(tmp_path / "plain", **{name: getattr(TrainConfig, name) for name in OPTIONS})
    assert [len(s.optimizer.param_groups) for s in plain.engine.cohort] == [1, 1]
    assert (plain.engine.parts, plain.engine.clip_norm) == (1, None)
    assert "--accumulate" not in capfd.readouterr().err
