"""Paired differences: SciPy's interval, and how often an effect is found where there is one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dml_fast.comparison.statistics import paired


@pytest.mark.parametrize("count", [2, 3, 5, 12])
def test_the_interval_is_scipys_paired_one(count: int) -> None:
    rng = np.random.default_rng(count)
    a, b = rng.normal(0.5, 1, count), rng.normal(0, 1, count)
    found = paired([*(a - b)])
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.error == pytest.approx(stats.sem(a - b))
    assert found.resolved == (stats.ttest_rel(a, b).pvalue < 0.05)
    assert (found.wins, found.seeds) == ((a > b).sum(), count)
    assert str(found) == f"{found.mean:+.2f} ± {found.error:.2f} ({(a > b).sum()}/{count})"


def test_one_seed_tells_nothing() -> None:
    found = paired([0.25])
    assert (found.mean, found.wins, found.seeds) == (0.25, 1, 1)
    assert math.isnan(found.error)
    assert str(found) == "+0.25 (1/1)"
    assert not found.resolved
    assert found.enough() is None


def test_equal_runs_are_no_effect() -> None:
    found = paired([0.0, 0.0, 0.0])
    assert not found.resolved
    assert found.enough() is None
    assert paired([0.5, 0.5, 0.5]).resolved


@pytest.mark.parametrize("effect", [0.0, 2.0, 4.0])
def test_an_effect_is_called_as_often_as_theory_says(effect: float) -> None:
    """1,000 comparisons of five seeds; the effect is in standard errors of the mean."""
    rng, seeds, repeats = np.random.default_rng(0), 5, 1000
    shift = effect / math.sqrt(seeds)
    called = [paired([*rng.normal(shift, 1, seeds)]) for _ in range(repeats)]
    share = sum(found.resolved for found in called) / repeats
    t = stats.t.ppf(0.975, seeds - 1)
    expected = stats.nct.sf(t, seeds - 1, effect) + stats.nct.cdf(-t, seeds - 1, effect)
    spread = math.sqrt(expected * (1 - expected) / repeats)
    assert abs(share - expected) < 3.5 * spread
    covered = sum(found.low <= shift <= found.high for found in called) / repeats
    assert abs(covered - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / repeats)


def test_as_many_seeds_as_are_named_do() -> None:
    differences = [1.0, -1.2, 2.0, 0.4]
    count = paired(differences).enough()
    assert count is not None
    spread = np.std(differences, ddof=1)

    def half(n: int) -> float:
        return float(stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n))

    assert half(count) < np.mean(differences) <= half(count - 1)
    assert paired([1.0, -1.0, 1.0, -1.000001]).enough() is None
