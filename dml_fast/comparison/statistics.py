"""Differences of two methods that ran with the same seeds, and what they tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

CONFIDENCE = 0.95
_MOST_SEEDS = 1000


class Paired(NamedTuple):
    """Paired differences over n seeds.

    Attributes:
        mean: of the differences.
        error: standard error of that mean; NaN for one seed.
        low, high: the 95 % interval of the mean by Student's t, n - 1 degrees of freedom; NaN for
            one seed.
        wins: how many differences are above 0; a tie is no win.
        seeds: n.
    """

    mean: float
    error: float
    low: float
    high: float
    wins: int
    seeds: int

    @property
    def resolved(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0

    @property
    def difference(self) -> str:
        """Mean and standard error, as in a table."""
        return f"{self.mean:+.2f}" + ("" if math.isnan(self.error) else f" ± {self.error:.2f}")

    def __str__(self) -> str:
        return f"{self.difference} ({self.wins}/{self.seeds})"

    def enough(self) -> int | None:
        """Return with how many seeds the interval would leave 0 out, if the differences stayed so.

        None if more than 1,000 would not do, or nothing is known of their spread.
        """
        if math.isnan(self.error) or not self.mean:
            return None
        spread = self.error * math.sqrt(self.seeds)
        for count in range(2, _MOST_SEEDS + 1):
            if quantile(count - 1) * spread / math.sqrt(count) < abs(self.mean):
                return count
        return None


def paired(differences: Sequence[float]) -> Paired:
    """Summarise the differences of at least one seed."""
    count, mean = len(differences), fmean(differences)
    wins = sum(d > 0 for d in differences)
    if count < 2:
        return Paired(mean, math.nan, math.nan, math.nan, wins, count)
    error = stdev(differences) / math.sqrt(count)
    half = quantile(count - 1) * error
    return Paired(mean, error, mean - half, mean + half, wins, count)


def quantile(degrees: int) -> float:
    """Return the quantile of Student's t beyond which 2.5 % lie, for these degrees of freedom."""
    from scipy.stats import t  # scikit-learn depends on scipy, which takes a second to import

    return float(t.ppf((1 + CONFIDENCE) / 2, degrees))
