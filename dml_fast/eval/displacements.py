"""How far students' displacements of pairs are from the true ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dml_fast.data.pairs import Ids, displacement_of

NEAR = 1.5
"""Pixels: a displacement that is off by one in rows and columns is still near."""


class DisplacementScores(NamedTuple):
    """The errors of one student, or of the ensemble.

    Attributes:
        error: the mean distance between the displacement with the highest probability and the true
            one, in pixels.
        near: the share of pairs with a distance of at most `NEAR`, in 0..1.
    """

    error: float
    near: float

    def to_json(self, prefix: str = "") -> dict[str, float]:
        """Return the scores as entries of a result."""
        return {f"{prefix}error_px": self.error, f"{prefix}within_{NEAR:g}px": self.near}


def displacement_scores(answers: Ids, target: Ids, search: int) -> list[DisplacementScores]:
    """Return the scores of each row of answers.

    Args:
        answers: (K, N) int64 classes, as `displacement_of` reads them.
        target: (N,) int64, the true ones.
        search: R.
    """
    off = displacement_of(answers, search) - displacement_of(target, search)
    distance = np.hypot(off[..., 0], off[..., 1])
    return [DisplacementScores(float(row.mean()), float((row <= NEAR).mean())) for row in distance]
