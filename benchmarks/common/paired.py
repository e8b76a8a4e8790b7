"""Differences of two methods that ran with the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple


class Paired(NamedTuple):
    """Paired differences over seeds.

    Attributes:
        mean: of the differences.
        error: standard error of that mean; NaN for one seed.
        wins: how many differences are above 0; a tie is no win.
        count: seeds.
    """

    mean: float
    error: float
    wins: int
    count: int

    @property
    def difference(self) -> str:
        """Mean and standard error, as in a table."""
        return f"{self.mean:+.2f}" + ("" if math.isnan(self.error) else f" ± {self.error:.2f}")

    def __str__(self) -> str:
        return f"{self.difference} ({self.wins}/{self.count})"


def paired(differences: Sequence[float]) -> Paired:
    """Summarise at least one difference, a seed each."""
    count = len(differences)
    error = stdev(differences) / math.sqrt(count) if count > 1 else math.nan
    return Paired(fmean(differences), error, sum(d > 0 for d in differences), count)
