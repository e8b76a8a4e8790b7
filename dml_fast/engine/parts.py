"""A batch in equal parts, one after the other: the memory of a part, the update of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dml_fast.distributed.world import World
from dml_fast.engine.executor import Lesson, StepResult
from dml_fast.errors import UserError, check_whole
from dml_fast.loss.problem import UNLABELLED_TARGET


def check_parts(parts: int, update: str, small_loss: float) -> None:
    """Refuse a number of parts, and options beside which there can be only one.

    Raises:
        UserError: the option, and what to give.
    """
    check_whole("parts", parts, 1)
    if parts == 1:
        return
    if update == "alternating":
        raise UserError(
            f"parts is {parts} and update is alternating, whose students predict the whole batch "
            "again: give parts=1, or simultaneous"
        )
    if small_loss:
        raise UserError(
            f"parts is {parts} and small_loss {small_loss}, which compares the rows of the whole "
            "batch: leave out one or the other"
        )


def split(lesson: Lesson, parts: int) -> list[Lesson]:
    """Return a lesson as lessons on equal parts of its rows, in their order.

    Raises:
        UserError: the rows do not divide, or the inputs hold a tensor of other rows.
    """
    if parts == 1:
        return [lesson]
    rows = len(lesson.target)
    if not rows or rows % parts:
        raise UserError(
            f"a batch of {rows} rows does not divide into {parts} equal parts: give a multiple of "
            f"{parts} rows"
        )
    size = rows // parts

    def part(number: int) -> Lesson:
        def cut(tensor: Tensor) -> Tensor:
            if tensor.dim() and len(tensor) != rows:
                raise UserError(
                    f"parts is {parts}, and the inputs hold a tensor {tuple(tensor.shape)} beside "
                    f"a target of {rows} rows, so its parts are not known: give parts=1"
                )
            return tensor[number * size : (number + 1) * size] if tensor.dim() else tensor

        # views that share an object still do
        cuts = {id(x): tree_map_only(Tensor, cut, x) for x in lesson.inputs}
        return replace(
            lesson,
            inputs=tuple(cuts[id(x)] for x in lesson.inputs),
            target=cut(lesson.target),
            whole=lesson.target,
            parts=parts,
            last=number == parts - 1,
        )

    return [part(number) for number in range(parts)]


def denominators(
    lesson: Lesson, classes: int, class_weight: Tensor | None, world: World
) -> tuple[float | Tensor, int] | None:
    """Return `dml_fast.loss.problem.Problem.whole` of a part; None where that is the batch.

    Columns of processes have as many labels each, but not as large a sum of their class weights:
    the mean of these sums makes the mean of the columns' losses that of the whole batch.

    Args:
        lesson: of a part.
        classes: C.
        class_weight: (C,) of the loss.
        world: the processes that share a batch.
    """
    shared = class_weight is not None and world.mesh.data > 1
    target = lesson.target if shared and lesson.whole is None else lesson.whole
    if target is None:
        return None
    if target.is_floating_point():
        rows = target.numel() // classes
        return rows, rows
    labelled = target != UNLABELLED_TARGET
    if class_weight is None:
        return labelled.sum(), target.numel()
    known = target.long().clamp(0, len(class_weight) - 1)  # the loss refuses other classes
    total = (class_weight[known] * labelled).sum()
    return (world.sum_over_data(total) / world.mesh.data if shared else total), target.numel()


def added(results: Sequence[StepResult]) -> StepResult:
    """Return the result of a batch: each part has its share of every sum and mean."""
    if len(results) == 1:
        return results[0]
    *numbers, skipped = (torch.stack(column) for column in zip(*results, strict=True))
    return StepResult._make([*(column.sum(0) for column in numbers), skipped.any(0)])
