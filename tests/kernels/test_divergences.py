"""The kernels with other divergences than the paper's, and of labelled rows alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from kernel_cases import (
    DEVICE,
    QUIET,
    assert_same,
    assert_solves,
    checked,
    cohort,
    fused,
    fused_and_grad,
    in_double,
)
from loss_cases import Case, assert_exact, by_autograd
from torch import Tensor

from dml_fast.kernels import launch
from dml_fast.loss import closed_form

pytestmark = QUIET

by_backward = partial(by_autograd, fused)


def by_engine(case: Case) -> tuple[Tensor, list[Tensor]]:
    losses, grads, _ = fused_and_grad(case.logits, case.target, **case.options)
    return losses, list(grads)


LABELLED: dict[str, dict[str, Any]] = {
    "mean": {"temperature": 2.0},
    "class weights": {"class_weight": torch.linspace(0.5, 2, 7), "label_smoothing": 0.1},
    "by row": {"reduction": "none", "row_weight": torch.linspace(0.5, 2, 5)},
}


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_rows_alone_have_a_divergence(kernel: str, name: str) -> None:
    logits, target = cohort(3, 5, 7)
    target[1::2] = -100
    plain = {"kl_weight": 1.5, "temperature": 1.0, "reduction": "mean", "peer_reduction": "mean"}
    options = {**plain, **LABELLED[name], "ignore_index": -100, "kl_rows": "labelled"}
    options["teacher_logits"] = [logits.pop().cpu()]
    case = Case([z.cpu() for z in logits], target.cpu(), options)
    assert_exact(case, DEVICE, by_backward)
    assert_exact(case, DEVICE, by_engine)


def test_padding_of_nan_teaches_nothing(kernel: str) -> None:
    logits, target = cohort(3, 5, 7)
    target[3:] = -100
    logits[0][3], logits[2][4] = torch.nan, -torch.inf
    assert_solves(checked(logits, target, kl_rows="labelled"), stats="all")
    leaves = [z.requires_grad_() for z in logits]
    fused(leaves, target, kl_rows="labelled").sum().backward()
    assert all(z.grad is not None and not z.grad[3:].any() for z in leaves)


@pytest.mark.parametrize("rows", [7, torch.tensor(7.0)], ids=str)
def test_part_of_a_batch_divides_by_the_labelled_rows_of_the_whole(kernel: str, rows: Any) -> None:
    logits, target = cohort(2, 5, 7)
    target[1] = -100
    rows = rows.to(DEVICE) if isinstance(rows, Tensor) else rows
    problem = replace(checked(logits, target, kl_rows="labelled"), whole=(9.0, rows))
    assert_solves(problem, stats="cheap")
    losses, saved = launch.launch(problem, with_grad=False, save=True, stats="none")
    assert saved is not None
    grads = [torch.empty_like(z) for z in logits]
    launch.launch_gradient(problem, saved, torch.ones_like(losses.losses), grads)
    assert_same(grads, closed_form.solve(in_double(problem), True, "none").grads)


def test_labelled_rows_with_class_weights_are_counted_apart(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a launch before, once for the forward and the backward pass."""
    monkeypatch.setattr(launch, "_FEW_ROWS", 2)
    logits, target = cohort(2, 5, 7)
    target[1] = -100
    options = {"class_weight": torch.linspace(0.5, 2, 7, device=DEVICE), "kl_rows": "labelled"}
    problem = checked(logits, target, **options)
    assert_solves(problem, stats="cheap")
    whole = launch.counted(problem).whole
    assert whole is not None and float(whole[1]) == 4.0 != float(whole[0])
