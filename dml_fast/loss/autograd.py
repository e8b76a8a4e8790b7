"""From a loss and its ready-made gradient to autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def tie(losses: Tensor, grads: Tensor, logits: tuple[Tensor, ...]) -> Tensor:
    """The losses, differentiable once.

    Args:
        losses: (K,), or (K, N) by rows.
        grads: (K, N, C) gradient of ``losses[k].sum()`` for student k.
        logits: K tensors (N, C), or one (K, N, C), to tie them to.
    """
    tied: Tensor = _Tied.apply(losses, grads, *logits)  # type: ignore[no-untyped-call]
    return tied


def once(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of a backward pass, which under ``create_graph`` refuse a second one."""
    if not torch.is_grad_enabled():
        return list(grads)
    trap = torch.zeros((), requires_grad=True)
    return [g if g is None else _Once.apply(g, trap) for g in grads]  # type: ignore[no-untyped-call]


class _Tied(torch.autograd.Function):
    """Ties losses (K,) or (K, N) to gradients that exist already, (K, N, C)."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, grads: Tensor, *logits: Tensor) -> Tensor:
        ctx.save_for_backward(grads)
        ctx.stacked = logits[0].dim() == 3
        ctx.dtypes = [z.dtype for z in logits]
        return losses

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (grads,) = ctx.saved_tensors
        scaled = grads * outer.detach().reshape(len(grads), -1, 1)
        parts = (scaled,) if ctx.stacked else scaled.unbind()
        return None, None, *once([g.to(one) for g, one in zip(parts, ctx.dtypes, strict=True)])


class _Once(torch.autograd.Function):
    """The identity, which refuses to be differentiated.

    ``once_differentiable`` would not do. It keeps silent where the outer gradient is a constant,
    as in ``losses.sum()``, and the second derivative would lack this loss's own.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        return grad

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        raise RuntimeError(
            "the mutual loss has no second derivative: "
            "use dml_fast.loss.reference.mutual_loss for it"
        )
