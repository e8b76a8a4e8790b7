"""Extreme rows of many tiles: what a sweep carries from one tile to the next.

Rows of one tile are in test_loss_bad_rows.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import STEP, assert_solves, checked, cohort, fused, fused_and_grad
from torch import Tensor

from dml_fast.kernels import launch

pytestmark = [pytest.mark.usefixtures("kernel"), pytest.mark.slow]
INF, NAN = torch.inf, torch.nan
C = 2 * STEP + 7


def wide(students: int = 3, rows: int = 3) -> tuple[list[Tensor], Tensor]:
    logits, target = cohort(students, rows, C)
    return logits, target.clamp(min=C - 3)


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "label_smoothing": 0.1}])
@pytest.mark.parametrize("masked", [slice(0, STEP), slice(0, C - 3), slice(1, C - 3)])
def test_leading_tiles_masked(masked: slice, options: dict[str, Any]) -> None:
    logits, target = wide()
    some = [z.clone() for z in logits]
    for z in logits:
        z[:, masked] = -INF
    if options:  # smoothing gives weight to masked classes, as in torch
        target = torch.nn.functional.one_hot(target, C).float()
        options = {"temperature": 2.0}
    assert_solves(checked(logits, target, **options))
    some[1][2, masked] = -INF  # in one row of one student: its divergence is infinite
    assert_solves(checked(some, target, reduction="none", **options))
    losses, grads, _ = fused_and_grad(some, target, **options)
    assert losses[1] == INF and losses[[0, 2]].isfinite().all()
    assert all(g.isfinite().all() for g in grads)


def test_a_masked_class_of_a_peer_that_is_not_heard() -> None:
    logits, target = wide()
    logits[1][0, :STEP] = -INF
    weight = torch.rand(3, 3).to(logits[0])
    weight[1, 0] = weight[1, 2] = 0.0
    assert_solves(checked(logits, target, peer_weight=weight))
    assert fused(logits, target, peer_weight=weight).isfinite().all()
    logits[0][0, :STEP] = logits[2][0, :STEP] = -1e5  # p = 0 in fp32: nobody is there
    assert fused(logits, target).isfinite().all()


def test_one_student_alone_has_an_entropy_where_classes_are_masked() -> None:
    logits, target = wide(1)
    logits[0][1, :STEP] = -INF
    assert_solves(checked(logits, target))


def test_a_row_that_every_student_has_broken() -> None:
    logits, target = wide()
    for z, value in zip(logits, (NAN, INF, -INF), strict=True):
        z[1] = value
    assert_solves(checked(logits, target))
    assert_solves(checked(logits, target, reduction="none"))


@pytest.mark.parametrize("column", [0, STEP + 1, C - 1])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_broken_class_in_any_tile(column: int, value: float) -> None:
    logits, target = wide()
    logits[2][1, column] = value
    for options in ({}, {"reduction": "none", "temperature": 3.0, "label_smoothing": 0.1}):
        assert_solves(checked(logits, target, **options))
    stats = fused_and_grad(logits, target)[2]
    assert stats.finite.tolist() == [True, True, False]


@pytest.mark.parametrize("value", [-INF, torch.finfo(torch.float32).min, 0.0, 1e4])
def test_constant_rows(value: float) -> None:
    logits, target = wide()
    logits[0][1] = value
    logits[1][2] = value
    logits[2][2] = value
    for options in ({}, {"temperature": 0.5}, {"label_smoothing": 0.1}):
        assert_solves(checked(logits, target, **options))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_rising_and_falling_rows(temperature: float) -> None:
    """The maximum moves in every tile, or never, by little or by all that fp32 holds."""
    ramp = torch.linspace(-1e4, 1e4, C)
    small = torch.linspace(-20, 20, C)
    rows = [torch.stack([a, b]) for a, b in ((ramp, small), (ramp.flip(0), small.flip(0)))]
    logits, target = wide(2, 2)
    logits = [*(x.to(logits[0]) for x in rows), logits[0]]
    assert_solves(checked(logits, target, temperature=temperature), atol=1e-3)


def test_a_common_offset_changes_nothing() -> None:
    logits, target = wide()
    logits = [(z * 64).round() / 64 for z in logits]
    problem = checked(logits, target, temperature=3.0)
    base = launch.launch(problem, with_grad=True, save=False, stats="cheap").solution
    problem = checked([z + 1e4 for z in logits], target, temperature=3.0)
    moved = launch.launch(problem, with_grad=True, save=False, stats="cheap").solution
    assert base.grads is not None and moved.grads is not None
    assert torch.equal(base.losses, moved.losses)
    assert all(torch.equal(a, b) for a, b in zip(base.grads, moved.grads, strict=True))


def test_a_broken_row_changes_no_bit_of_the_others() -> None:
    """Here two sweeps have a program a row, and one pass 4 rows or one."""
    logits, target = cohort(3, 8, 40)
    clean = fused_and_grad(logits, target, reduction="none")
    logits[1][2, 30] = NAN
    logits[2][3, 1] = -INF
    found = fused_and_grad(logits, target, reduction="none")
    assert torch.equal(found[0][:, 4:], clean[0][:, 4:])
    for a, b in zip(found[1], clean[1], strict=True):
        assert torch.equal(a[4:], b[4:])
        assert not torch.equal(a[:4], b[:4])


def test_half_precision_at_its_limits() -> None:
    logits, target = wide()
    logits = [z.half() for z in logits]
    logits[0][0, 5] = 65504.0
    logits[1][1, :STEP] = -65504.0
    assert_solves(checked(logits, target), rtol=2e-3, atol=1e-4)
