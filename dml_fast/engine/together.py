"""The passes of all students of a process as one compiled function, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from dml_fast.engine.student import Student
from dml_fast.errors import UserError


class Together:
    """Runs the training passes of several students as one function of `torch.compile`.

    Args:
        students: of one cohort, without DDP or FSDP.
        combo_kernels: whether inductor may put operations of different students into one kernel of
            a GPU, where torch has that option: small networks fill little of a GPU by themselves.

    Raises:
        UserError: a student is shared by several processes, or they are on several devices.
    """

    def __init__(self, students: Sequence[Student], combo_kernels: bool = True) -> None:
        for student in students:
            if type(student) is not Student:
                raise UserError(
                    f"a student ({student.arch}) is trained by several processes, whose passes "
                    "cannot be compiled together: compile each student"
                )
        devices = {str(student.parameters[0].device) for student in students}
        if len(devices) > 1:
            raise UserError(
                f"students are on {', '.join(sorted(devices))}, and one function is compiled for "
                "one device: compile each student"
            )
        self._compiled: dict[object, Callable[..., list[Any]]] = {}
        self._combo = combo_kernels

    def __call__(
        self, students: Sequence[Student], inputs: Sequence[Any], features: bool
    ) -> list[Any]:
        """Return what each student's pass gives, with its graph.

        Args:
            students: those that learn in this step.
            inputs: one for each of them.
            features: whether the pass gives features and logits, or what its ``forward`` does.
        """
        for student in students:
            student.keep_statistics()
        form = (features, *map(id, students))
        if form not in self._compiled:
            self._compiled[form] = _compile(list(students), features, self._combo)
        return self._compiled[form](list(inputs))


def _compile(
    students: list[Student], features: bool, combo_kernels: bool
) -> Callable[[list[Any]], list[Any]]:
    def passes(inputs: list[Any]) -> list[Any]:
        return [
            student.run(inputs, features) for student, inputs in zip(students, inputs, strict=True)
        ]

    options: dict[str, Any] = {}
    if combo_kernels and students[0].precision.device.type == "cuda":
        from torch._inductor import config

        if hasattr(config, "combo_kernels"):
            options["options"] = {"combo_kernels": True}
    compiled: Callable[[list[Any]], list[Any]] = torch.compile(passes, dynamic=False, **options)
    return compiled


def backward(
    students: Sequence[Student], ends: Sequence[tuple[Tensor, Tensor]], share: Fraction
) -> None:
    """Run the backward pass of students whose forward passes were one function.

    Args:
        students: all of them.
        ends: where it begins, with the gradients there: `Student.ends` of each student.
        share: of the batch that this pass is of.
    """
    torch.autograd.backward([end for end, _ in ends], [grad for _, grad in ends])
    for student in students:
        student.pending += share
