"""The whole cohort step as one CUDA graph: captured once, then replayed with one launch per step.

A step of K networks is more than a thousand kernel launches, and each costs the host some
microseconds: more than the work costs the device. A graph's replay is one launch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from dml_fast.engine.cohort import Cohort
from dml_fast.engine.executor import Executor, Lesson, Network, Step, StepResult
from dml_fast.engine.snapshot import Snapshot
from dml_fast.engine.streams import StreamLayer, Streams
from dml_fast.errors import brief, reason

logger = logging.getLogger(__name__)

T = TypeVar("T")

WARM_UP = 3
"""Steps before the capture, in which libraries initialise and Triton compiles."""


_LEAVES = (Tensor, int, float, str, NoneType)  # what inputs may hold, in tuples, lists and dicts


@dataclass
class _Captured:
    """A graph, the tensors that it reads, and the students' roles that it was captured for."""

    lesson: Lesson
    replay: Callable[[], Tensor]
    roles: object


class Graph(Executor):
    """Captures the first batch's step, and replays it for batches of the same shapes.

    Other batches, and what cannot be captured, run eagerly on the same streams, with one line in
    the log. From the first step on, the results are those of an eager run: whatever the warm-up
    changes is restored.

    Args:
        device: the GPU.
        layer: its streams; tests replace them.
    """

    name = "graph"

    def __init__(self, device: torch.device, layer: StreamLayer | None = None) -> None:
        self._eager = Streams(device, layer)
        self._layer = self._eager.layer
        self._stream = self._layer.new()
        self._captured: _Captured | None = None
        self._said: set[str] = set()
        self._never = ""  # why nothing can be captured

    def fork(self, students: Sequence[Network], work: Callable[[int], T]) -> list[T]:
        """As `Streams.fork`, inside and outside a capture."""
        return self._eager.fork(students, work)

    def run(self, step: Step, lesson: Lesson, cohort: Cohort) -> StepResult:
        """Replay, after a capture where one is needed; or run eagerly and log why."""
        if why := self._never or _refusal(cohort, lesson):
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


def _refusal(cohort: Cohort, lesson: Lesson) -> str:
    """Return why this cohort's step on such inputs cannot be captured, or ""."""
    for leaf in tree_leaves(lesson.inputs):
        if not isinstance(leaf, _LEAVES):
            return f"the inputs hold {brief(leaf)}, which a graph cannot copy"
    if lesson.accumulate or any(student.pending for student in cohort):
        return "gradients accumulate over several batches"
    for k, student in enumerate(cohort):
        if not student.stepper.fused:
            kind = type(student.optimizer).__name__
            return f"the optimizer {kind} of student {k} is not fused, so the host decides"
        if any(norm.momentum is None for norm in student.norms):
            return f"student {k} has a BatchNorm with momentum=None, which waits for the device"
    return ""


def _own(lesson: Lesson) -> Lesson:
    """Return a lesson with copies for the graph to read; views that share an object still do."""
    copies = {id(x): tree_map_only(Tensor, Tensor.clone, x) for x in lesson.inputs}
    device = lesson.target.device
    weight = torch.as_tensor(lesson.kl_weight, dtype=torch.float32, device=device)
    left_out = torch.as_tensor(lesson.left_out, dtype=torch.float64, device=device)
    return replace(
        lesson,
        inputs=tuple(copies[id(x)] for x in lesson.inputs),
        target=lesson.target.clone(),
        kl_weight=weight.clone(),
        left_out=left_out.clone(),
    )


def _fits(own: Lesson, lesson: Lesson) -> bool:
    """Return whether a lesson's tensors have the layout of the graph's own, and all else is equal.

    What is no tensor is in the graph as a constant.
    """

    def layout(one: Lesson) -> list[object]:
        leaves, structure = tree_flatten([one.inputs, one.target])
        first_use = [[id(x) for x in one.inputs].index(id(x)) for x in one.inputs]
        return [
            first_use,
            structure,
            *((x.shape, x.dtype, x.stride()) if isinstance(x, Tensor) else x for x in leaves),
        ]

    return layout(own) == layout(lesson)


def _fill(own: Lesson, lesson: Lesson) -> None:
    """Copy a batch into the graph's own lesson."""
    pairs = {id(x): (x, y) for x, y in zip(own.inputs, lesson.inputs, strict=True)}
    for mine, new in pairs.values():
        for x, y in zip(tree_leaves(mine), tree_leaves(new), strict=True):
            if isinstance(x, Tensor):
                x.copy_(y, non_blocking=True)
    own.target.copy_(lesson.target, non_blocking=True)
    for number, value in ((own.kl_weight, lesson.kl_weight), (own.left_out, lesson.left_out)):
        assert isinstance(number, Tensor)
        if isinstance(value, Tensor):
            number.copy_(value)
        else:
            number.fill_(value)
