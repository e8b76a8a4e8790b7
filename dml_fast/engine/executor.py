"""How the students of a cohort are run: one after the other, or side by side on a CPU's threads.

The engine's step forks twice and joins twice (`dml_fast.engine`); an executor decides who runs
what where between a fork and its join. All give the numbers of `Sequential`: on a CPU bit for bit,
given one number of intra-op threads a student, on which the sums in convolutions depend.
Those for CUDA are in `dml_fast.engine.streams` and `dml_fast.engine.graph`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch

from dml_fast.engine.cohort import Cohort
from dml_fast.engine.student import Student
from dml_fast.rng import cpu_position

if TYPE_CHECKING:
    from dml_fast.engine.step import Lesson, StepResult

logger = logging.getLogger(__name__)

T = TypeVar("T")
Step: TypeAlias = "Callable[[Lesson, Executor], StepResult]"


class Executor(ABC):
    """The contract. ``fork`` is all that one must define.

    Attributes:
        name: as ``--executor`` knows it.
    """

    name: str

    @abstractmethod
    def fork(self, students: Sequence[Student], work: Callable[[int], T]) -> list[T]:
        """Run ``work(k)`` for each student and join: what they gave, in order.

        Args:
            students: those who work, A of them.
            work: for k in 0..A-1; touches student k alone, and reads what the caller made.
        """

    def fork_in_order(self, students: Sequence[Student], work: Callable[[int], T]) -> list[T]:
        """``fork``, for work that may draw from the global random generators."""
        return self.fork(students, work)

    def run(self, step: Step, lesson: Lesson, cohort: Cohort) -> StepResult:
        """One whole step of a cohort, which forks through this executor."""
        return step(lesson, self)

    def __str__(self) -> str:
        return self.name


class Sequential(Executor):
    """One student after the other, each with all intra-op threads: the reference."""

    name = "sequential"

    def fork(self, students: Sequence[Student], work: Callable[[int], T]) -> list[T]:
        """In order, here."""
        return [work(k) for k in range(len(students))]


class Threads(Executor):
    """Students side by side on a CPU: persistent workers that share the intra-op threads.

    A student whose forward pass draws random numbers (dropout) takes turns with the others that
    do, in order, so that the draws are those of `Sequential`; the first pass of each finds out.

    Args:
        cohort: K, more workers than that would idle.
        workers: how many students at a time; by default as many as there are intra-op threads.
        threads_each: intra-op threads of each worker; by default an equal share.
    """

    name = "threads"

    def __init__(
        self, cohort: int, workers: int | None = None, threads_each: int | None = None
    ) -> None:
        total = torch.get_num_threads()
        self.workers = workers or min(cohort, total)
        self.threads_each = threads_each or max(1, total // self.workers)
        self._draws: dict[Student, bool] = {}
        self._seen: set[Student] = set()
        self._pool = ThreadPoolExecutor(
            self.workers,
            thread_name_prefix="dml_fast",
            initializer=torch.set_num_threads,
            initargs=(self.threads_each,),
        )

    def fork(self, students: Sequence[Student], work: Callable[[int], T]) -> list[T]:
        """Each student is a task for whichever worker is free; first times are one task.

        Compiling is for one thread at a time, and happens at a student's first pass back.
        """
        numbers = range(len(students))
        known = self._seen.issuperset(students)
        self._seen.update(students)
        return self._side_by_side([[k] for k in numbers] if known else [[*numbers]], work)

    def fork_in_order(self, students: Sequence[Student], work: Callable[[int], T]) -> list[T]:
        """As ``fork``, but students that draw random numbers are one task."""
        known = [self._draws.get(student) for student in students]
        in_turn = [k for k, draws in enumerate(known) if draws is not False]
        lanes = [[k] for k, draws in enumerate(known) if draws is False]

        def watched(k: int) -> T:
            if known[k] is not None:
                return work(k)
            before = cpu_position()
            result = work(k)
            self._draws[students[k]] = cpu_position() != before
            return result

        if in_turn:
            found = self._side_by_side([in_turn, *lanes], watched)
            if None in known and sum(self._draws[s] for s in students) > 1:
                logger.info(
                    "students draw random numbers in their forward passes (dropout): these run "
                    "one after the other, everything else side by side"
                )
            return found
        before = cpu_position()
        found = self._side_by_side(lanes, watched)
        if cpu_position() != before:
            logger.warning(
                "a student drew random numbers in its forward pass and had not in its first: this "
                "step is not repeatable; from now on forward passes run one after the other"
            )
            self._draws.update(dict.fromkeys(students, True))
        return found

    def _side_by_side(self, lanes: Sequence[Sequence[int]], work: Callable[[int], T]) -> list[T]:
        """Lanes run side by side, what is in one lane in order; results by number."""
        count = sum(map(len, lanes))
        if count == 1:  # alone it may have all threads
            return [work(0)]
        results: dict[int, T] = {}

        def run(lane: Sequence[int]) -> None:
            for k in lane:
                results[k] = work(k)

        # Autograd sets a thread's intra-op threads anew, to what was last set in the process. With
        # more of them than cores oneDNN's barriers spin: steps took 8 times as long.
        with intra_op_threads(self.threads_each):
            tasks = [self._pool.submit(run, lane) for lane in lanes]
            wait(tasks)
        for task in tasks:
            task.result()  # raises what the task raised, now that nobody runs any more
        return [results[k] for k in range(count)]

    def __str__(self) -> str:
        return f"{self.name} ({self.workers} x {self.threads_each})"


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """While inside, operators of this thread, and of threads that start, use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
