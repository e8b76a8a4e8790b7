"""Warnings of a run whose codes learn nothing from MIHash; only the end of an epoch waits."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from dml_fast.distributed.world import World
from dml_fast.loss.mihash import has_anchors
from dml_fast.training.meter import StudentSums

logger = logging.getLogger(__name__)

STEPS = 100
"""After so many the codes say something, unless they have collapsed."""
NOTHING = 0.01
"""Bits; codes drawn at random have 0.003 with 128 rows of 10 classes, 0.009 with 32."""


class HashWatch:
    """Counts batches that give MIHash nothing to compare, and looks at the mean information.

    Args:
        device: where the batches are.
        world: the processes that train together.
    """

    def __init__(self, device: torch.device, world: World) -> None:
        self._world = world
        self._lacking = torch.zeros((), dtype=torch.int64, device=device)
        self._batches = 0
        self._said = False

    def add(self, target: Tensor) -> None:
        """Count a batch, (N,) classes."""
        self._lacking += ~has_anchors(target)
        self._batches += 1

    def look(self, step: int, sums: Sequence[StudentSums]) -> None:
        """Warn once if a student's codes say nothing of the class.

        Args:
            step: of the run, from 1.
            sums: of each student, since the epoch began.
        """
        if self._said or step < STEPS:
            return
        found = {k: -one.extra for k, one in enumerate(sums) if one.extra is not None}
        low = {k: bits for k, bits in found.items() if bits < NOTHING}
        if low:
            self._said = True
            each = ", ".join(f"{bits:.2g} bits (student {k})" for k, bits in low.items())
            logger.warning(
                "codes have collapsed: by step %d their distances say almost nothing of the class, "
                "with a mean information this epoch of %s: lower --lr, or give a larger "
                "--batch-size",
                step,
                each,
            )

    def end_epoch(self, epoch: int) -> None:
        """Warn of the batches without anchors since the last call; all ranks must call this."""
        lacking = int(self._world.sum_over_data(self._lacking))
        batches = self._batches * self._world.mesh.data
        if lacking:
            logger.warning(
                "epoch %d: MIHash learned nothing from %d of %d batches, which had no two rows of "
                "one class beside a row of another: give a larger --batch-size",
                epoch,
                lacking,
                batches,
            )
        self._lacking.zero_()
        self._batches = 0
