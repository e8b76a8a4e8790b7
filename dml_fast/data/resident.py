"""The resident loader: all images as uint8 on the device, batches made there, no state.

What batch (epoch, step) holds is a pure function of (seed, epoch, step), so training resumes in
mid-epoch by asking for the next batch, and nothing about the loader needs saving.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dml_fast.data.augment import Normalizer, crop_flip_normalize, draw_crops
from dml_fast.data.sets import ImageSet
from dml_fast.errors import UserError
from dml_fast.rng import numpy_generator


class Batch(NamedTuple):
    """A batch of B images on the device.

    Attributes:
        inputs: (B, C, H, W) float32, normalised.
        target: (B,) int64 labels.
        ids: (B,) int64, each image's index in its `ImageSet`.
    """

    inputs: Tensor
    target: Tensor
    ids: Tensor


class ResidentLoader:
    """Shuffled, augmented training batches of images that live on the device.

    Every epoch is another permutation of the images, cut into whole batches; the N mod B images
    at its end are left out of that epoch. No global generator is read or changed.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        batch_size: B, 1..N.
        seed: the run's seed; order and augmentation follow from it.
        mean: C floats in units of 0..1.
        std: C floats in units of 0..1.
        pad: largest shift of a random crop in pixels; 0 for none. What is shifted in is 0 after
            normalisation, the mean colour.
        flip: whether half of the images are mirrored.
        device: where images are kept and batches are made.
        channels_last: the memory format of ``inputs``.

    Raises:
        UserError: ``batch_size`` is not in 1..N.
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64],
        *,
        batch_size: int,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        pad: int,
        flip: bool,
        device: torch.device | str,
        channels_last: bool = True,
    ) -> None:
        if not 1 <= batch_size <= len(images):
            raise UserError(
                f"batch size {batch_size} does not fit {len(images)} training images: "
                f"choose a --batch-size from 1 to {len(images)}"
            )
        self.steps_per_epoch = len(images) // batch_size
        self._batch_size = batch_size
        self._seed = seed
        self._pad = pad
        self._flip = flip
        self._device = torch.device(device)
        self._channels_last = channels_last
        # (N, H, W, C), so that a pixel's channels lie together for the gather
        self._images = torch.as_tensor(images).to(self._device).permute(0, 2, 3, 1).contiguous()
        self._labels = torch.as_tensor(labels).to(self._device)
        self._normalize = Normalizer(mean, std, self._device)
        self._order_cache: tuple[int, npt.NDArray[np.int64]] | None = None

    def batch(self, epoch: int, step: int) -> Batch:
        """Returns batch ``step`` (0..steps_per_epoch-1) of ``epoch``.

        Raises:
            IndexError: the epoch has no such step.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} is outside 0..{self.steps_per_epoch - 1}")
        ids = self._order(epoch)[step * self._batch_size : (step + 1) * self._batch_size]
        rng = numpy_generator(self._seed, "augment", epoch, step)
        crops = draw_crops(len(ids), pad=self._pad, flip=self._flip, rng=rng)
        plan = torch.from_numpy(np.concatenate([ids[None], crops]))  # (4, B): one small copy
        if self._device.type == "cuda":
            plan = plan.pin_memory()
        plan = plan.to(self._device, non_blocking=True)
        inputs = crop_flip_normalize(
            self._images, plan[0], plan[1:], pad=self._pad, normalize=self._normalize
        )
        target = self._labels.index_select(0, plan[0])
        return Batch(_to_nchw(inputs, self._channels_last), target, plan[0])

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yields the batches of ``epoch`` from ``start_step`` on."""
        for step in range(start_step, self.steps_per_epoch):
            yield self.batch(epoch, step)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        # kept only to save time: it can be computed again from the key at any moment
        if self._order_cache is None or self._order_cache[0] != epoch:
            rng = numpy_generator(self._seed, "order", epoch)
            self._order_cache = (epoch, rng.permutation(len(self._images)))
        return self._order_cache[1]


def evaluation_batches(
    image_set: ImageSet,
    *,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    channels_last: bool = True,
) -> Iterator[Batch]:
    """Yields every image once, in order, normalised and never augmented.

    The last batch is short if N is not a multiple of ``batch_size``.

    Args:
        image_set: N images.
        batch_size: B, at least 1; it may exceed N.
        mean: C floats in units of 0..1.
        std: C floats in units of 0..1.
        device: where batches are made.
        channels_last: the memory format of ``inputs``.
    """
    normalize = Normalizer(mean, std, device)
    for start in range(0, len(image_set), batch_size):
        images = torch.as_tensor(image_set.images[start : start + batch_size]).to(device)
        inputs = normalize(images.permute(0, 2, 3, 1).contiguous())
        target = torch.as_tensor(image_set.labels[start : start + batch_size]).to(device)
        ids = torch.arange(start, start + len(target), device=device)
        yield Batch(_to_nchw(inputs, channels_last), target, ids)


def _to_nchw(inputs: Tensor, channels_last: bool) -> Tensor:
    inputs = inputs.permute(0, 3, 1, 2)
    return inputs if channels_last else inputs.contiguous()
