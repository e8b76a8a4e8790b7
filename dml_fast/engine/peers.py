"""Whom students hear: one another or the averages of their weights, also of other processes."""

from __future__ import annotations

import torch
from torch import Tensor

from dml_fast.distributed.exchange import Exchange
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.executor import Lesson
from dml_fast.engine.mutual import Taught
from dml_fast.errors import UserError, check_choice


def check_teach_with(
    teach_with: str, method: str, update: str, teachers: int, cohort: Cohort
) -> None:
    """Refuse averages as teachers where there are none, or where they mean nothing.

    Args:
        teach_with: ``student`` or ``ema``.
        method: of the engine.
        update: of the engine.
        teachers: how many fixed ones it has.
        cohort: its students.

    Raises:
        UserError: what goes with what.
    """
    check_choice("teach_with", teach_with, ("student", "ema"))
    if teach_with == "student":
        return
    for name, value, needed in (("method", method, "dml"), ("update", update, "simultaneous")):
        if value != needed:
            raise UserError(
                f"teach_with is ema, which goes with {name} {needed}, and {name} is {value}: "
                f"choose {needed}, or leave out teach_with"
            )
    if teachers:
        raise UserError(
            f"teach_with is ema and there are {teachers} fixed teachers: leave out one or the other"
        )
    for student in cohort:
        student.network(teach_with)


def needed_exchange(cohort: Cohort, lesson: Lesson) -> Exchange | None:
    """Return what a step gets the logits of other ranks by, if it needs them.

    It does without teaching too, where their KL is shown.
    """
    needed = len(lesson.learners) > 1 or lesson.teacher is not None
    return cohort.exchange if needed else None


def exchanged(
    exchange: Exchange,
    mine: dict[int, Tensor],
    heard: dict[int, Tensor],
    taught: Taught | None,
    lesson: Lesson,
) -> tuple[dict[int, Tensor], dict[int, Tensor], Taught | None]:
    """Return what students say in a step, those of every rank.

    Args:
        exchange: of `needed_exchange`.
        mine: (N, C) logits of each learner of this rank, by number.
        heard: likewise of their averages, or none.
        taught: by the teacher, if it is here.
        lesson: of the step.

    Returns:
        The same of all learners; what the teacher says.
    """
    teacher = lesson.teacher
    if teacher is not None and taught is not None:
        mine = {**mine, teacher: taught.logits[0]}
    if heard:  # one collective for both
        both = exchange({k: torch.stack([z, heard[k].to(z.dtype)]) for k, z in mine.items()})
        found, heard = ({k: z[part] for k, z in both.items()} for part in (0, 1))
    else:
        found = exchange(mine)
    if teacher is not None:
        taught = Taught.alone(found[teacher], len(lesson.learners))
    return {k: found[k] for k in lesson.learners}, heard, taught
