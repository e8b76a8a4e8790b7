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
from dml_fast.loss.autograd import tie, tie_each
from dml_fast.loss.bernoulli import add_labels_disagreement
from dml_fast.loss.checks import may_look
from dml_fast.loss.disagreement import add_disagreement
from dml_fast.loss.problem import Losses, MutualStats, Problem, Solution

SCRATCH, IN_PLACE = 0, False  # see `dml_fast.loss.problem.Backend`
_PER_THREAD = 1 << 19  # logits: with fewer, a thread takes longer to start than to help


def unsupported_reason(problem: Problem) -> str | None:
    """Return why the closed form is to take a problem, or None."""
    everyone = problem.students + problem.teachers
    if not may_look(problem.device):
        return "it is called on CPU tensors, and not by torch.compile"
    if any(type(z) is not Tensor for z in everyone):
        return "it takes plain tensors"
    if problem.dtype != torch.float32:
        return "it computes in float32"
    if problem.peer_weight is not None:
        return "it has no peer weights"
    if problem.divergence != "forward":
        return f"it has no divergence {problem.divergence!r}"
    if problem.kl_rows != "all":
        return "it has the divergence of all rows"
    return None


def solve(problem: Problem, with_grad: bool, stats: str) -> Solution:
    """As `dml_fast.loss.problem.Backend.solve`."""
    dtype = torch.bfloat16 if _is_bf16(problem) else torch.float32
    losses, grads, measured = _compute(problem, with_grad, dtype, stats)
    if grads is None:
        return Solution(losses, None, measured)
    parts = zip(grads.unbind(), problem.students, strict=True)
    return Solution(losses, tuple(g.to(z.dtype) for g, z in parts), measured)


def differentiable(
    problem: Problem, logits: tuple[Tensor, ...], stats: str, separate: bool = False
) -> tuple[Losses, MutualStats | None]:
    """As `dml_fast.loss.problem.Backend.differentiable`, with gradients from the forward pass."""
    with torch.no_grad():
        losses, grads, measured = _compute(problem, True, torch.float32, stats)
    assert grads is not None
    return (tie_each if separate else tie)(losses, grads, logits), measured


def _is_bf16(problem: Problem) -> bool:
    return all(z.dtype == torch.bfloat16 for z in problem.students + problem.teachers)


def _compute(
    problem: Problem, with_grad: bool, dtype: torch.dtype, stats: str
) -> tuple[Tensor, Tensor | None, MutualStats | None]:
    """Return losses, gradients (K, N, C) of the dtype, and statistics."""
    students, rows, classes = problem.shape
    everyone = problem.students + problem.teachers
    if not _is_bf16(problem):
        everyone = tuple(z.float() for z in everyone)
    labels = problem.count_labels() if problem.whole is None else problem.whole[0]
    per_label = _inverse(_number(labels))
    per_row = _inverse(rows if problem.whole is None else _number(problem.whole[1]))
    own = problem.ce_weight
    kl_weight = float(np.float32(_number(problem.kl_weight)))  # as if it were a tensor
    grads = torch.empty(problem.shape, dtype=dtype) if with_grad else None
    soft, index, labelled = problem.soft, problem.index, problem.distribution == "bernoulli"
    means, correct, finite, each_row = _native.mutual_loss(
        [_array(z) for z in everyone],
        students,
        None if index is None else index.long().contiguous().numpy(),
        None if index is None else problem.ignore_index,
        None if soft is None else _array(soft),
        None if soft is None or labelled else soft.argmax(-1).numpy(),
        None if problem.class_weight is None else _array(problem.class_weight),
        None if problem.row_weight is None else _array(problem.row_weight),
        problem.label_smoothing,
        problem.temperature,
        problem.peer_reduction == "mean",
        kl_weight,
        (
            *((per_label * own, per_row) if problem.reduction == "mean" else (own, 1.0)),
            per_label,
            per_row,
        ),
        _scales(problem.grad_scale, students),
        [] if grads is None else list(_array(grads)),
        problem.reduction == "none",
        min(torch.get_num_threads(), len(everyone) * rows * classes // _PER_THREAD),
        labels=labelled,
    )
    losses, ce, kl = torch.from_numpy(means).unbind()
    if problem.reduction == "none":
        losses, kl_rows = torch.from_numpy(each_row).unbind()
        losses = losses if own == 1.0 else losses * own
        if kl_weight:
            losses = losses + kl_weight * kl_rows
    if stats == "none":
        return losses, grads, None
    measured = MutualStats(ce, kl, torch.from_numpy(correct), torch.from_numpy(finite))
    if stats == "all" and labelled:
        measured = add_labels_disagreement(problem, measured)
    elif stats == "all":
        z = torch.stack([one.float() for one in problem.students]).div_(problem.temperature)
        measured = add_disagreement(measured, z.log_softmax(-1), problem.batch_shape)
    return losses, grads, measured


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
