"""The kernels as operators of torch, which torch.compile and torch.export see as one node.

Only there: calling an operator costs 6 to 60 µs more than calling the launcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dml_fast.kernels.launch import (
    Answer,
    counted,
    empty_like,
    launch_forward,
    launch_gradient,
    unpack,
)
from dml_fast.loss.problem import Problem

_Arguments = tuple[Any, ...]
_OPTIONAL = 8  # tensors among the arguments, after students and teachers


def forward(problem: Problem, with_grad: bool, save: bool, stats: str) -> Answer:
    """As `dml_fast.kernels.launch.launch`; with `save`, differentiable by the students."""
    outputs = mutual_forward(*_arguments(problem), with_grad, save, stats)
    return unpack(problem, outputs, with_grad, save, stats)


def _arguments(problem: Problem) -> _Arguments:
    """A problem as an operator can take it."""
    kl_weight, scale = problem.kl_weight, problem.grad_scale
    labels, rows = (0.0, 0) if problem.whole is None else problem.whole
    return (
        list(problem.students),
        [z.detach() for z in problem.teachers],
        problem.index,
        problem.soft,
        problem.class_weight,
        problem.row_weight,
        problem.peer_weight,
        kl_weight if isinstance(kl_weight, Tensor) else None,
        scale if isinstance(scale, Tensor) else None,
        labels if isinstance(labels, Tensor) else None,
        0.0 if isinstance(kl_weight, Tensor) else float(kl_weight),
        1.0 if scale is None or isinstance(scale, Tensor) else float(scale),
        0.0 if isinstance(labels, Tensor) else float(labels),
        rows,
        problem.ignore_index,
        problem.temperature,
        problem.label_smoothing,
        problem.peer_reduction,
        problem.reduction,
    )


def _problem(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    index: Tensor | None,
    soft: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    peer_weight: Tensor | None,
    kl_tensor: Tensor | None,
    scale_tensor: Tensor | None,
    labels_tensor: Tensor | None,
    kl_weight: float,
    grad_scale: float,
    labels: float,
    whole_rows: int,
    ignore_index: int | None,
    temperature: float,
    label_smoothing: float,
    peer_reduction: str,
    reduction: str,
) -> Problem:
    """The inverse of `_arguments`, but for the batch's shape."""
    whole = None
    if whole_rows:
        whole = (labels if labels_tensor is None else labels_tensor, whole_rows)
    return Problem(
        students=tuple(students),
        teachers=tuple(teachers),
        dtype=torch.float32,
        batch_shape=students[0].shape[:1],
        index=index,
        ignore_index=ignore_index,
        soft=soft,
        class_weight=class_weight,
        row_weight=row_weight,
        peer_weight=peer_weight,
        kl_weight=kl_weight if kl_tensor is None else kl_tensor,
        temperature=temperature,
        label_smoothing=label_smoothing,
        peer_reduction=peer_reduction,
        reduction=reduction,
        whole=whole,
        grad_scale=grad_scale if scale_tensor is None else scale_tensor,
    )


@torch.library.custom_op("dml_fast::mutual_forward", mutates_args=())
def mutual_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    index: Tensor | None,
    soft: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    peer_weight: Tensor | None,
    kl_tensor: Tensor | None,
    scale_tensor: Tensor | None,
    labels_tensor: Tensor | None,
    kl_weight: float,
    grad_scale: float,
    labels: float,
    whole_rows: int,
    ignore_index: int | None,
    temperature: float,
    label_smoothing: float,
    peer_reduction: str,
    reduction: str,
    with_grad: bool,
    save: bool,
    stats: str,
) -> list[Tensor]:
    """The tensors of `dml_fast.kernels.launch.launch_forward`."""
    problem = _problem(
        students,
        teachers,
        index,
        soft,
        class_weight,
        row_weight,
        peer_weight,
        kl_tensor,
        scale_tensor,
        labels_tensor,
        kl_weight,
        grad_scale,
        labels,
        whole_rows,
        ignore_index,
        temperature,
        label_smoothing,
        peer_reduction,
        reduction,
    )
    return launch_forward(problem, with_grad, save, stats, keep_counters=False)


@mutual_forward.register_fake
def _(students: Sequence[Tensor], teachers: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    *_, reduction, with_grad, save, stats = rest
    count, rows = len(students), students[0].shape[0]

    def floats(*shape: int | torch.SymInt) -> Tensor:
        return students[0].new_empty(shape, dtype=torch.float32)

    outputs = [floats(count, rows) if reduction == "none" else floats(count)]
    if stats != "none":
        correct = students[0].new_empty(count, dtype=torch.int64)
        outputs += [floats(2, count), correct, correct.new_empty(count, dtype=torch.uint8)]
    if stats == "all":
        outputs += [floats(count + 1 + count * count), floats(rows)]
    if save:
        outputs.append(floats(3 * count + 2 * len(teachers) + 1, rows))
    return outputs + [empty_like(z) for z in students if with_grad]


@torch.library.custom_op("dml_fast::mutual_backward", mutates_args=())
def mutual_backward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    index: Tensor | None,
    soft: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    peer_weight: Tensor | None,
    kl_tensor: Tensor | None,
    scale_tensor: Tensor | None,
    labels_tensor: Tensor | None,
    kl_weight: float,
    grad_scale: float,
    labels: float,
    whole_rows: int,
    ignore_index: int | None,
    temperature: float,
    label_smoothing: float,
    peer_reduction: str,
    reduction: str,
    saved: Tensor,
    outer: Tensor,
) -> list[Tensor]:
    """The gradient (N, C) of each student; see `dml_fast.kernels.launch.launch_gradient`."""
    problem = _problem(
        students,
        teachers,
        index,
        soft,
        class_weight,
        row_weight,
        peer_weight,
        kl_tensor,
        scale_tensor,
        labels_tensor,
        kl_weight,
        grad_scale,
        labels,
        whole_rows,
        ignore_index,
        temperature,
        label_smoothing,
        peer_reduction,
        reduction,
    )
    grads = [empty_like(z) for z in students]
    launch_gradient(counted(problem), saved, outer, grads)
    return grads


@mutual_backward.register_fake
def _(students: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return [empty_like(z) for z in students]


def _keep(ctx: Any, inputs: _Arguments, output: list[Tensor]) -> None:
    students, teachers, *rest = inputs[:-3]
    *_, save, stats = inputs
    saved = output[{"none": 1, "cheap": 4, "all": 6}[stats]] if save else None
    ctx.count, ctx.numbers = len(students), rest[_OPTIONAL:]
    ctx.save_for_backward(saved, *rest[:_OPTIONAL], *students, *teachers)


def _differentiate(ctx: Any, outer: list[Tensor | None]) -> tuple[Any, ...]:
    saved, *tensors = ctx.saved_tensors
    optional, everyone = tensors[:_OPTIONAL], tensors[_OPTIONAL:]
    students, teachers = everyone[: ctx.count], everyone[ctx.count :]
    grads: list[Tensor | None] = [None] * len(students)
    if saved is not None and outer[0] is not None:
        problem = (students, teachers, *optional, *ctx.numbers)
        grads = mutual_backward(*problem, saved, outer[0])
    return (grads, [None] * len(teachers), *[None] * (_OPTIONAL + len(ctx.numbers) + 3))


mutual_forward.register_autograd(_differentiate, setup_context=_keep)
