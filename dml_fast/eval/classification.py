"""Accuracy, macro-F1 and recall of each student and of their ensemble."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dml_fast.data.loaders.assemble import Batch, input_of
from dml_fast.distributed.world import World
from dml_fast.engine.precision import Precision
from dml_fast.eval.calibration import Calibration, CalibrationSums
from dml_fast.loss.problem import UNLABELLED_TARGET

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassScores:
    """How well one student, or the ensemble, predicts classes.

    Attributes:
        accuracy: the share of right answers, in 0..1.
        f1: macro-F1, in 0..1: the mean of 2 P R / (P + R) over the classes that occur among labels
            or predictions, as in scikit-learn's ``f1_score(average="macro")``.
        recall: of each of C classes, the share of its rows that were found; None without any.
        calibration: how far its probabilities can be trusted; None where that was not asked for.
    """

    accuracy: float
    f1: float
    recall: tuple[float | None, ...]
    calibration: Calibration | None = None

    @classmethod
    def of(
        cls,
        right: list[int],
        predicted: list[int],
        labelled: list[int],
        calibration: Calibration | None,
    ) -> ClassScores:
        """Return the scores of what was counted for each of C classes.

        Args:
            right: rows of the class that were predicted to be so.
            predicted: rows that were predicted to be of the class.
            labelled: rows of the class.
            calibration: of the same rows, or None.
        """
        counts = list(zip(right, predicted, labelled, strict=True))
        f1 = [2 * hits / (said + there) for hits, said, there in counts if said + there]
        return cls(
            accuracy=sum(right) / max(sum(labelled), 1),
            f1=sum(f1) / max(len(f1), 1),
            recall=tuple(hits / there if there else None for hits, _, there in counts),
            calibration=calibration,
        )


@dataclass(frozen=True)
class Classified:
    """What was found on a set of rows.

    Attributes:
        students: the scores of each student.
        ensemble: those of the class with the highest mean of the students' probabilities.
        images: how many rows were counted: those that have a label.
        target: (N,) int64 labels of all rows, `UNLABELLED_TARGET` for none; None if not asked for.
        answers: (K + 1, N) int64, the class that each student, and the ensemble, predicts.
    """

    students: tuple[ClassScores, ...]
    ensemble: ClassScores
    images: int
    target: Ids | None = None
    answers: Ids | None = None

    def confusions(self, most: int) -> list[tuple[int, int, int]]:
        """Return the pairs of classes that the ensemble confuses most, at most ``most``.

        Returns:
            The class of the label, the predicted class, and how many rows; the most rows first, of
            equals the pair with the lower classes.
        """
        assert self.target is not None
        assert self.answers is not None
        wrong = (self.target != UNLABELLED_TARGET) & (self.target != self.answers[-1])
        both = np.stack([self.target[wrong], self.answers[-1][wrong]])
        pairs, counts = np.unique(both, axis=1, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:most]
        return [(int(pairs[0, i]), int(pairs[1, i]), int(counts[i])) for i in order]


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
    *,
    detailed: bool = False,
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
        detailed: whether to measure calibration too, and to return each row's answers, of this
            column of processes.
    """
    world = world or World.alone(len(models))
    answers = world.total + 1  # of each student, then of the ensemble
    counts = torch.zeros(2 * answers + 1, classes, dtype=torch.int64, device=precision.device)
    trust = CalibrationSums(answers, precision.device)
    kept: list[tuple[Tensor, Tensor]] = []
    right, predicted, labelled = counts[:answers], counts[answers:-1], counts[-1]
    with evaluating(models):
        for batch in batches:
            with precision.autocast():
                logits = [m(input_of(batch.inputs, place)) for place, m in enumerate(models)]
            logits = world.all_students([z.float() for z in logits])
            mean = torch.stack([z.softmax(1) for z in logits]).mean(0)  # (N, C)
            found = torch.stack([z.argmax(1) for z in [*logits, mean]])
            known = (batch.target != UNLABELLED_TARGET).long()
            target = batch.target * known
            labelled.scatter_add_(0, target, known)
            predicted.scatter_add_(1, found, known.expand_as(found))
            hits = (found == target) * known
            right.scatter_add_(1, target.expand_as(found), hits)
            if detailed:
                shares = torch.stack([*(z.log_softmax(1) for z in logits), mean.log()])
                trust.add(shares, found, target, known)
                kept.append((batch.target.cpu(), found.cpu()))
    counts = world.sum_over_data(counts)
    *rows, there = counts.tolist()
    calibrations: Sequence[Calibration | None] = [None] * answers
    if detailed:
        calibrations = trust.read(world.sum_over_data(trust.sums))
    *students, ensemble = (
        ClassScores.of(hits, said, there, calibration)
        for hits, said, calibration in zip(
            rows[:answers], rows[answers:], calibrations, strict=True
        )
    )
    if not kept:
        return Classified(tuple(students), ensemble, sum(there))
    labels, said = (torch.cat(parts, -1).numpy() for parts in zip(*kept, strict=True))
    return Classified(tuple(students), ensemble, sum(there), labels, said)
