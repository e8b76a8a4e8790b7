"""Sums over an epoch."""

from __future__ import annotations

import math

import pytest
import torch

from dml_fast.engine import StepResult
from dml_fast.training.meter import Meter


def result(losses: list[float], skipped: list[bool]) -> StepResult:
    values = torch.tensor(losses)
    correct = torch.tensor([3, 1])
    labelled, kept = torch.tensor([4, 2]), torch.tensor([3, 1])
    parts = (values, values / 2, values / 4, values / 8, correct, labelled, kept)
    return StepResult(*parts, torch.tensor(skipped))


def test_the_meter_weighs_by_images_and_leaves_bad_steps_out() -> None:
    meter = Meter(2, torch.device("cpu"))
    meter.add(result([1.0, 2.0], [False, False]), 4, (0, 1))
    meter.add(result([4.0, math.nan], [False, True]), 8, (0, 1))
    first, second = meter.read()
    assert first.loss == pytest.approx((4 * 1 + 8 * 4) / 12)
    assert first.ce == pytest.approx(first.loss / 2)
    assert first.kl == pytest.approx(first.loss / 4)
    assert (first.accuracy, first.kept) == (6 / 8, 6 / 8)
    assert (first.skipped, first.in_a_row) == (0, 0)
    assert (second.loss, second.accuracy, second.kept) == (2.0, 1 / 2, 1 / 2)
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


def test_a_checkpoint_of_before_rows_without_a_label_has_one_for_every_image() -> None:
    old, new = Meter(2, torch.device("cpu")), Meter(2, torch.device("cpu"))
    old.add(result([1.0, 2.0], [False, False]), 4, (0, 1))
    new.load(old.state()[..., :8])
    assert [s.loss for s in new.read()] == [1.0, 2.0]
    assert [(s.accuracy, s.kept) for s in new.read()] == [(3 / 4, 1.0), (1 / 4, 1.0)]
