"""Accuracy of each student and of their ensemble."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dml_fast.data.loaders.assemble import Batch, input_of
from dml_fast.distributed.world import World
from dml_fast.engine.precision import Precision


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers over a set of images.

    Attributes:
        students: that of each student, in 0..1.
        ensemble: that of the class with the highest mean of the students' probabilities.
        images: how many were counted.
    """

    students: tuple[float, ...]
    ensemble: float
    images: int


@contextmanager
def evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    """Put models in evaluation mode while inside; afterwards each is in its earlier mode."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


@torch.inference_mode()
def evaluate(
    models: Sequence[nn.Module],
    batches: Iterable[Batch],
    precision: Precision,
    world: World | None = None,
) -> Accuracy:
    """Classify a set with each student and with all together; modes are restored afterwards.

    Args:
        models: K networks, ``forward(inputs (N, ...)) -> logits (N, C)``; each of several
            processes gives those that it holds.
        batches: every image once, with one input for all these models or one for each; each column
            of processes gives its share.
        precision: as in training.
        world: the processes; by default there is one.
    """
    world = world or World.alone(len(models))
    right = torch.zeros(world.total + 2, dtype=torch.int64, device=precision.device)
    with evaluating(models):
        for batch in batches:
            with precision.autocast():
                logits = [m(input_of(batch.inputs, place)) for place, m in enumerate(models)]
            right[:-1] += _right(world.all_students([z.float() for z in logits]), batch.target)
            right[-1] += len(batch.target)
    *counts, images = world.sum_over_data(right).tolist()
    *students, ensemble = (count / max(images, 1) for count in counts)
    return Accuracy(tuple(students), ensemble, images)


def _right(logits: list[Tensor], target: Tensor) -> Tensor:
    """Count the right answers of each student, then of the ensemble: (K + 1,)."""
    mean = torch.stack([z.softmax(1) for z in logits]).mean(0)  # (N, C)
    return torch.stack([(scores.argmax(1) == target).sum() for scores in [*logits, mean]])
