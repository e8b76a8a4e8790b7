"""Students side by side on a CPU, on threads that share its intra-op threads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

from dml_fast.engine.executor import Executor, Network
from dml_fast.errors import check_whole
from dml_fast.rng import cpu_position

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Threads(Executor):
    """Students side by side on a CPU: persistent workers that share the intra-op threads.

    Students whose forward passes draw random numbers (dropout) run one after the other, in order,
    so that they draw what they draw with `Sequential`. The first pass of each student shows
    whether it does.

    Args:
        cohort: how many students this process has: more workers would be idle.
        workers: how many students run at a time; by default as many as there are intra-op threads.
        threads_each: intra-op threads of each worker; by default an equal share.

    Raises:
        UserError: a number is below 1.
    """

    name = "threads"

    def __init__(
        self, cohort: int, workers: int | None = None, threads_each: int | None = None
    ) -> None:
        for what, count in (
            ("cohort", cohort),
            ("workers", 1 if workers is None else workers),
            ("threads_each", 1 if threads_each is None else threads_each),
        ):
            check_whole(what, count, 1)
        total = torch.get_num_threads()
        self.workers = workers or min(cohort, total)
        self.threads_each = threads_each or max(1, total // self.workers)
        self._draws: dict[Network, bool] = {}
        self._seen: set[Network] = set()
        self._pool = ThreadPoolExecutor(
            self.workers,
            thread_name_prefix="dml_fast",
            initializer=torch.set_num_threads,
            initargs=(self.threads_each,),
        )

    def fork(self, students: Sequence[Network], work: Callable[[int], T]) -> list[T]:
        """Give each student to a free worker as one task; new students are one task together.

        A student's first backward pass may compile, which only one thread at a time can do.
        """
        numbers = range(len(students))
        known = self._seen.issuperset(students)
        self._seen.update(students)
        return self._side_by_side([[k] for k in numbers] if known else [[*numbers]], work)

    def fork_in_order(self, students: Sequence[Network], work: Callable[[int], T]) -> list[T]:
        """As ``fork``, but students that draw random numbers are one task together."""
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
                "a student drew random numbers in its forward pass, but not in its first: this "
                "step is not repeatable; from now on forward passes run one after the other"
            )
            self._draws.update(dict.fromkeys(students, True))
        return found

    def _side_by_side(self, lanes: Sequence[Sequence[int]], work: Callable[[int], T]) -> list[T]:
        """Run lanes side by side, and what is in one lane in order; return results by number."""
        count = sum(map(len, lanes))
        if count == 1:  # alone it may have all threads
            return [work(0)]
        results: dict[int, T] = {}

        def run(lane: Sequence[int]) -> None:
            for k in lane:
                results[k] = work(k)

        # Autograd resets a thread's number of intra-op threads to what the process set last. With
        # more threads than cores, oneDNN's barriers spin: steps took 8 times as long.
        with intra_op_threads(self.threads_each):
            tasks = [self._pool.submit(run, lane) for lane in lanes]
            wait(tasks)
        for task in tasks:
            task.result()  # raises what the task raised, now that all tasks are over
        return [results[k] for k in range(count)]

    def __str__(self) -> str:
        return f"{self.name} ({self.workers} x {self.threads_each})"


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Inside, operators of this thread, and of threads that start, use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
