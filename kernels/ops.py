"""The kernels as operators of torch, which are one node for torch.compile and torch.export.

Only these two use them: calling an operator takes 6 to 60 µs longer than calling the launcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dml_fast.kernels.choice import saved_rows
from dml_fast.kernels.launch import (
    Answer,
    counted,
    empty_like,
    launch_forward,
    launch_gradient,
    unpack,
)
from dml_fast.loss.problem import Problem

# A `Problem` as arguments of an operator: two for each field that is a number or a tensor.
_PROBLEM = """
    Tensor[] students, Tensor[] teachers, Tensor? index, Tensor? soft, Tensor? class_weight,
    Tensor? row_weight, Tensor? peer_weight, Tensor? kl_tensor, Tensor? scale_tensor,
    Tensor? labels_tensor, Tensor? rows_tensor, float kl_weight, float grad_scale, float labels,
    SymInt whole_rows, SymInt? ignore_index, float temperature, float label_smoothing,
    str divergence, float beta, str peer_reduction, str kl_rows, str reduction
"""
# The fields of `Problem` that are arguments under the same name.
_TENSORS = ("index", "soft", "class_weight", "row_weight", "peer_weight")
_OPTIONS = (
    "ignore_index",
    "temperature",
    "label_smoothing",
    "divergence",
    "beta",
    "peer_reduction",
    "kl_rows",
    "reduction",
)
_OPTIONAL = len(_TENSORS) + 4  # tensors after students and teachers


def forward(problem: Problem, with_grad: bool, save: bool, stats: str) -> Answer:
    """As `dml_fast.kernels.launch.launch`; with `save`, differentiable once."""
    outputs = mutual_forward(*_arguments(problem), with_grad, save, stats)
    return unpack(problem, outputs, with_grad, save, stats)


def _arguments(problem: Problem) -> tuple[Any, ...]:
    """Return the arguments of `_PROBLEM`."""
    kl_weight, scale = problem.kl_weight, problem.grad_scale
    labels, rows = (0.0, 0) if problem.whole is None else problem.whole
    return (
        list(problem.students),
        [z.detach() for z in problem.teachers],
        *(getattr(problem, name) for name in _TENSORS),
        kl_weight if isinstance(kl_weight, Tensor) else None,
        scale if isinstance(scale, Tensor) else None,
        labels if isinstance(labels, Tensor) else None,
        rows if isinstance(rows, Tensor) else None,
        0.0 if isinstance(kl_weight, Tensor) else float(kl_weight),
        1.0 if scale is None or isinstance(scale, Tensor) else float(scale),
        0.0 if isinstance(labels, Tensor) else float(labels),
        0 if isinstance(rows, Tensor) else rows,
        *(getattr(problem, name) for name in _OPTIONS),
    )


def _problem(students: Sequence[Tensor], teachers: Sequence[Tensor], *rest: Any) -> Problem:
    """Return the problem with these arguments; its batch has one dimension."""
    tensors, rest = rest[: len(_TENSORS)], rest[len(_TENSORS) :]
    kl_tensor, scale_tensor, labels_tensor, rows_tensor, *numbers = rest
    kl_weight, grad_scale, labels, rows, *options = numbers
    whole_labels = labels if labels_tensor is None else labels_tensor
    whole_rows = rows if rows_tensor is None else rows_tensor
    return Problem(
        students=tuple(students),
        teachers=tuple(teachers),
        dtype=torch.float32,
        batch_shape=students[0].shape[:1],
        kl_weight=kl_weight if kl_tensor is None else kl_tensor,
        grad_scale=grad_scale if scale_tensor is None else scale_tensor,
        whole=None if rows_tensor is None and not rows else (whole_labels, whole_rows),
        **dict(zip(_TENSORS, tensors, strict=True)),
        **dict(zip(_OPTIONS, options, strict=True)),
    )


@torch.library.custom_op(
    "dml_fast::mutual_forward",
    mutates_args=(),
    schema=f"({_PROBLEM}, bool with_grad, bool save, str stats) -> Tensor[]",
)
def mutual_forward(*arguments: Any) -> list[Tensor]:
    """Return the tensors of `dml_fast.kernels.launch.launch_forward`."""
    *problem, with_grad, save, stats = arguments
    return launch_forward(_problem(*problem), with_grad, save, stats, keep_counters=False)


@mutual_forward.register_fake
def _(students: Sequence[Tensor], teachers: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    *_, reduction, with_grad, save, stats = rest
    count, rows = len(students), students[0].shape[0]
    problem = _problem(students, teachers, *rest[:-3])

    def floats(*shape: int | torch.SymInt) -> Tensor:
        return students[0].new_empty(shape, dtype=torch.float32)

    outputs = [floats(count, rows) if reduction == "none" else floats(count)]
    if stats != "none":
        correct = students[0].new_empty(count, dtype=torch.int64)
        outputs += [floats(2, count), correct, correct.new_empty(count, dtype=torch.uint8)]
    if stats == "all":
        outputs += [floats(count + 1 + count * count), floats(rows)]
    if save:
        outputs.append(floats(saved_rows(problem), rows))
    return outputs + [empty_like(z) for z in students if with_grad]


@torch.library.custom_op(
    "dml_fast::mutual_backward",
    mutates_args=(),
    schema=f"({_PROBLEM}, Tensor saved, Tensor outer) -> Tensor[]",
)
def mutual_backward(*arguments: Any) -> list[Tensor]:
    """Return the gradient (N, C) of each student; see `launch.launch_gradient`."""
    *problem, saved, outer = arguments
    grads = [empty_like(z) for z in arguments[0]]
    launch_gradient(counted(_problem(*problem)), saved, outer, grads)
    return grads


@mutual_backward.register_fake
def _(students: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return [empty_like(z) for z in students]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
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
        grads = mutual_backward(students, teachers, *optional, *ctx.numbers, saved, outer[0])
    return (grads, [None] * len(teachers), *[None] * (_OPTIONAL + len(ctx.numbers) + 3))


mutual_forward.register_autograd(_differentiate, setup_context=_keep)
