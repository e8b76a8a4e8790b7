"""Losses whose gradients are known already, made differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dml_fast.loss.problem import Losses, MutualStats
from dml_fast.loss.values import may_look

# Whether the backward pass that is running has retain_graph; not documented by torch.
_keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


def tie(losses: Tensor, grads: Tensor, logits: tuple[Tensor, ...]) -> Tensor:
    """Return the losses, differentiable once with respect to the logits.

    Args:
        losses: (K,), or (K, N) with one for each row.
        grads: (K, N, C), where [k] is the gradient of ``losses[k].sum()``.
        logits: K tensors (N, C), or one (K, N, C).
    """
    tied: Tensor = _Tied.apply(losses, grads, *logits)  # type: ignore[no-untyped-call]
    return tied


def tie_each(
    losses: Tensor, grads: Tensor | Sequence[Tensor], logits: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Return K losses, each differentiable once with respect to its own logits alone.

    Args:
        losses: (K,), or (K, N) with one for each row.
        grads: K (N, C), where [k] is the gradient of ``losses[k].sum()``.
        logits: K tensors (N, C).
    """
    return tuple(
        tie(loss.unsqueeze(0), grad.unsqueeze(0), (z,)).squeeze(0)
        for loss, grad, z in zip(losses, grads, logits, strict=True)
    )


def tied(
    losses: Tensor,
    grads: Tensor | None,
    measured: MutualStats | None,
    logits: tuple[Tensor, ...],
    separate: bool,
) -> tuple[Losses, MutualStats | None]:
    """Return losses with their gradients (K, N, C) behind them, each alone or all together."""
    assert grads is not None
    return (tie_each if separate else tie)(losses, grads, logits), measured


def saved_once(ctx: Any) -> tuple[Any, ...]:
    """Return what a joint loss saved for its one backward pass.

    Raises:
        RuntimeError: that pass is over; the message says what to do.
    """
    if torch.compiler.is_compiling():  # which traces no handler of errors
        return tuple(ctx.saved_tensors)
    try:
        return tuple(ctx.saved_tensors)
    except RuntimeError as error:
        if "second time" not in str(error):  # such as logits that were overwritten
            raise
        raise RuntimeError(
            "the mutual losses of one call have one backward pass together, and it is over: call "
            "losses.sum().backward() once, or, to call backward on one student's loss after the "
            "other, get separate losses with separate=True"
        ) from error


def once(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the gradients of a backward pass, which refuse to be differentiated again."""
    if not torch.is_grad_enabled():  # only create_graph=True enables it in a backward pass
        return list(grads)
    trap = torch.zeros((), requires_grad=True)
    return [g if g is None else _Once.apply(g, trap) for g in grads]  # type: ignore[no-untyped-call]


class _Tied(torch.autograd.Function):
    """Losses (K,) or (K, N) whose gradients (K, N, C) exist already."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, grads: Tensor, *logits: Tensor) -> Tensor:
        ctx.save_for_backward(grads)
        ctx.stacked = logits[0].dim() == 3
        ctx.dtypes = [z.dtype for z in logits]
        return losses

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (grads,) = saved_once(ctx)
        if _may_give_away(grads, outer):
            scaled = grads
        else:
            scaled = grads * outer.detach().reshape(len(grads), -1, 1)
        parts = (scaled,) if ctx.stacked else scaled.unbind()
        pairs = zip(parts, ctx.dtypes, strict=True)
        return None, None, *once([g if g.dtype == one else g.to(one) for g, one in pairs])


def _may_give_away(grads: Tensor, outer: Tensor) -> bool:
    """Return whether the saved gradients are the answer, and nobody needs them afterwards.

    So it is after ``losses.sum().backward()`` on a CPU; elsewhere reading ``outer`` would wait.
    """
    return (
        may_look(grads.device)
        and type(outer) is Tensor
        and outer.numel() == len(grads)
        and outer.tolist() == [1.0] * len(grads)
        and not _keeps_graph()
    )


class _Once(torch.autograd.Function):
    """The identity, which refuses to be differentiated.

    torch's ``once_differentiable`` is not enough: where the incoming gradient is a constant, as
    with ``losses.sum()``, it raises nothing, and the second derivative would silently be wrong.
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
