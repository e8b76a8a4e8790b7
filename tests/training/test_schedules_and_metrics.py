"""Learning rates and ramps at chosen moments; sums over an epoch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dml_fast.config import TrainConfig
from dml_fast.data.loaders.assemble import Batch
from dml_fast.engine import StepResult
from dml_fast.engine.optim import lr_factor, make_optimizer, ramp
from dml_fast.engine.precision import Precision
from dml_fast.eval.classification import evaluate
from dml_fast.runs.history import best_epoch
from dml_fast.training.meter import Meter


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
        algorithm=config.algorithm,
        lr=config.peak_lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    group = optimizer.param_groups[0]
    assert group["fused"]
    assert float(group["lr"]) == pytest.approx(lr)
    assert group["weight_decay"] == config.weight_decay
    assert group.get("nesterov", True)


def result(losses: list[float], skipped: list[bool]) -> StepResult:
    values = torch.tensor(losses)
    correct = torch.tensor([3, 1])
    return StepResult(values, values / 2, values / 4, values / 8, correct, torch.tensor(skipped))


def test_the_meter_weighs_by_images_and_leaves_bad_steps_out() -> None:
    meter = Meter(2, torch.device("cpu"))
    meter.add(result([1.0, 2.0], [False, False]), 4, (0, 1))
    meter.add(result([4.0, math.nan], [False, True]), 8, (0, 1))
    first, second = meter.read()
    assert first.loss == pytest.approx((4 * 1 + 8 * 4) / 12)
    assert first.ce == pytest.approx(first.loss / 2)
    assert first.kl == pytest.approx(first.loss / 4)
    assert first.accuracy == pytest.approx(6 / 12)
    assert (first.skipped, first.in_a_row) == (0, 0)
    assert (second.loss, second.accuracy) == (2.0, 0.25)
    assert (second.skipped, second.in_a_row) == (1, 1)


def test_skips_in_a_row_span_epochs_and_end_with_a_good_step() -> None:
    meter = Meter(2, torch.device("cpu"))
    for _ in range(3):
        meter.add(result([1.0, math.nan], [False, True]), 4, (0, 1))
    meter.start_epoch()
    assert meter.read()[1].in_a_row == 3
    assert meter.read()[1].skipped == 0
    assert meter.read()[0].loss is None
    meter.add(result([1.0, 1.0], [False, False]), 4, (0, 1))
    assert meter.read()[1].in_a_row == 0


def test_only_learners_are_counted() -> None:
    meter = Meter(3, torch.device("cpu"))
    meter.add(result([1.0, 2.0], [False, False]), 4, (1, 2))
    assert [s.loss for s in meter.read()] == [None, 1.0, 2.0]


class Fixed(nn.Module):
    """Answers with given logits for the image whose pixel is the row's number."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self.logits[x[:, 0].long()]  # type: ignore[index]


def test_accuracy_counts_every_image_once_and_averages_probabilities() -> None:
    # image 0: both right; image 1: each unsure, together right; image 2: one right, one very wrong
    a = Fixed([[9, 0, 0], [1, 1.1, 0], [0, 2, 1]])
    b = Fixed([[9, 0, 0], [0, 1.1, 1.2], [9, 0, 0]])
    target = torch.tensor([0, 1, 1])
    batches = [
        Batch(torch.tensor([[0.0], [1.0]]), target[:2], torch.arange(2)),
        Batch(torch.tensor([[2.0]]), target[2:], torch.tensor([2])),
    ]
    a.train()
    b.eval()
    accuracy = evaluate([a, b], batches, Precision(torch.device("cpu")))
    assert accuracy.students == pytest.approx((1.0, 1 / 3))
    assert accuracy.ensemble == pytest.approx(2 / 3)
    assert accuracy.images == 3
    assert a.training
    assert not b.training


def test_the_best_epoch_is_the_first_with_the_highest_mean() -> None:
    rows = [(0.5, 0.5), (0.9, 0.3), (0.7, 0.5), (0.6, 0.5)]
    history = [{"students": [{"val_acc": x} for x in row]} for row in rows]
    assert best_epoch(history) == 2
