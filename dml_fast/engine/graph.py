"""The whole cohort step as one CUDA graph: captured once, replayed with one launch a step.

A step of K networks is a thousand and more kernel launches of some microseconds each on the host,
for less work than that on the device. A graph's replay is one launch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from dml_fast.engine.cohort import Cohort
from dml_fast.engine.executor import Executor, Lesson, Step, StepResult
from dml_fast.engine.snapshot import Snapshot
from dml_fast.engine.streams import StreamLayer, Streams
from dml_fast.engine.student import Student
from dml_fast.errors import reason

logger = logging.getLogger(__name__)

T = TypeVar("T")

WARM_UP = 3
"""Steps before the capture: libraries set themselves up, Triton compiles."""


@dataclass
class _Captured:
    """A graph with the tensors that it reads, and what it was captured for."""

    lesson: Lesson
    replay: Callable[[], Tensor]
    roles: object


class Graph(Executor):
    """Captures the first batch's step, and replays it for batches of the same shapes.

    Other batches, and what cannot be captured, run eagerly on the same streams, with one line in
    the log. The results are those of the eager run from the first step on: what the warm-up
    changes is put back in place.

    Args:
        device: the GPU.
        layer: its streams; the tests give others.
    """

    name = "graph"

    def __init__(self, device: torch.device, layer: StreamLayer | None = None) -> None:
        self._eager = Streams(device, layer)
        self._layer = self._eager.layer
        self._stream = self._layer.new()
        self._captured: _Captured | None = None
        self._said: set[str] = set()
        self._never = ""  # why nothing can be captured

    def fork(self, students: Sequence[Student], work: Callable[[int], T]) -> list[T]:
        """As `Streams`, in a capture and out of one."""
        return self._eager.fork(students, work)

    def run(self, step: Step, lesson: Lesson, cohort: Cohort) -> StepResult:
        """Replay, capture before that if need be, or run eagerly and say why."""
        if why := self._never or _refusal(cohort):
            return self._fall_back(why, step, lesson)
        roles = lesson.learners, lesson.teacher, tuple(student.generation for student in cohort)
        if self._captured is None or self._captured.roles != roles:
            self._captured = None  # its memory goes before the new graph's comes
            try:
                self._captured = self._capture(step, lesson, cohort, roles)
            except Exception as error:
                self._never = f"the step cannot be captured ({reason(error)})"
                for student in cohort:
                    student.forget_step()
                return self._fall_back(self._never, step, lesson)
        if not _fits(self._captured.lesson, lesson):
            return self._fall_back("a batch differs in shape from the first", step, lesson)
        _fill(self._captured.lesson, lesson)
        return StepResult.unpack(self._captured.replay().clone())  # the next replay overwrites it

    def _capture(self, step: Step, lesson: Lesson, cohort: Cohort, roles: object) -> _Captured:
        own = _own(lesson)
        snapshot = Snapshot(cohort)
        here = self._layer.current()
        self._layer.wait(self._stream, here)
        try:
            with self._layer.on(self._stream):
                for _ in range(WARM_UP):
                    step(own, self)
        finally:
            self._layer.wait(here, self._stream)
            snapshot.restore()
        replay = self._layer.capture(self._stream, lambda: step(own, self).pack())
        return _Captured(own, replay, roles)

    def _fall_back(self, why: str, step: Step, lesson: Lesson) -> StepResult:
        if why not in self._said:
            self._said.add(why)
            logger.info("executor graph: %s: such steps run eagerly, on streams", why)
        return step(lesson, self)


def _refusal(cohort: Cohort) -> str:
    """Why this cohort cannot be captured, or ""."""
    for k, student in enumerate(cohort):
        if any(norm.momentum is None for norm in student.norms):
            return f"student {k} has a BatchNorm with momentum=None, which asks the device"
    return ""


def _own(lesson: Lesson) -> Lesson:
    """Tensors of the same layout for the graph to read; views that are one tensor stay one."""
    copies = {id(view): view.clone() for view in lesson.inputs}
    weight = torch.as_tensor(lesson.kl_weight, dtype=torch.float32, device=lesson.target.device)
    return replace(
        lesson,
        inputs=tuple(copies[id(view)] for view in lesson.inputs),
        target=lesson.target.clone(),
        kl_weight=weight.clone(),
    )


def _fits(own: Lesson, lesson: Lesson) -> bool:
    def layout(one: Lesson) -> list[object]:
        tensors = [*one.inputs, one.target]
        first_use = [[id(x) for x in one.inputs].index(id(x)) for x in one.inputs]
        return [first_use, *((t.shape, t.dtype, t.stride()) for t in tensors)]

    return layout(own) == layout(lesson)


def _fill(own: Lesson, lesson: Lesson) -> None:
    """Give the graph a batch."""
    pairs = {id(x): (x, y) for x, y in zip(own.inputs, lesson.inputs, strict=True)}
    for mine, its in pairs.values():
        mine.copy_(its, non_blocking=True)
    own.target.copy_(lesson.target, non_blocking=True)
    weight = own.kl_weight
    assert isinstance(weight, Tensor)
    if isinstance(lesson.kl_weight, Tensor):
        weight.copy_(lesson.kl_weight)
    else:
        weight.fill_(lesson.kl_weight)
