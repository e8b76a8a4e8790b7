"""Half precision and autocast of the loss of linear heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cases import cohort, exact
from torch import Tensor

from dml_fast.loss import mutual_loss
from dml_fast.loss.linear import linear_mutual_loss


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_survive_half_precision(dtype: torch.dtype) -> None:
    """4096 unlabelled rows, students that nearly agree: under a loss scaler, as fp16 is trained.

    With 1/N inside, most of the logits' gradients are below the smallest fp16 number.
    """
    hidden, weight, target = cohort(2, 4096, 64, dtype)
    with torch.no_grad():
        for h in hidden:
            h.mul_(0.01)
    scale, leaves, ignored = 2.0**12, hidden + weight, torch.full_like(target, -100)
    losses = linear_mutual_loss(hidden, weight, ignored, chunk_rows=256)
    found = torch.autograd.grad((losses * scale).sum(), leaves)
    double = [[t.detach().double().requires_grad_() for t in ts] for ts in (hidden, weight)]
    whole = exact(*double, ignored).sum() * scale
    expected = torch.autograd.grad(whole, double[0] + double[1])
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 0.5 * torch.finfo(dtype).eps  # the last rounding, no more
    logits = [F.linear(h, w) for h, w in zip(hidden, weight, strict=True)]
    plainly = torch.autograd.grad(mutual_loss(logits, ignored).sum(), leaves)
    if dtype == torch.float16:  # what it would be without this care
        assert relative(plainly[0].double() * scale, expected[0]) > 0.02


def test_long_columns_do_not_overflow_fp16() -> None:
    """All rows push one class the same way: their sum is 4096 times a row's."""
    hidden = torch.full((4096, 2), 30.0, dtype=torch.float16)
    weight = torch.zeros(3, 2, dtype=torch.float16, requires_grad=True)
    target = torch.zeros(4096, dtype=torch.int64)
    linear_mutual_loss([hidden], [weight], target, chunk_rows=4096).sum().backward()
    expected = torch.tensor([[-20.0], [10.0], [10.0]], dtype=torch.float16).expand(3, 2)
    torch.testing.assert_close(weight.grad, expected)


def test_a_chunks_small_share_is_not_forgotten() -> None:
    """4096 chunks that each add 2^-12 of the first row's part: a bf16 sum would drop them all."""
    hidden = torch.ones(4097, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(4097, dtype=torch.int64)
    row_weight = torch.full((4097,), 2.0**-12).index_fill_(0, torch.tensor([0]), 1.0)
    options: dict[str, Any] = {"reduction": "sum", "row_weight": row_weight}
    linear_mutual_loss([hidden], [weight], target, chunk_rows=1, **options).sum().backward()
    assert weight.grad.flatten().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_computes_in_its_type_and_returns_the_leaves(reduction: str) -> None:
    hidden, weight, target = cohort(2, 64, 7, torch.float32)
    hidden[1] = hidden[1].detach().bfloat16().requires_grad_()  # as from a layer before
    leaves = hidden + weight
    teacher = [torch.randn(64, 3)], [torch.randn(7, 3)]
    options: dict[str, Any] = {"reduction": reduction, "chunk_rows": 20}
    with torch.autocast("cpu", torch.bfloat16):
        losses = linear_mutual_loss(
            hidden, weight, target, teacher_hidden=teacher[0], teacher_weight=teacher[1], **options
        )
        logits = [F.linear(h, w) for h, w in zip(hidden, weight, strict=True)]
        fixed = [F.linear(h, w) for h, w in zip(*teacher, strict=True)]
        assert logits[0].dtype == fixed[0].dtype == torch.bfloat16
    expected = mutual_loss(logits, target, reduction=reduction, teacher_logits=fixed)
    torch.testing.assert_close(losses, expected)
    found = torch.autograd.grad(losses.sum(), leaves)
    assert [g.dtype for g in found] == [t.dtype for t in leaves]
    for a, b in zip(found, torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert relative(a, b.double()) < 0.01
    assert (found[2] != found[2].bfloat16()).any()  # fp32 weights: summed, not rounded


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_backward_pass_under_autocast_keeps_the_forward_passs_type(reduction: str) -> None:
    hidden, weight, target = cohort(2, 64, 7, torch.float32)
    losses = linear_mutual_loss(hidden, weight, target, reduction=reduction)
    expected = torch.autograd.grad(losses.sum(), hidden, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(losses.sum(), hidden)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_double_precision_is_left_alone_by_autocast() -> None:
    hidden, weight, target = cohort()
    expected = exact(hidden, weight, target)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_mutual_loss(hidden, weight, target)
    torch.testing.assert_close(found, expected)
