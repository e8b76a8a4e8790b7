"""Optimizers, and learning rates and ramps at chosen moments."""

from __future__ import annotations

import math

import pytest
from torch import nn

from dml_fast.config import TrainConfig
from dml_fast.engine.optim import lr_factor, make_optimizer, ramp


@pytest.mark.parametrize(
    ("epoch", "factor"),
    [(0, 1), (59.99, 1), (60, 0.1), (119.99, 0.1), (120, 0.01), (180, 0.001), (199.99, 0.001)],
)
def test_the_papers_schedule_divides_by_ten_every_60_of_200_epochs(
    epoch: float, factor: float
) -> None:
    assert lr_factor("paper", epoch, 200, warmup=0) == pytest.approx(factor)


def test_cosine_begins_after_the_warm_up_and_ends_at_zero() -> None:
    points = [lr_factor("cosine", e, 12, warmup=2) for e in (0, 1, 2, 7, 12)]
    assert points == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert lr_factor("cosine", 3, 12, warmup=0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_constant_and_a_warm_up_longer_than_the_run() -> None:
    assert lr_factor("constant", 9, 10, warmup=0) == 1
    assert lr_factor("cosine", 1.5, 2, warmup=3) == pytest.approx(0.5)


def test_the_ramp_of_the_mutual_term() -> None:
    assert [ramp(e, 4) for e in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert ramp(0, 0) == 1


@pytest.mark.parametrize(("name", "lr"), [("sgd", 0.1), ("adamw", 1e-3)])
def test_optimizers_are_fused_and_have_their_default_rate(name: str, lr: float) -> None:
    config = TrainConfig(optimizer=name)  # type: ignore[arg-type]
    optimizer = make_optimizer(
        [*nn.Linear(2, 2).parameters()],
        algorithm=config.algorithms[0],
        lr=config.peak_lrs[0],
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    group = optimizer.param_groups[0]
    assert group["fused"]
    assert float(group["lr"]) == pytest.approx(lr)
    assert group["weight_decay"] == config.weight_decay
    assert group.get("nesterov", True)
