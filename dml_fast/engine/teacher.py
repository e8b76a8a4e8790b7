"""A fixed teacher: a trained network that is heard in every step and never learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dml_fast.engine.calls import Call, check_kinds, logits_of
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.precision import Precision, keep_in_full_precision
from dml_fast.errors import UserError, brief, check_whole


class Teacher:
    """A network that teaches the students of an `Engine` beside their peers.

    Its passes are those of evaluation, without a graph, and change nothing in it.

    Args:
        model: on the students' device; it is put into evaluation mode.
        precision: how to run its passes.
        view: the number of the student whose inputs it reads.
        prepare: makes its inputs of that student's, such as images with another normalisation.
        arch: the architecture's name, for messages.

    Raises:
        UserError: an argument is of another kind.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: Precision,
        view: int = 0,
        prepare: Callable[[Any], Any] | None = None,
        arch: str = "",
    ) -> None:
        check_kinds(
            "a teacher",
            "Teacher(model, precision)",
            model=(model, nn.Module),
            precision=(precision, Precision),
        )
        check_whole("view", view, 0)
        keep_in_full_precision(model, precision)
        self.model = model.eval()
        self.precision = precision
        self.view = view
        self.prepare = prepare
        self.arch = arch or type(model).__name__
        self._call = Call(model)

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Any]) -> Tensor:
        """Return logits (N, C) of the inputs of K students, of which it reads one."""
        own = inputs[self.view]
        with self.precision.autocast():
            return logits_of(
                self._call(self.model, self.prepare(own) if self.prepare else own), self.arch
            )


def check_teachers(teachers: Sequence[Teacher], method: str, cohort: Cohort) -> tuple[Teacher, ...]:
    """Return an engine's teachers; refuse those that it cannot have.

    Raises:
        UserError: one is something else, reads what no student does, or is a student; or the method
            has no place for them.
    """
    found = tuple(teachers)
    for m, one in enumerate(found):
        if not isinstance(one, Teacher):
            raise UserError(
                f"teacher {m} of an engine is {brief(one)}: give Teacher(model, precision)"
            )
        if one.view >= cohort.total:
            raise UserError(
                f"teacher {m} reads the inputs of student {one.view}, and the cohort has "
                f"{cohort.total}: give it another view"
            )
        if any(one.model is model for model in cohort.models):
            raise UserError(f"teacher {m} is a student too: give it a copy, which does not learn")
    if found and method not in ("dml", "dml_e"):
        raise UserError(
            f"method is {method}, in which fixed teachers have no place: give dml, or leave them "
            "out"
        )
    return found
