"""Sums over an epoch, kept on the device and read only when somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dml_fast.distributed.world import World
from dml_fast.engine.step import StepResult


@dataclass(frozen=True)
class StudentSums:
    """What one student did since the epoch began.

    Attributes:
        loss, ce, kl, triplet: means over the images of good steps; None before the first.
        accuracy: share of these images whose label was predicted; None before the first.
        skipped: steps whose update was skipped.
        in_a_row: how many of the last steps were skipped, without a good one between.
    """

    loss: float | None
    ce: float | None
    kl: float | None
    triplet: float | None
    accuracy: float | None
    skipped: int
    in_a_row: int


class Meter:
    """Collects step results of students without waiting for the device.

    Args:
        cohort: students of this process.
        device: where the results are.
        world: in which others have the other students; by default there is one process.
    """

    def __init__(self, cohort: int, device: torch.device, world: World | None = None) -> None:
        self._world = world or World.alone(cohort)
        # (cohort, 8): loss, ce, kl, correct, images, skipped, skipped in a row, triplet
        self.sums = torch.zeros(cohort, 8, dtype=torch.float64, device=device)

    def add(self, result: StepResult, images: int, learners: Sequence[int]) -> None:
        """Add one step on ``images`` images of A learners, which are next to one another.

        Args:
            result: of the A learners.
            images: N.
            learners: their places among this process's students.
        """
        if not learners:
            return
        rows = slice(learners[0], learners[-1] + 1)  # a list would be copied to the device
        means = torch.stack([result.losses, result.ce, result.kl]).double()  # (3, A)
        good = ~result.skipped & torch.isfinite(means).all(0)
        new = torch.cat(
            [means * images, result.correct.double()[None], torch.full_like(means[:1], images)]
        )
        self.sums[rows, :5] += torch.where(good, new, 0.0).T
        self.sums[rows, 7] += torch.where(good, result.triplet.double() * images, 0.0)
        self.sums[rows, 5] += result.skipped.double()
        self.sums[rows, 6] = (self.sums[rows, 6] + 1) * result.skipped.double()

    def read(self) -> list[StudentSums]:
        """What all K students did so far, over all of a batch; this waits for the device."""
        students = []
        for *sums, images, skipped, in_a_row, triplet in _over_columns(self.state()).tolist():
            loss, ce, kl, accuracy, triplet = (
                x / images if images else None for x in (*sums, triplet)
            )
            counts = int(skipped), int(in_a_row)
            students.append(StudentSums(loss, ce, kl, triplet, accuracy, *counts))
        return students

    def state(self) -> Tensor:
        """The sums of all students over each column's images: (DATA, K, 8) on the CPU."""
        return self._world.gather_students(self.sums)

    def load(self, state: Tensor) -> None:
        """Put back what ``state`` gave, perhaps to another number of columns."""
        world = self._world
        if len(state) != world.mesh.data:
            whole = _over_columns(state)
            state = whole.new_zeros((world.mesh.data, *whole.shape))
            state[0] = whole
            state[:, :, _DECISIONS] = whole[:, _DECISIONS]
        self.sums.copy_(state[world.column, list(world.students)])

    def start_epoch(self) -> None:
        """Forget all sums but the skips in a row, which may span epochs."""
        self.sums[:, :6] = 0
        self.sums[:, 7] = 0


_DECISIONS = slice(5, 7)  # columns that are the same for all of a batch: skips


def _over_columns(state: Tensor) -> Tensor:
    """(K, 8) of a whole batch from its parts (DATA, K, 8)."""
    whole = state.sum(0)
    whole[:, _DECISIONS] = state[0, :, _DECISIONS]
    return whole
