"""The kernels as a backend of the mutual loss: `dml_fast.loss.problem.Backend`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dml_fast.kernels import ops
from dml_fast.kernels.launch import counted, empty_like, launch, launch_gradient
from dml_fast.loss.autograd import once
from dml_fast.loss.problem import MutualStats, Problem, Solution

SCRATCH = 0  # see `dml_fast.loss.problem.Backend`


def solve(problem: Problem, with_grad: bool, stats: str) -> Solution:
    """As `dml_fast.loss.problem.Backend.solve`."""
    if torch.compiler.is_compiling():
        return ops.forward(problem, with_grad, False, stats).solution
    return launch(problem, with_grad=with_grad, save=False, stats=stats).solution


def differentiable(
    problem: Problem, logits: tuple[Tensor, ...], stats: str
) -> tuple[Tensor, MutualStats | None]:
    """As `dml_fast.loss.problem.Backend.differentiable`, with gradients in the backward pass."""
    if torch.compiler.is_compiling():
        losses, _, measured = ops.forward(problem, False, True, stats).solution
        return losses, measured
    held: list[MutualStats | None] = []
    tied: Tensor = _Mutual.apply(problem, stats, held, *logits)  # type: ignore[no-untyped-call]
    return tied, held[0]


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
        saved, *logits = ctx.saved_tensors
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
