"""Make the batch for the students on the device, from uint8 pixels and the plan."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dml_fast import _native
from dml_fast.data.loaders.augment import Normalizer, augment
from dml_fast.data.loaders.mixing import mix_inputs, mix_targets
from dml_fast.data.loaders.policy import Policy
from dml_fast.data.plan import Augmentation, BatchPlan
from dml_fast.loss.problem import UNLABELLED_TARGET
from dml_fast.machine import cores


class Batch(NamedTuple):
    """B images, vectors or pairs on the device, not augmented.

    Attributes:
        inputs: (B, C, H, W) or (B, D) float32, normalised except for pairs; with several views of
            vectors a tuple, one for each student.
        target: (B,) int64 labels, `UNLABELLED_TARGET` for rows without one; (B, classes) float32, 0
            or 1, where rows may have several.
        ids: (B,) int64, each row's index in its set.
    """

    inputs: Tensor | tuple[Tensor, ...]
    target: Tensor
    ids: Tensor


class TrainBatch(NamedTuple):
    """B images, vectors or pairs on the device, images augmented.

    Attributes:
        inputs: (B, C, H, W) or (B, D) float32, normalised; with views a tuple of them, one for each
            student.
        target: (B,) int64 labels, `UNLABELLED_TARGET` for rows without one, or (B, classes) float32
            probabilities of mixed images and of dithered pairs, and 0 or 1 where rows may have
            several labels.
        ids: (B,) int64, each row's index in its set.
    """

    inputs: Tensor | tuple[Tensor, ...]
    target: Tensor
    ids: Tensor


class Loader(Protocol):
    """Training batches as a function of (epoch, step). Only one epoch may be open at a time."""

    steps_per_epoch: int

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[TrainBatch]:
        """Yield the batches of ``epoch`` from ``start_step`` (0..steps_per_epoch) on."""
        ...

    def close(self) -> None:
        """End threads and free memory. The loader cannot be used afterwards."""
        ...


class Assembler:
    """The part of the plan that follows decoding, the same for all loaders.

    Args:
        labels: (N,) int64, or (N, classes).
        num_classes: how many classes there are.
        augmentation: what is done to the images, as in the plan.
        size: height and width of the images, in pixels.
        mean: C floats in units of 0..1.
        std: C floats in units of 0..1.
        device: where batches are made.
        channels_last: whether ``inputs`` are channels-last in memory, otherwise contiguous.
        threads: how many threads make a batch on a CPU; 0 for one per core.
    """

    def __init__(
        self,
        labels: npt.NDArray[np.int64],
        num_classes: int,
        augmentation: Augmentation,
        *,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        channels_last: bool = True,
        threads: int = 0,
    ) -> None:
        self.device = torch.device(device)
        self._labels = as_targets(labels, self.device)
        self._num_classes = num_classes
        self._pad = 0 if augmentation.resized else augmentation.pad
        self._policy = None if augmentation.policy == "none" else Policy(size, self.device)
        self._normalize = Normalizer(mean, std, self.device)
        self._channels_last = channels_last
        self._threads = threads or cores()

    def __call__(
        self, plan: BatchPlan, images: Sequence[Tensor], rows: npt.NDArray[np.int64]
    ) -> TrainBatch:
        """Make a batch.

        Args:
            plan: the plan of B images in V views.
            images: (N, H, W, C) uint8 on the device; one such tensor for all views, or V of them.
            rows: (B,) int64, the indices in ``images`` of the plan's images.
        """
        if self._policy is not None:
            assert plan.policy is not None
            images = [
                self._policy(images[view % len(images)], rows, drawn)
                for view, drawn in enumerate(plan.policy)
            ]
            rows = np.arange(len(rows))
        if self.device.type == "cpu" and plan.jitter is None:
            return self._on_cpu(plan, images, rows)
        erased = [] if plan.erased is None else [plan.erased.reshape(-1, len(rows))]
        whole = np.concatenate(
            [plan.ids[None], rows[None], plan.crops.reshape(-1, len(rows)), *erased]
        )
        numbers = self._send(torch.from_numpy(whole))  # one small copy
        views = len(plan.crops)
        crops = numbers[2 : 2 + 3 * views].view(views, 3, -1)
        rectangles = None if plan.erased is None else numbers[2 + 3 * views :].view(views, 4, -1)
        jitter = None if plan.jitter is None else self._send(torch.from_numpy(plan.jitter.copy()))
        made = [
            augment(
                images[view % len(images)],
                numbers[1],
                crops[view],
                pad=self._pad,
                normalize=self._normalize,
                erased=None if rectangles is None else rectangles[view],
                jitter=None if jitter is None else jitter[view],
            )
            for view in range(views)
        ]
        return self._batch(plan, made, numbers[0])

    def _on_cpu(
        self, plan: BatchPlan, images: Sequence[Tensor], rows: npt.NDArray[np.int64]
    ) -> TrainBatch:
        """Make the same batch, bit for bit, in one C++ loop, which was several times as fast."""
        nothing = np.zeros((4, 0), np.int64)
        made = [
            torch.from_numpy(
                _native.augment(
                    images[view % len(images)].numpy(),
                    np.ascontiguousarray(rows),
                    np.ascontiguousarray(crops),
                    nothing if plan.erased is None else np.ascontiguousarray(plan.erased[view]),
                    self._normalize.scale.numpy(),
                    self._normalize.shift.numpy(),
                    self._pad,
                    self._threads,
                )
            )
            for view, crops in enumerate(plan.crops)
        ]
        return self._batch(plan, made, torch.from_numpy(plan.ids.copy()))

    def _batch(self, plan: BatchPlan, made: Sequence[Tensor], ids: Tensor) -> TrainBatch:
        """Combine V views (B, H, W, C) float32 and their targets."""
        inputs = [to_nchw(images, self._channels_last) for images in made]
        target = self._labels.index_select(0, ids)
        if plan.mix is not None:
            inputs = [mix_inputs(images, plan.mix) for images in inputs]
            target = mix_targets(target, self._num_classes, plan.mix)
        return TrainBatch(inputs[0] if len(inputs) == 1 else tuple(inputs), target, ids)

    def _send(self, values: Tensor) -> Tensor:
        if self.device.type == "cuda":
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)


def to_nchw(inputs: Tensor, channels_last: bool) -> Tensor:
    """Turn (B, H, W, C) into (B, C, H, W), a view of it or, without ``channels_last``, a copy."""
    inputs = inputs.permute(0, 3, 1, 2)
    return inputs if channels_last else inputs.contiguous()


def as_targets(labels: npt.NDArray[np.int64], device: torch.device | str) -> Tensor:
    """Return labels as targets on the device: (N,), -1 for none, as int64; (N, C) as float32."""
    if labels.ndim == 2:
        return torch.from_numpy(labels.astype(np.float32)).to(device)
    return torch.from_numpy(np.where(labels < 0, UNLABELLED_TARGET, labels)).to(device)


def input_of(inputs: Tensor | tuple[Tensor, ...], place: int) -> Tensor:
    """Return the input of the student at a place, 0.. among those that a batch was made for."""
    return inputs[place] if isinstance(inputs, tuple) else inputs
