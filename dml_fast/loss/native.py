"""The mutual loss on a CPU in C++: one row of all students at a time, which stays in the cache.

`unsupported_reason` says what it leaves to the closed form, whose mathematics it shares.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dml_fast import _native
from dml_fast.loss.autograd import tie, tie_each
from dml_fast.loss.bernoulli import add_labels_disagreement
from dml_fast.loss.disagreement import add_disagreement
from dml_fast.loss.divergences import DIVERGENCES
from dml_fast.loss.problem import Losses, MutualStats, Problem, Solution
from dml_fast.loss.values import may_look

SCRATCH, IN_PLACE = 0, False  # see `dml_fast.loss.problem.Backend`
_PER_THREAD = 1 << 19  # logits: with fewer, a thread takes longer to start than to help


def unsupported_reason(problem: Problem) -> str | None:
    """Return why the closed form is to take a problem, or None."""
    if not may_look(problem.device):
        return "it is called on CPU tensors, and not by torch.compile"
    for z in problem.students + problem.teachers:
        if type(z) is not Tensor:
            return "it takes plain tensors"
    if problem.dtype != torch.float32:
        return "it computes in float32"
    if problem.peer_weight is not None:
        return "it has no peer weights"
    return None


def solve(problem: Problem, with_grad: bool, stats: str) -> Solution:
    """As `dml_fast.loss.problem.Backend.solve`."""
    everyone, bf16, converted = _in_one_dtype(problem)
    grads: tuple[Tensor, ...] = ()
    if with_grad:
        grads = tuple([torch.empty_like(z) for z in everyone[: len(problem.students)]])
    losses, measured = _compute(problem, everyone, bf16, grads, stats)
    if not with_grad:
        return Solution(losses, None, measured)
    if converted:
        grads = tuple([g.to(z.dtype) for g, z in zip(grads, problem.students, strict=True)])
    return Solution(losses, grads, measured)


def differentiable(
    problem: Problem, logits: tuple[Tensor, ...], stats: str, separate: bool = False
) -> tuple[Losses, MutualStats | None]:
    """As `dml_fast.loss.problem.Backend.differentiable`, with gradients from the forward pass."""
    everyone, bf16, _ = _in_one_dtype(problem)
    grads = everyone[0].new_empty(problem.shape, dtype=torch.float32)
    losses, measured = _compute(problem, everyone, bf16, grads.unbind(), stats)
    return (tie_each if separate else tie)(losses, grads, logits), measured


def _in_one_dtype(problem: Problem) -> tuple[list[Tensor], bool, bool]:
    """Return students and teachers (N, C), contiguous, in bf16 if all are, or else in float32.

    Then whether they are in bf16, and whether a dtype was converted.
    """
    everyone = [*problem.students, *problem.teachers]
    dtype = everyone[0].dtype
    alike = all([z.dtype == dtype for z in everyone])
    if alike and (dtype == torch.float32 or dtype == torch.bfloat16):
        plain = [z if z.is_contiguous() else z.detach().contiguous() for z in everyone]
        return plain, dtype == torch.bfloat16, False
    return [z.detach().float().contiguous() for z in everyone], False, True


def _compute(
    problem: Problem,
    everyone: list[Tensor],
    bf16: bool,
    grads: tuple[Tensor, ...],
    stats: str,
) -> tuple[Tensor, MutualStats | None]:
    """Write the gradients, K tensors (N, C) of one dtype or none; return losses and statistics.

    ``everyone`` and ``bf16`` are those of `_in_one_dtype`. The C++ code gets addresses: what has
    them is kept in a variable until it is done.
    """
    students, rows, classes = problem.shape
    first = everyone[0]
    labels = problem.count_labels() if problem.whole is None else problem.whole[0]
    per_label = _inverse(_number(labels))
    counted = problem.count_rows() if problem.whole is None else problem.whole[1]
    per_row = _inverse(_number(counted))
    own, labelled = problem.ce_weight, problem.distribution == "bernoulli"
    kl_weight = problem.kl_weight
    if kl_weight != 1.0:
        kl_weight = float(np.float32(_number(kl_weight)))  # as if it were a tensor
    index, soft, best = _plain(problem.index, torch.int64), _plain(problem.soft), None
    if soft is not None and not labelled:
        best = soft.argmax(-1)
    class_weight, row_weight = _plain(problem.class_weight), _plain(problem.row_weight)
    losses, ce, kl = [first.new_empty(students, dtype=torch.float32) for _ in "123"]
    correct = first.new_empty(students, dtype=torch.int64)
    finite = first.new_empty(students, dtype=torch.bool)
    each_row = None
    if problem.reduction == "none":
        each_row = first.new_empty((2, students, rows), dtype=torch.float32)
    averaged = problem.reduction == "mean"
    _native.mutual_loss(
        [z.data_ptr() for z in everyone],
        rows,
        classes,
        bf16,
        students,
        _address(index),
        None if index is None else problem.ignore_index,
        _address(soft),
        _address(best),
        _address(class_weight),
        _address(row_weight),
        problem.label_smoothing,
        problem.temperature,
        problem.peer_reduction == "mean",
        kl_weight,
        (per_label * own if averaged else own, per_row if averaged else 1.0, per_label, per_row),
        _scales(problem.grad_scale, students),
        [g.data_ptr() for g in grads],
        bool(grads) and grads[0].dtype == torch.float32,
        [losses.data_ptr(), ce.data_ptr(), kl.data_ptr()],
        correct.data_ptr(),
        finite.data_ptr(),
        _address(each_row),
        min(torch.get_num_threads(), len(everyone) * rows * classes // _PER_THREAD),
        labelled,
        DIVERGENCES.index(problem.divergence),
        problem.beta,
        problem.kl_rows == "labelled",
    )
    if each_row is not None:
        losses, kl_rows = each_row.unbind()
        losses = losses if own == 1.0 else losses * own
        if kl_weight:
            losses = losses + kl_weight * kl_rows
    if stats == "none":
        return losses, None
    measured = MutualStats(ce, kl, correct, finite)
    if stats == "all" and labelled:
        measured = add_labels_disagreement(problem, measured)
    elif stats == "all":
        z = torch.stack([one.detach().float() for one in problem.students])
        log_p = z.div_(problem.temperature).log_softmax(-1)
        measured = add_disagreement(measured, log_p, problem.batch_shape)
    return losses, measured


def _plain(x: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    if x is None or (x.dtype == dtype and x.is_contiguous()):
        return x
    return x.detach().to(dtype).contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _number(value: float | Tensor) -> float:
    return float(value.item()) if isinstance(value, Tensor) else value


def _inverse(denominator: float) -> float:
    return 1.0 / denominator if denominator else 0.0


def _scales(scale: float | Tensor | None, students: int) -> list[float]:
    if isinstance(scale, Tensor):
        return [float(s) for s in scale.expand(students).tolist()]
    return [1.0 if scale is None else float(scale)] * students
