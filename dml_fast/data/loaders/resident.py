"""The resident loader: all images as uint8 on the device, batches made there, no state.

What batch (epoch, step) holds is in the plan, so training resumes in mid-epoch by asking for the
next batch, and nothing about the loader needs saving.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from dml_fast.data.files import ImageFiles
from dml_fast.data.loaders.assemble import Assembler, Batch, TrainBatch, to_nchw
from dml_fast.data.loaders.augment import Normalizer
from dml_fast.data.loaders.stream import Request, open_decoder
from dml_fast.data.plan import Plan
from dml_fast.data.sampling import Ids, sequential
from dml_fast.data.sets import ImageSet, RetrievalSet

__all__ = ["Batch", "ResidentLoader", "evaluation_batches"]


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

    def batch(self, epoch: int, step: int) -> TrainBatch:
        """Returns batch ``step`` (0..steps_per_epoch-1) of ``epoch``.

        Raises:
            IndexError: the epoch has no such step.
        """
        plan = self._plan(epoch, step)
        return self._assemble(plan, self._images, plan.ids)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[TrainBatch]:
        """Yields the batches of ``epoch`` from ``start_step`` on."""
        for step in range(start_step, self.steps_per_epoch):
            yield self.batch(epoch, step)

    def close(self) -> None:
        """Frees the images."""
        self._images = []


def evaluation_batches(
    image_set: ImageSet,
    *,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    channels_last: bool = True,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """Yields every image once, in order, normalised and never augmented.

    The last batch is short if N is not a multiple of ``batch_size``. Where corrupt files are
    skipped they are left out, and in a `RetrievalSet` they come as black images.

    Args:
        image_set: N images.
        batch_size: B, at least 1; it may exceed N.
        mean: C floats in units of 0..1.
        std: C floats in units of 0..1.
        device: where batches are made.
        channels_last: the memory format of ``inputs``.
        rank: of this process, 0..ranks-1: which share of the batches is yielded.
        ranks: R; all of them together see each image once.
    """
    normalize = Normalizer(mean, std, device)
    order = sequential(len(image_set), batch_size, rank, ranks)
    for ids, images in _pixels(image_set, order, batch_size, torch.device(device)):
        inputs = to_nchw(normalize(images), channels_last)
        target = torch.as_tensor(image_set.labels[ids]).to(device)
        yield Batch(inputs, target, torch.from_numpy(ids).to(device))


def _pixels(
    image_set: ImageSet, order: Iterator[Ids], batch_size: int, device: torch.device
) -> Iterator[tuple[Ids, torch.Tensor]]:
    """Indices and pixels (B, H, W, C) uint8 of batch after batch."""
    images = image_set.images
    if not isinstance(images, ImageFiles):
        for ids in order:
            there = torch.as_tensor(images[ids[0] : ids[-1] + 1]).to(device)
            yield ids, there.permute(0, 2, 3, 1).contiguous()
        return
    size = min(batch_size, len(image_set))
    decoder = open_decoder(images, None, device=device, batch_size=size)
    try:
        for found in decoder.run(Request(ids) for ids in order):
            ids, (pixels,) = found.ids, found.images
            if (ids < 0).any():  # corrupt files, which may be skipped
                if isinstance(image_set, RetrievalSet):  # ... but not while others keep their rows
                    ids = found.request.ids
                else:
                    whole = np.flatnonzero(ids >= 0)
                    ids, pixels = ids[whole], pixels[torch.from_numpy(whole).to(device)]
            yield ids, pixels
    finally:
        decoder.close()
        images.corrupt.report()
