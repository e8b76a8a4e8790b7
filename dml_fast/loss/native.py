"""The mutual loss on a CPU in C++: one row of all students at a time, which stays in the cache.

`unsupported_reason` says what it leaves to the closed form, whose mathematics it shares.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dml_fast import _native
from dml_fast.loss import closed_form
from dml_fast.loss.autograd import tie
from dml_fast.loss.checks import may_look
from dml_fast.loss.problem import MutualStats, Problem, Solution

SCRATCH = 0  # see `dml_fast.loss.problem.Backend`
_TYPES = (torch.float32, torch.bfloat16)
_PER_THREAD = 1 << 19  # logits: with fewer, a thread takes longer to start than to help


def unsupported_reason(problem: Problem) -> str | None:
    """Return why the closed form is to take a problem, or None."""
    everyone = problem.students + problem.teachers
    if not may_look(problem.device):
        return "it is called on CPU tensors, and not by torch.compile"
    if any(z.dtype != everyone[0].dtype for z in everyone) or everyone[0].dtype not in _TYPES:
        return "it takes logits that are all float32, or all bfloat16"
    if problem.peer_weight is not None:
        return "it has no peer weights"
    if problem.index is not None and problem.index.dim() != 1:
        return "it takes one label for each row"
    if any(type(z) is not Tensor for z in (everyone[0], everyone[-1])):
        return "it takes plain tensors"
    return None


def solve(problem: Problem, with_grad: bool, stats: str) -> Solution:
    """As `dml_fast.loss.problem.Backend.solve`."""
    found = None if stats == "all" else _compute(problem, with_grad, problem.students[0].dtype)
    if found is None:
        return closed_form.solve(problem, with_grad, stats)
    losses, grads, measured = found
    return Solution(
        losses, None if grads is None else grads.unbind(), None if stats == "none" else measured
    )


def differentiable(
    problem: Problem, logits: tuple[Tensor, ...], stats: str
) -> tuple[Tensor, MutualStats | None]:
    """As `dml_fast.loss.problem.Backend.differentiable`, with gradients from the forward pass."""
    with torch.no_grad():
        found = None if stats == "all" else _compute(problem, True, torch.float32)
    if found is None:
        return closed_form.differentiable(problem, logits, stats)
    losses, grads, measured = found
    assert grads is not None
    return tie(losses, grads, logits), None if stats == "none" else measured


def _compute(
    problem: Problem, with_grad: bool, grad_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, MutualStats] | None:
    """Return losses, gradients (K, N, C) and statistics; None where a row is unusable or masked."""
    students, rows, classes = problem.shape
    everyone = problem.students + problem.teachers
    labels = problem.count_labels() if problem.whole is None else problem.whole[0]
    per_label = _inverse(_number(labels))
    per_row = _inverse(rows if problem.whole is None else problem.whole[1])
    factors = (per_label, per_row) if problem.reduction == "mean" else (1.0, 1.0)
    mean = problem.peer_reduction == "mean" and len(everyone) > 1
    kl_weight = _number(problem.kl_weight)
    grads = torch.empty(problem.shape, dtype=grad_dtype) if with_grad else None
    soft, index = problem.soft, problem.index
    found = _native.mutual_loss(
        [_array(z) for z in everyone],
        students,
        None if index is None else index.long().contiguous().numpy(),
        None if index is None else problem.ignore_index,
        None if soft is None else _array(soft),
        None if soft is None else soft.argmax(-1).numpy(),
        None if problem.class_weight is None else _array(problem.class_weight),
        None if problem.row_weight is None else _array(problem.row_weight),
        problem.label_smoothing,
        problem.temperature,
        1.0 / (len(everyone) - 1) if mean else 1.0,
        kl_weight,
        *factors,
        per_label,
        per_row,
        _scales(problem.grad_scale, students),
        [] if grads is None else list(_array(grads)),
        problem.reduction == "none",
        min(torch.get_num_threads(), len(everyone) * rows * classes // _PER_THREAD),
    )
    if found is None:
        return None
    means, correct, each_row = found
    losses, ce, kl = torch.from_numpy(means).unbind()
    if problem.reduction == "none":
        losses, kl_rows = torch.from_numpy(each_row).unbind()
        if kl_weight:
            losses = losses + kl_weight * kl_rows
    finite = torch.ones(students, dtype=torch.bool)
    return losses, grads, MutualStats(ce, kl, torch.from_numpy(correct), finite)


def _array(z: Tensor) -> NDArray[Any]:
    if z.requires_grad:
        z = z.detach()
    if not z.is_contiguous():
        z = z.contiguous()
    if z.dtype == torch.bfloat16:  # a type that numpy lacks: as its bits
        return z.view(torch.int16).numpy().view(np.uint16)
    return z.numpy()


def _number(value: float | Tensor) -> float:
    return float(value.item()) if isinstance(value, Tensor) else value


def _inverse(denominator: float) -> float:
    return 1.0 / denominator if denominator else 0.0


def _scales(scale: float | Tensor | None, students: int) -> list[float]:
    if isinstance(scale, Tensor):
        return [float(s) for s in scale.expand(students).tolist()]
    return [1.0 if scale is None else float(scale)] * students
