"""The contract between the cohort's step and what runs it: lessons, results, executors.

The step forks twice and joins twice (`dml_fast.engine.step`). Between a fork and its join, an
executor decides when and where the work of each student runs. All executors give the numbers of
`Sequential`: on a CPU bit for bit, for the same number of intra-op threads per student, on which
the sums in convolutions depend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from dml_fast.engine.cohort import Cohort
from dml_fast.engine.student import Student
from dml_fast.engine.teacher import Teacher

T = TypeVar("T")
Network: TypeAlias = Student | Teacher


@dataclass(frozen=True)
class Lesson:
    """What a step works on.

    Attributes:
        inputs: K of them, one for each student, whether or not it learns: tensors (N, ...), or
            what else the models take; often the same object K times.
        target: (N,) classes or (N, C) probabilities.
        kl_weight: of the mutual term in this step.
        left_out: the share of the labelled rows that small-loss selection leaves out in this step.
        accumulate: whether gradients are kept and nobody is updated.
        learners: the numbers of the A students that learn.
        teacher: the number of the only student that teaches; None where all learners do.
        whole: the target of the batch of which this is a part; None where it is all of it.
        parts: how many equal parts that batch has.
        last: whether no part of it comes after this one.
    """

    inputs: tuple[Any, ...]
    target: Tensor
    kl_weight: float | Tensor
    learners: tuple[int, ...]
    teacher: int | None = None
    left_out: float | Tensor = 0.0
    accumulate: bool = False
    whole: Tensor | None = None
    parts: int = 1
    last: bool = True


class StepResult(NamedTuple):
    """What one step gave, for the A students of this process that learned, on their device.

    Attributes:
        losses: (A,) float, ce + kl_weight * kl + feature_weight * extra.
        ce: (A,) float, cross-entropy.
        kl: (A,) float, the mutual term before its weight.
        extra: (A,) float, the loss on features before its weight; 0 where there is none.
        correct: (A,) number of labelled rows whose class was predicted, whether or not they taught.
        labelled: (A,) number of rows that have a label.
        kept: (A,) number of these that taught: all that small-loss selection did not leave out.
        skipped: (A,) bool, whether the update was skipped for a gradient that is not finite.
    """

    losses: Tensor
    ce: Tensor
    kl: Tensor
    extra: Tensor
    correct: Tensor
    labelled: Tensor
    kept: Tensor
    skipped: Tensor

    @classmethod
    def empty(cls, device: torch.device) -> StepResult:
        """Return the result of no student."""
        none = torch.zeros(0, device=device)
        return cls(none, none, none, none, none, none, none, none.bool())

    @classmethod
    def joined(cls, results: Sequence[StepResult]) -> StepResult:
        """Return the results of several groups of students as one, at least one group."""
        return cls(*map(torch.cat, zip(*results, strict=True)))

    def pack(self) -> Tensor:
        """Return all of it as one tensor (8, A), which takes one copy to keep."""
        return torch.stack([row.to(self.losses.dtype) for row in self])

    @classmethod
    def unpack(cls, packed: Tensor) -> StepResult:
        """Return what `pack` was given; the rows are views of ``packed``."""
        losses, ce, kl, extra, correct, labelled, kept, skipped = packed
        return cls(losses, ce, kl, extra, correct, labelled, kept, skipped != 0)


Step: TypeAlias = "Callable[[Lesson, Executor], StepResult]"


class Executor(ABC):
    """Runs the work of students. A subclass must define ``fork``.

    Attributes:
        name: as `dml_fast.engine.choice.make_executor` takes it.
    """

    name: str

    @abstractmethod
    def fork(self, students: Sequence[Network], work: Callable[[int], T]) -> list[T]:
        """Run ``work(k)`` for each student, wait for all, and return the results in order.

        Args:
            students: A of them, and fixed teachers after them.
            work: for each of them by its place; changes that one alone, and reads what the caller
                made.
        """

    def fork_in_order(self, students: Sequence[Network], work: Callable[[int], T]) -> list[T]:
        """As ``fork``, for work that may draw from the global random generators."""
        return self.fork(students, work)

    def run(self, step: Step, lesson: Lesson, cohort: Cohort) -> StepResult:
        """Run one whole step of a cohort, which forks through this executor."""
        return step(lesson, self)

    def __str__(self) -> str:
        return self.name


class Sequential(Executor):
    """One student after the other, each with all intra-op threads: the reference."""

    name = "sequential"

    def fork(self, students: Sequence[Network], work: Callable[[int], T]) -> list[T]:
        """Run all in order, in this thread."""
        return [work(k) for k in range(len(students))]
