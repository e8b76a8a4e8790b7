"""How far a student's probabilities can be trusted: ECE, negative log-likelihood, Brier score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15
"""Bins of the expected calibration error, of equal width, as in Guo et al., ICML 2017."""


@dataclass(frozen=True)
class Calibration:
    """Means over the rows that have a label.

    Attributes:
        ece: expected calibration error, in 0..1: over `BINS` bins of the probability of the
            predicted class, the mean distance between that probability and the share of right
            answers (Guo et al., ICML 2017, equation 3).
        nll: negative log-likelihood of the labels, in nats; infinite where one has probability 0.
        brier: the squared distance between probabilities and label, summed over the classes
            (Brier 1950), in 0..2.
    """

    ece: float
    nll: float
    brier: float


class CalibrationSums:
    """What `Calibration` needs, added up on the device for A answers, without waiting for it.

    Args:
        answers: A, the students and the ensemble.
        device: where the probabilities are.
    """

    def __init__(self, answers: int, device: torch.device) -> None:
        # rows, probability and right answers of each bin, then log-likelihood and Brier score
        self.sums = torch.zeros(answers, 3 * BINS + 2, dtype=torch.float64, device=device)

    def add(self, log_probabilities: Tensor, found: Tensor, target: Tensor, known: Tensor) -> None:
        """Add a batch.

        Args:
            log_probabilities: (A, N, C) float32.
            found: (A, N) int64, the predicted classes.
            target: (N,) int64, any class where ``known`` is 0.
            known: (N,) int64, 1 for a row with a label and 0 for others.
        """
        p = log_probabilities.exp()
        top = p.gather(-1, found.unsqueeze(-1)).squeeze(-1)  # (A, N)
        weight = known.double()
        place = (top * BINS).long().clamp_(0, BINS - 1)
        right = (found == target) * weight
        for part, values in enumerate((weight.expand_as(top), top.double() * weight, right)):
            self.sums[:, part * BINS : (part + 1) * BINS].scatter_add_(1, place, values)
        at = target.expand_as(top).unsqueeze(-1)
        own = log_probabilities.gather(-1, at).squeeze(-1).double()
        self.sums[:, -2] -= torch.where(known > 0, own, 0.0).sum(1)
        squares = p.double().square().sum(-1) - 2 * own.exp() + 1
        self.sums[:, -1] += torch.where(known > 0, squares, 0.0).sum(1)

    @staticmethod
    def read(sums: Tensor) -> tuple[Calibration, ...]:
        """Return what the sums of all processes, (A, 3 BINS + 2), come to; this waits for them."""
        found = []
        for row in sums.tolist():
            count, confidence, right = (row[i * BINS : (i + 1) * BINS] for i in range(3))
            rows = max(sum(count), 1)
            ece = sum(abs(c - r) for c, r in zip(confidence, right, strict=True)) / rows
            found.append(Calibration(ece, row[-2] / rows, row[-1] / rows))
        return tuple(found)
