"""The Triton kernels under autograd: outer gradients, frozen students, changed logits."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, QUIET, assert_same, cohort, fused, fused_and_grad

pytestmark = QUIET


def test_outer_gradients_of_students_and_rows(kernel: str) -> None:
    logits, target = cohort()
    leaves = [z.requires_grad_() for z in logits]
    _, grads, _ = fused_and_grad(logits, target)
    losses = fused(leaves, target)
    outer = torch.tensor([0.0, -2.0, 0.5], device=DEVICE)
    found = torch.autograd.grad(losses, leaves, outer, retain_graph=True)
    assert not found[0].any()
    assert_same(found, [g * w for g, w in zip(grads, outer, strict=True)])
    again = torch.autograd.grad(losses, leaves, outer)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    with pytest.raises(RuntimeError, match="one backward pass"):
        losses.sum().backward()

    rows = fused(leaves, target, reduction="none")
    weight = torch.rand(6, 3, device=DEVICE).t()  # (K, N) of any strides
    found = torch.autograd.grad(rows, leaves, weight, retain_graph=True)
    for k, g in enumerate(found):
        weighted = fused_and_grad(logits, target, row_weight=weight[k], reduction="sum")[1]
        torch.testing.assert_close(g, weighted[k])
    for k in range(3):  # autograd hands down a gradient with stride 0
        (g,) = torch.autograd.grad(rows[k].sum(), leaves[k], retain_graph=True)
        torch.testing.assert_close(g, fused_and_grad(logits, target, reduction="sum")[1][k])


def test_only_learners_are_written(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = cohort()
    expected = fused_and_grad(logits, target)[1]
    logits[0].requires_grad_()
    logits[2].requires_grad_()
    copy = logits[1].clone()
    fused(logits, target).sum().backward()
    assert torch.equal(logits[1], copy)
    assert logits[1].grad is None
    assert_same([logits[0].grad, logits[2].grad], expected[::2])


def test_logits_changed_after_the_loss_are_an_error() -> None:
    logits, target = cohort()
    leaves = [z.requires_grad_() for z in logits]
    doubled = [z * 2 for z in leaves]
    losses = fused(doubled, target)
    doubled[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()
