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

from dml_fast.data.augment import (
    Normalizer,
    crop_flip_normalize,
    draw_crops,
    draw_rectangles,
    erase,
)
from dml_fast.data.sampling import IdentityOrder, Order, ShuffledOrder
from dml_fast.data.sets import ImageSet
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

    Every epoch is another order of the images, cut into whole batches (see
    `dml_fast.data.sampling`). No global generator is read or changed.

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
        erasing: probability that a rectangle of an image is erased.
        num_instances: 0, or K: batches are of K images of each of B / K labels.
        device: where images are kept and batches are made.
        channels_last: the memory format of ``inputs``.

    Raises:
        UserError: ``batch_size`` does not fit the images.
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
        erasing: float = 0.0,
        num_instances: int = 0,
    ) -> None:
        self._order: Order
        if num_instances:
            self._order = IdentityOrder(labels, batch_size, num_instances, seed)
        else:
            self._order = ShuffledOrder(len(images), batch_size, seed)
        self.steps_per_epoch = self._order.steps
        self._erasing = erasing
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
        ids = self._batches(epoch)[step]
        rng = numpy_generator(self._seed, "augment", epoch, step)
        rows = [ids[None], draw_crops(len(ids), pad=self._pad, flip=self._flip, rng=rng)]
        if self._erasing:
            _, height, width, _ = self._images.shape
            rows.append(
                draw_rectangles(
                    len(ids), probability=self._erasing, height=height, width=width, rng=rng
                )
            )
        plan = torch.from_numpy(np.concatenate(rows))  # (4 or 8, B): one small copy
        if self._device.type == "cuda":
            plan = plan.pin_memory()
        plan = plan.to(self._device, non_blocking=True)
        inputs = crop_flip_normalize(
            self._images, plan[0], plan[1:4], pad=self._pad, normalize=self._normalize
        )
        if self._erasing:
            erase(inputs, plan[4:])
        target = self._labels.index_select(0, plan[0])
        return Batch(_to_nchw(inputs, self._channels_last), target, plan[0])

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yields the batches of ``epoch`` from ``start_step`` on."""
        for step in range(start_step, self.steps_per_epoch):
            yield self.batch(epoch, step)

    def _batches(self, epoch: int) -> npt.NDArray[np.int64]:
        # kept only to save time: it can be computed again from the key at any moment
        if self._order_cache is None or self._order_cache[0] != epoch:
            self._order_cache = (epoch, self._order(epoch))
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
