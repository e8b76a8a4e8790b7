"""Who learns in a step, who teaches, and what each student reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dml_fast.errors import UserError, brief


def views_of(inputs: Any, count: int) -> tuple[Any, ...]:
    """Return the inputs of each of K students.

    Args:
        inputs: a list or tuple of K.
        count: K.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(inputs, list | tuple):
        raise UserError(
            f"a step with views=True got {brief(inputs)}: give a list of the inputs of each student"
        )
    if len(inputs) != count:
        raise UserError(
            f"a step with views=True got {len(inputs)} views and the cohort has {count} students: "
            "give one for each"
        )
    return tuple(inputs)


def learners_of(
    learners: Sequence[int] | None, teacher: int | None, count: int, method: str
) -> tuple[int, ...]:
    """Return the numbers of the students that learn.

    Args:
        learners: different numbers below K; None: all.
        teacher: the number of one that does not learn, or None.
        count: K.
        method: of the engine.

    Raises:
        UserError: a step cannot have these learners, or this teacher.
    """
    given = range(count) if learners is None else learners
    chosen = tuple(given) if isinstance(given, Iterable) else None
    known = {int(k) for k in chosen or () if k in range(count)}
    if chosen is None or len(known) < len(chosen):
        raise UserError(f"the learners are {given}: give different numbers from 0 to {count - 1}")
    if teacher is not None and (teacher in chosen or teacher not in range(count)):
        raise UserError(
            f"the teacher is {teacher}: give a number from 0 to {count - 1} of a student that "
            "does not learn"
        )
    if method == "distill" and teacher is None and len(chosen) > 1:
        raise UserError(
            "method is distill and several students learn without a teacher: give teacher=0 "
            "and the others as learners"
        )
    return tuple(int(k) for k in chosen)
