"""The resident loader: all images as uint8 on the device, batches made there, no state.

What batch (epoch, step) holds is in the plan, so training resumes in mid-epoch by asking for the
next batch, and nothing about the loader needs saving.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from dml_fast.data.loaders.assemble import Assembler, TrainBatch
from dml_fast.data.plan import Plan


class ResidentLoader:
    """Training batches of images that live on the device.

    No global generator is read or changed.

    Args:
        images: (N, C, H, W) uint8.
        plan: of the batches.
        assemble: makes them.
    """

    def __init__(self, images: npt.NDArray[np.uint8], plan: Plan, assemble: Assembler) -> None:
        self.steps_per_epoch = plan.steps_per_epoch
        self._plan, self._assemble = plan, assemble
        # (N, H, W, C), so that a pixel's channels lie together for the gather
        there = torch.as_tensor(images).to(assemble.device)
        self._images = [there.permute(0, 2, 3, 1).contiguous()]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[TrainBatch]:
        """Yields the batches of ``epoch`` from ``start_step`` on."""
        for step in range(start_step, self.steps_per_epoch):
            plan = self._plan(epoch, step)
            yield self._assemble(plan, self._images, plan.ids)

    def close(self) -> None:
        """Frees the images."""
        self._images = []
