"""The resident loader: all images are on the device as uint8, and batches are made there.

The plan says what is in batch (epoch, step). So the loader has no state to save, and training
resumes in the middle of an epoch by asking for the next batch.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import numpy.typing as npt
import torch

from dml_fast.data.loaders.assemble import Assembler, TrainBatch
from dml_fast.data.plan import Plan


class ResidentLoader:
    """Training batches of images that are on the device.

    No global random generator is read or changed.

    Args:
        images: (N, C, H, W) uint8.
        plan: the plan of the batches.
        assemble: makes the batches.
    """

    def __init__(self, images: npt.NDArray[np.uint8], plan: Plan, assemble: Assembler) -> None:
        self.steps_per_epoch = plan.steps_per_epoch
        self._plan, self._assemble = plan, assemble
        # (N, H, W, C): the gather is faster with the channels of a pixel next to each other
        there = torch.as_tensor(images).to(assemble.device)
        self._images = [there.permute(0, 2, 3, 1).contiguous()]

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[TrainBatch]:
        """Yield the batches of ``epoch`` from ``start_step`` (0..steps_per_epoch) on."""
        for step in range(start_step, self.steps_per_epoch):
            plan = self._plan(epoch, step)
            yield self._assemble(plan, self._images, plan.ids)

    def close(self) -> None:
        """Free the images."""
        self._images = []
