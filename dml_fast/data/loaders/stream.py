"""The streaming loader: images are decoded when the plan asks for them, by DALI or by threads."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch

from dml_fast.data.files import ImageFiles
from dml_fast.data.loaders.assemble import Assembler, TrainBatch
from dml_fast.data.loaders.decoder import Decoded, Decoder, Request, Source
from dml_fast.data.plan import Plan
from dml_fast.data.storage import Ids


def open_decoder(
    images: ImageFiles,
    labels: Ids | None,
    *,
    device: torch.device,
    batch_size: int,
    parts: int = 0,
) -> Decoder:
    """Start the decoder that ``images.loader`` names.

    Args:
        images: the files.
        labels: see `Source`.
        device: the device of the decoded pixels.
        batch_size: the most images that a request may have.
        parts: how many parts of each image requests ask for, 0 for whole images.

    Raises:
        UserError: DALI is not installed, or the device is not available.
    """
    source = Source(images, labels)
    if images.loader == "dali":
        from dml_fast.data.loaders.dali import DaliDecoder

        return DaliDecoder(source, device=device, batch_size=batch_size, parts=parts)
    from dml_fast.data.loaders.threads import ThreadDecoder

    return ThreadDecoder(source, device=device)


class StreamLoader:
    """Training batches of images that are decoded when they are needed.

    Args:
        images: the files.
        labels: (N,) int64, see `Source`.
        plan: the plan of the batches.
        assemble: makes batches of decoded pixels.
        batch_size: B, the images in a batch.
    """

    def __init__(
        self,
        images: ImageFiles,
        labels: Ids,
        plan: Plan,
        assemble: Assembler,
        batch_size: int,
    ) -> None:
        self.steps_per_epoch = plan.steps_per_epoch
        self._plan, self._assemble = plan, assemble
        self._corrupt = images.corrupt
        self._decoder = open_decoder(
            images,
            labels,
            device=assemble.device,
            batch_size=batch_size,
            parts=plan.views if plan.augmentation.resized else 0,
        )

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[TrainBatch]:
        """Yield the batches of ``epoch`` from ``start_step`` (0..steps_per_epoch) on."""
        plans = (self._plan(epoch, step) for step in range(start_step, self.steps_per_epoch))
        with closing(self._decoder.run(Request(plan.ids, plan) for plan in plans)) as decoded:
            for found in decoded:
                yield self._made(found)
        self._corrupt.report()

    def close(self) -> None:
        """End the decoder's threads."""
        self._decoder.close()

    def _made(self, found: Decoded) -> TrainBatch:
        assert found.request.plan is not None
        plan = replace(found.request.plan, ids=found.ids)
        return self._assemble(plan, found.images, np.arange(len(found.ids)))
