"""The kernels as a backend of the mutual loss: `dml_fast.loss.problem.Backend`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dml_fast.kernels import ops
from dml_fast.kernels.launch import counted, empty_like, launch, launch_gradient
from dml_fast.loss.autograd import once, saved_once, tie_each
from dml_fast.loss.problem import Losses, MutualStats, Problem, Solution

SCRATCH, IN_PLACE = 0, True  # see `dml_fast.loss.problem.Backend`


def solve(problem: Problem, with_grad: bool, stats: str) -> Solution:
    """As `dml_fast.loss.problem.Backend.solve`."""
    if (own := problem.ce_weight) != 1.0:
        scale = own if problem.grad_scale is None else problem.grad_scale * own
        losses, grads, measured = solve(
            replace(relative(problem), grad_scale=scale), with_grad, stats
        )
        return Solution(losses * own, grads, measured)
    with torch.no_grad():
        if torch.compiler.is_compiling():
            return ops.forward(problem, with_grad, False, stats).solution
        return launch(problem, with_grad=with_grad, save=False, stats=stats).solution


def differentiable(
    problem: Problem, logits: tuple[Tensor, ...], stats: str, separate: bool = False
) -> tuple[Losses, MutualStats | None]:
    """As `dml_fast.loss.problem.Backend.differentiable`, with gradients in the backward pass."""
    if (own := problem.ce_weight) != 1.0:
        losses, measured = differentiable(relative(problem), logits, stats, separate)
        if isinstance(losses, Tensor):
            return losses * own, measured
        return tuple(loss * own for loss in losses), measured
    if separate:
        return _separate(problem, logits, stats)
    if torch.compiler.is_compiling():
        losses, _, measured = ops.forward(problem, False, True, stats).solution
        return losses, measured
    held: list[MutualStats | None] = []
    tied: Tensor = _Mutual.apply(problem, stats, held, *logits)  # type: ignore[no-untyped-call]
    return tied, held[0]


def relative(problem: Problem) -> Problem:
    """Return the problem whose losses, times the cross-entropy's weight, are those of this one."""
    return replace(problem, ce_weight=1.0, kl_weight=problem.kl_weight / problem.ce_weight)


def _separate(
    problem: Problem, logits: tuple[Tensor, ...], stats: str
) -> tuple[tuple[Tensor, ...], MutualStats | None]:
    """Return K losses; each backward pass computes the gradient of one student."""
    known = tuple(z.detach() for z in problem.students)
    if torch.compiler.is_compiling():  # into one operator, which gives all gradients at once
        # not in fp16, in which they vanish before a loss scaler's factor comes
        known = tuple(z.float() if z.dtype == torch.float16 else z for z in known)
        found = ops.forward(replace(problem, students=known), True, False, stats).solution
        assert found.grads is not None
        return tie_each(found.losses, found.grads, logits), found.stats
    with torch.no_grad():
        problem = counted(replace(problem, students=known))
        (losses, _, measured), saved = launch(problem, with_grad=False, save=True, stats=stats)
    assert saved is not None
    own = (_Own.apply(problem, saved, k, losses[k], z) for k, z in enumerate(logits))  # type: ignore[no-untyped-call]
    return tuple(own), measured


class _Own(torch.autograd.Function):
    """The loss of student k, which one launch has computed with all others."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, saved: Tensor, k: int, loss: Tensor, _: Tensor
    ) -> Tensor:
        ctx.save_for_backward(saved, *problem.students)
        ctx.problem, ctx.k = replace(problem, students=()), k  # autograd keeps the logits
        return loss.clone()  # an output that is a view of all losses would tie them together

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        saved, *students = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * len(students)
        grads[ctx.k] = grad = empty_like(students[ctx.k])
        problem = replace(ctx.problem, students=tuple(students))
        each = outer.detach().expand(len(students), *outer.shape)
        launch_gradient(problem, saved, each, grads)
        return None, None, None, None, *once([grad])


class _Mutual(torch.autograd.Function):
    """The loss, of which the forward pass saves the logits and O(N) numbers but no gradients."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, stats: str, held: list[MutualStats | None], *logits: Tensor
    ) -> Tensor:
        problem = counted(problem)
        (losses, _, measured), saved = launch(problem, with_grad=False, save=True, stats=stats)
        assert saved is not None
        held.append(measured)
        ctx.save_for_backward(saved, *logits)
        ctx.students = len(problem.students)
        ctx.problem = replace(problem, students=())  # autograd keeps the logits
        return losses

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        saved, *logits = saved_once(ctx)
        classes = logits[0].shape[-1]
        each = logits if len(logits) == ctx.students else logits[0].unbind()
        students = tuple(z.detach().reshape(-1, classes) for z in each)
        problem = replace(ctx.problem, students=students)
        needed = ctx.needs_input_grad[3:]
        if len(logits) == 1:
            grad = empty_like(logits[0])
            parts: list[Tensor | None] = list(grad.reshape(len(students), -1, classes).unbind())
            launch_gradient(problem, saved, outer.detach(), parts)
            return None, None, None, *once([grad])
        grads = [
            empty_like(z) if wanted else None for z, wanted in zip(logits, needed, strict=True)
        ]
        parts = [g if g is None else g.reshape(-1, classes) for g in grads]
        launch_gradient(problem, saved, outer.detach(), parts)
        return None, None, None, *once(grads)
