"""Totals over an epoch, kept on the device and read only when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dml_fast.distributed.world import World
from dml_fast.engine import StepResult


@dataclass(frozen=True)
class StudentSums:
    """What one student did since the epoch began.

    Attributes:
        loss, ce, kl, extra: means over the images of good steps; None before the first.
        accuracy: share of the labelled ones of these images whose label was predicted, or None.
        kept: share of the labelled ones that small-loss selection let teach, or None.
        skipped: steps whose update was skipped.
        in_a_row: how many steps were skipped since the last good one.
    """

    loss: float | None
    ce: float | None
    kl: float | None
    extra: float | None
    accuracy: float | None
    kept: float | None
    skipped: int
    in_a_row: int


class Totals(NamedTuple):
    """What is added up for each of K students, (K,) each, in the order that checkpoints have.

    Attributes:
        loss, ce, kl, extra: sums over the images of good steps.
        correct: the number of these images whose label was predicted.
        images: their number.
        labelled: how many of them have a label.
        kept: how many of those were not left out by small-loss selection.
        skipped, in_a_row: as in `StudentSums`. They are the same in every column of the mesh; all
            other totals must be added up over the columns.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    correct: Tensor
    images: Tensor
    skipped: Tensor
    in_a_row: Tensor
    extra: Tensor
    labelled: Tensor
    kept: Tensor


class Meter:
    """Collects step results of students without waiting for the device.

    Args:
        cohort: students of this process.
        device: where the results are.
        world: the processes that hold all students; by default this one alone.
    """

    def __init__(self, cohort: int, device: torch.device, world: World | None = None) -> None:
        self._world = world or World.alone(cohort)
        zeros = torch.zeros(len(Totals._fields), cohort, dtype=torch.float64, device=device)
        self.totals = Totals(*zeros)

    def add(self, result: StepResult, images: int, learners: Sequence[int]) -> None:
        """Add one step of A learners, which are next to one another.

        Args:
            result: of the A learners.
            images: how many were in the batch.
            learners: their places among this process's students.
        """
        if not learners:
            return
        rows = slice(learners[0], learners[-1] + 1)  # a list would be copied to the device
        totals = Totals(*(total[rows] for total in self.totals))
        means = torch.stack([result.losses, result.ce, result.kl, result.extra]).double()
        good = ~result.skipped & means.isfinite().all(0)
        sums = torch.where(good, means * images, 0.0)
        for total, new in zip((totals.loss, totals.ce, totals.kl, totals.extra), sums, strict=True):
            total += new
        for total, count in (
            (totals.correct, result.correct),
            (totals.labelled, result.labelled),
            (totals.kept, result.kept),
        ):
            total += torch.where(good, count, 0)
        totals.images.add_(good * images)
        totals.skipped.add_(result.skipped)
        totals.in_a_row.add_(1).mul_(result.skipped)

    def read(self) -> list[StudentSums]:
        """Return what each of K students did, over whole batches; this waits for the device."""
        whole = _over_columns(self.state())

        def means(total: Tensor, over: Tensor) -> list[float | None]:
            pairs = zip(total.tolist(), over.tolist(), strict=True)
            return [x / n if n else None for x, n in pairs]

        columns = (
            *(means(x, whole.images) for x in (whole.loss, whole.ce, whole.kl, whole.extra)),
            *(means(x, whole.labelled) for x in (whole.correct, whole.kept)),
            whole.skipped.long().tolist(),
            whole.in_a_row.long().tolist(),
        )
        return [StudentSums(*values) for values in zip(*columns, strict=True)]

    def state(self) -> Tensor:
        """Return the totals of all students in each column: (DATA, K, 10) on the CPU."""
        return self._world.gather_students(torch.stack(self.totals, -1))

    def load(self, state: Tensor) -> None:
        """Put back what ``state`` gave, perhaps to another number of columns."""
        world = self._world
        if state.shape[-1] < len(Totals._fields):  # of before, when every image had a label
            images = state[..., Totals._fields.index("images"), None]
            state = torch.cat([state, images, images], -1)
        if len(state) == world.mesh.data:
            saved = Totals(*state[world.column].unbind(-1))
        else:
            saved = _over_columns(state)
            if world.column > 0:  # the first column continues with the sums
                zeros = Totals(*map(torch.zeros_like, saved))
                saved = zeros._replace(skipped=saved.skipped, in_a_row=saved.in_a_row)
        for total, value in zip(self.totals, saved, strict=True):
            total.copy_(value[list(world.students)])

    def start_epoch(self) -> None:
        """Forget all totals but the skips in a row, which may span epochs."""
        for name, total in self.totals._asdict().items():
            if name != "in_a_row":
                total.zero_()


def _over_columns(state: Tensor) -> Totals:
    """Add up the columns' parts of each batch, (DATA, K, 10)."""
    first = Totals(*state[0].unbind(-1))
    whole = Totals(*state.sum(0).unbind(-1))
    return whole._replace(skipped=first.skipped, in_a_row=first.in_a_row)
