"""Batches of vectors: all rows are on the device, and a batch is one gather in each view.

Nothing is drawn here: a batch is a function of the order's (seed, epoch, step). So the loader has
no state to save, and training resumes in the middle of an epoch by asking for the next batch.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from dml_fast.data.loaders.assemble import Batch, TrainBatch, as_targets
from dml_fast.data.sampling import Ids, Order, sequential, share_of, steps_from
from dml_fast.data.vectors import VectorSet


class VectorLoader:
    """Training batches of vectors that are on the device.

    No global random generator is read or changed.

    Args:
        rows: N rows in V views.
        order: the batches of all ranks together.
        device: where batches are made.
        students: K; with several views, inputs are K tensors, student k's of view ``k % V``.
        rank: the rank of this process, 0..ranks-1; it takes that share of each batch.
        ranks: R, a divisor of the batch size of ``order``.
    """

    def __init__(
        self,
        rows: VectorSet,
        order: Order,
        *,
        device: torch.device | str,
        students: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.steps_per_epoch = order.steps
        self._order, self._rank, self._ranks = order, rank, ranks
        self._device = torch.device(device)
        self._views = [torch.as_tensor(view).to(self._device) for view in rows.views]
        self._targets = as_targets(rows.labels, self._device)
        self._students = range(students)

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[TrainBatch]:
        """Yield the batches of ``epoch`` from ``start_step`` (0..steps_per_epoch) on."""
        steps = steps_from(start_step, self.steps_per_epoch)
        batches = self._order(epoch)
        mine = share_of(batches.shape[1], self._rank, self._ranks)
        for step in steps:
            ids = _send(batches[step, mine], self._device)
            seen = [view.index_select(0, ids) for view in self._views]
            target = self._targets.index_select(0, ids)
            yield TrainBatch(_of_students(seen, self._students), target, ids)

    def close(self) -> None:
        """Free the rows."""
        self._views = []


def vector_batches(
    rows: VectorSet,
    *,
    batch_size: int,
    device: torch.device,
    students: Sequence[int],
    rank: int,
    ranks: int,
) -> Generator[Batch]:
    """Yield every row once, in order: see `dml_fast.data.loaders.evaluation_batches`."""
    targets = as_targets(rows.labels, torch.device("cpu"))
    for ids in sequential(len(rows), batch_size, rank, ranks):
        part = slice(ids[0], ids[-1] + 1)
        seen = [torch.tensor(view[part], device=device) for view in rows.views]
        yield Batch(_of_students(seen, students), targets[part].to(device), _send(ids, device))


def _of_students(seen: Sequence[Tensor], students: Sequence[int]) -> Tensor | tuple[Tensor, ...]:
    """Return the one view, or that of each student."""
    return seen[0] if len(seen) == 1 else tuple(seen[k % len(seen)] for k in students)


def _send(ids: Ids, device: torch.device) -> Tensor:
    there = torch.from_numpy(ids.copy())
    if device.type == "cuda":
        there = there.pin_memory()
    return there.to(device, non_blocking=True)
