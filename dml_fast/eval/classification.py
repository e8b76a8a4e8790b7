"""Accuracy, macro-F1 and recall of each student and of their ensemble."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dml_fast.data.loaders.assemble import UNLABELLED_TARGET, Batch, input_of
from dml_fast.distributed.world import World
from dml_fast.engine.precision import Precision


@dataclass(frozen=True)
class ClassScores:
    """How well one student, or the ensemble, predicts classes.

    Attributes:
        accuracy: the share of right answers, in 0..1.
        f1: macro-F1, in 0..1: the mean of 2 P R / (P + R) over the classes that occur among labels
            or predictions, as in scikit-learn's ``f1_score(average="macro")``.
        recall: of each of C classes, the share of its rows that were found; None without any.
    """

    accuracy: float
    f1: float
    recall: tuple[float | None, ...]

    @classmethod
    def of(cls, right: list[int], predicted: list[int], labelled: list[int]) -> ClassScores:
        """Return the scores of what was counted for each of C classes.

        Args:
            right: rows of the class that were predicted to be so.
            predicted: rows that were predicted to be of the class.
            labelled: rows of the class.
        """
        counts = list(zip(right, predicted, labelled, strict=True))
        f1 = [2 * hits / (said + there) for hits, said, there in counts if said + there]
        return cls(
            accuracy=sum(right) / max(sum(labelled), 1),
            f1=sum(f1) / max(len(f1), 1),
            recall=tuple(hits / there if there else None for hits, _, there in counts),
        )


@dataclass(frozen=True)
class Classified:
    """What was found on a set of rows.

    Attributes:
        students: the scores of each student.
        ensemble: those of the class with the highest mean of the students' probabilities.
        images: how many rows were counted: those that have a label.
    """

    students: tuple[ClassScores, ...]
    ensemble: ClassScores
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
    classes: int,
    world: World | None = None,
) -> Classified:
    """Classify a set with each student and with all together; modes are restored afterwards.

    Args:
        models: K networks, ``forward(inputs (N, ...)) -> logits (N, C)``; each of several
            processes gives those that it holds.
        batches: every row once, with one input for all these models or one for each; each column
            of processes gives its share. Rows without a label are left out.
        precision: as in training.
        classes: C.
        world: the processes; by default there is one.
    """
    world = world or World.alone(len(models))
    answers = world.total + 1  # of each student, then of the ensemble
    counts = torch.zeros(2 * answers + 1, classes, dtype=torch.int64, device=precision.device)
    right, predicted, labelled = counts[:answers], counts[answers:-1], counts[-1]
    with evaluating(models):
        for batch in batches:
            with precision.autocast():
                logits = [m(input_of(batch.inputs, place)) for place, m in enumerate(models)]
            found = _answers(world.all_students([z.float() for z in logits]))
            known = (batch.target != UNLABELLED_TARGET).long()
            target = batch.target * known
            labelled.scatter_add_(0, target, known)
            predicted.scatter_add_(1, found, known.expand_as(found))
            hits = (found == target) * known
            right.scatter_add_(1, target.expand_as(found), hits)
    counts = world.sum_over_data(counts)
    *rows, there = counts.tolist()
    *students, ensemble = (
        ClassScores.of(hits, said, there)
        for hits, said in zip(rows[:answers], rows[answers:], strict=True)
    )
    return Classified(tuple(students), ensemble, sum(there))


def _answers(logits: list[Tensor]) -> Tensor:
    """Return the classes that each student, and the ensemble, predicts: (K + 1, N)."""
    mean = torch.stack([z.softmax(1) for z in logits]).mean(0)  # (N, C)
    return torch.stack([scores.argmax(1) for scores in [*logits, mean]])
