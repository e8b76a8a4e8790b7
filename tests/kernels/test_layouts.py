"""The Triton kernels on labels, logits and options of any type, stride and batch dimensions."""

from __future__ import annotations

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
)
from loss_cases import Case
from torch import Tensor

from dml_fast.kernels import launch

pytestmark = QUIET


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_every_integer_at_any_address(kernel: str, dtype: torch.dtype) -> None:
    logits, target = cohort()
    missing = 255 if dtype == torch.uint8 else -1
    target[2] = missing
    expected = fused_and_grad(logits, target, ignore_index=missing)
    buffer = torch.cat([target[:1], target]).to(dtype)
    assert_same(fused_and_grad(logits, buffer[1:], ignore_index=missing), expected)


def strided(z: Tensor, way: str) -> Tensor:
    """The same numbers, laid out otherwise."""
    if way == "transposed":
        return z.t().contiguous().t()
    if way == "sliced":  # NaN between: reading the wrong element shows
        wide = z.new_full((2 * z.shape[0], 2 * z.shape[1] + 3), torch.nan)
        wide[::2, 3::2] = z
        return wide[::2, 3::2]
    return z[:1].expand_as(z)


@pytest.mark.parametrize("way", ["transposed", "sliced", "expanded"])
def test_logits_of_any_strides(kernel: str, way: str) -> None:
    logits, target = cohort(2)
    teacher = logits[0].flip(0)
    laid = [strided(z, way) for z in (*logits, teacher)]
    assert not laid[0].is_contiguous()
    plain = [z.contiguous() for z in laid]
    expected = fused_and_grad(plain[:2], target, teacher_logits=plain[2:])
    assert_same(fused_and_grad(laid[:2], target, teacher_logits=laid[2:]), expected)
    mixed = [laid[0], plain[1]]
    assert_same(fused_and_grad(mixed, target, teacher_logits=laid[2:]), expected)
    for few in (laid[:2], mixed):
        case = Case(few, target, {"teacher_logits": laid[2:]})
        losses, grads = by_autograd_in_place(case)
        torch.testing.assert_close(losses, expected[0])
        assert_same(grads, expected[1])


def by_autograd_in_place(case: Case) -> tuple[Tensor, list[Tensor]]:
    """`by_autograd` makes copies, and with them other strides."""
    leaves = [z.detach().requires_grad_() for z in case.logits]
    losses = fused(leaves, case.target, **case.options)
    return losses.detach(), list(torch.autograd.grad(losses.sum(), leaves))


def spread_out(x: Tensor) -> Tensor:
    """Every second element of a vector that has NaN, or no class, between."""
    wide = x.new_full((2 * len(x),), torch.nan if x.is_floating_point() else -7)
    wide[::2] = x
    return wide[::2]


def test_options_of_any_strides(kernel: str) -> None:
    logits, target = cohort()
    options = {
        "class_weight": torch.rand(10, device=DEVICE),
        "row_weight": torch.rand(6, device=DEVICE),
    }
    expected = fused_and_grad(logits, target, **options)
    wide = {name: spread_out(x) for name, x in options.items()}
    assert_same(fused_and_grad(logits, spread_out(target), **wide), expected)
    # One number for all of them.
    for name, x in options.items():
        one = {name: x[:1].expand_as(x)}
        ones = {name: x[:1].repeat(len(x))}
        assert_same(fused_and_grad(logits, target, **one), fused_and_grad(logits, target, **ones))
    weight = torch.rand(3, 3, device=DEVICE)
    assert_same(
        fused_and_grad(logits, target, peer_weight=weight.t()),
        fused_and_grad(logits, target, peer_weight=weight.t().contiguous()),
    )
    soft = torch.rand(6, 10, device=DEVICE)
    expected = fused_and_grad(logits, soft)
    for way in ("transposed", "sliced"):
        assert_same(fused_and_grad(logits, strided(soft, way)), expected)
    scale = torch.tensor([2.0, 3.0, 4.0], device=DEVICE)
    expected = fused_and_grad(logits, target, grad_scale=scale)
    assert_same(fused_and_grad(logits, target, grad_scale=spread_out(scale)), expected)
    scale = scale[:1].expand(3)
    expected = fused_and_grad(logits, target, grad_scale=2.0)
    assert_same(fused_and_grad(logits, target, grad_scale=scale), expected)


def test_a_stack_with_batch_dimensions_has_one_gradient(kernel: str) -> None:
    logits, target = cohort(3, 8, 5)
    expected = fused_and_grad(logits, target)
    stack = torch.stack(logits, -1).reshape(2, 4, 5, 3)  # (B, T, C, K)
    stack = stack.permute(3, 0, 1, 2).requires_grad_()
    assert not stack.is_contiguous()
    losses = fused(stack, target.reshape(2, 4))
    torch.testing.assert_close(losses.detach(), expected[0])
    losses.sum().backward()
    assert stack.grad is not None
    assert_same(stack.grad.detach().reshape(3, 8, 5), expected[1])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("first", [0, 3])
def test_labels_counted_by_a_launch_of_their_own(
    kernel: str, weighted: bool, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_FEW_ROWS", 4)
    logits, target = cohort()
    target[first:5] = 3
    weight = torch.rand(10, device=DEVICE) if weighted else None
    wide = None if weight is None else spread_out(weight)
    assert_solves(checked(logits, spread_out(target), ignore_index=3, class_weight=wide))
    assert_solves(checked(logits, target, class_weight=weight))
