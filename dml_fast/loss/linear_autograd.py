"""From losses and gradients of linear heads to autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dml_fast.loss.autograd import once
from dml_fast.loss.linear_chunks import Grads, Plan, Wanted, sweep
from dml_fast.loss.linear_heads import Head
from dml_fast.loss.problem import MutualStats


def learn(
    plan: Plan, heads: Sequence[Head], wanted: Sequence[Wanted], stats: str
) -> tuple[Tensor, MutualStats | None]:
    """Losses, differentiable once for what is wanted, and statistics.

    Their gradients are made in the forward pass, where the logits are. Not with reduction "none",
    when they depend on what arrives for every row: then the backward pass makes the logits again.
    """
    if plan.problem.reduction == "none":
        losses, _, measured = sweep(plan, heads, [Wanted()] * len(heads), stats)
        flat = [tensor for head in heads for tensor in head]
        tied: Tensor = _Again.apply(losses, plan, *flat)  # type: ignore[no-untyped-call]
        return tied, measured
    losses, grads, measured = sweep(plan, heads, wanted, stats)
    # One node a student: its gradients are freed before the next student's are scaled.
    nodes = [_Learn.apply(*each, *h) for *each, h in zip(losses, grads, heads, strict=True)]  # type: ignore[no-untyped-call]
    return torch.stack(nodes), measured


class _Learn(torch.autograd.Function):
    """Ties the loss of one student, (), to gradients that exist already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: Grads, *head: Tensor | None) -> Tensor:
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if t is None else t.dtype for t in head]
        return loss

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        scale = outer.detach()
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, *once([_scaled(g, scale, dtype) for g, dtype in pairs])


def _scaled(grad: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Rounded once, after the scale, and without a copy in between."""
    if grad is None:
        return None
    return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))


class _Again(torch.autograd.Function):
    """Ties losses by rows, (K, N), to heads whose gradients are yet to be made."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, plan: Plan, *flat: Tensor | None) -> Tensor:
        ctx.plan, ctx.count = plan, len(flat)
        # The constants too: autograd sees to it that nobody has written to them meanwhile.
        ctx.save_for_backward(*flat, *plan.constants())
        return losses

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        flat = ctx.saved_tensors[: ctx.count]
        needed = ctx.needs_input_grad[2:]
        heads = [Head(*flat[i : i + 3]) for i in range(0, len(flat), 3)]
        wanted = [Wanted(*needed[i : i + 3]) for i in range(0, len(flat), 3)]
        _, grads, _ = sweep(ctx.plan, heads, wanted, "none", outer.detach())
        made = [g for each in grads for g in each]
        return (
            None,
            None,
            *once([g if g is None else g.to(t) for g, t in zip(made, flat, strict=True)]),
        )
