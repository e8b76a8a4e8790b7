"""Scores of a pool against their definitions, and the rules of choosing, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import dml_fast
from dml_fast.errors import UserError
from dml_fast.select import acquire, pool_scores

CHI_SQUARED_2, CHI_SQUARED_4 = 13.82, 18.47
"""The 99.9 % quantiles for 2 and 4 degrees of freedom (any table)."""


def random_logits(students: int = 4, rows: int = 200, classes: int = 7, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    spread = rng.choice([1e-3, 1.0, 30.0], size=(1, rows, 1))
    return rng.normal(size=(students, rows, classes)) * spread


def entropy(p: Any) -> Any:
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(-1)


def softmax(z: Any) -> Any:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_scores_are_those_of_the_definition() -> None:
    z = random_logits()
    found = pool_scores(z)
    p = softmax(z)
    mean = p.mean(0)
    np.testing.assert_allclose(found.entropy, entropy(mean), rtol=0, atol=1e-12)
    information = entropy(mean) - entropy(p).mean(0)
    np.testing.assert_allclose(found.mutual_information, information, rtol=0, atol=1e-12)
    ordered = np.sort(mean, axis=1)
    margin = 1 - (ordered[:, -1] - ordered[:, -2])
    np.testing.assert_allclose(found.margin, margin, rtol=0, atol=1e-12)
    assert all(score.dtype == np.float64 for score in found)


def test_the_mutual_information_is_that_of_the_loss() -> None:
    z = torch.from_numpy(random_logits())
    loss = dml_fast.FusedMutualLoss()
    stats = loss(z, torch.zeros(z.shape[1], dtype=torch.long), return_stats=True)[1]
    found = pool_scores(z).mutual_information
    np.testing.assert_allclose(found, stats.row_mutual_information, rtol=1e-9, atol=1e-14)


def test_students_that_hardly_differ_keep_the_digits() -> None:
    """KL(p_k || p) is sum (p_k - p)^2 / 2p to second order; the definition would give noise."""
    apart = np.array([[1e-7, 0, 0], [-1e-7, 0, 0]])
    z = (np.log([0.5, 0.3, 0.2]) + apart)[:, None]
    found = pool_scores(z).mutual_information[0]
    assert found == pytest.approx((0.5 * 0.5) * 1e-7**2 / 2, rel=1e-6)


@pytest.mark.parametrize("students", [1, 2, 3, 7])
def test_equal_students_have_no_mutual_information(students: int) -> None:
    z = np.repeat(random_logits(1), students, axis=0)
    assert not pool_scores(z).mutual_information.any()


def test_the_kl_of_mutual_learning_bounds_the_mutual_information() -> None:
    """(1 / K^2) sum KL(p_l || p_k) over all pairs: what training lowers, it lowers too."""
    z = random_logits()
    p = softmax(z)
    logs = z - z.max(-1, keepdims=True)
    logs = logs - np.log(np.exp(logs).sum(-1, keepdims=True))
    pairs = (p[:, None] * (logs[:, None] - logs[None])).sum(-1).mean((0, 1))
    found = pool_scores(z).mutual_information
    assert (found <= pairs + 1e-12).all()
    assert (found >= 0).all()
    assert found.max() > 0.5


def test_an_unusable_student_is_left_out_of_the_row() -> None:
    z = random_logits(3, 5)
    rest = pool_scores(z[1:])
    for bad in (np.nan, np.inf):
        broken = z.copy()
        broken[0, 2, 1] = bad
        found = pool_scores(broken)
        for score, without, whole in zip(found, rest, pool_scores(z), strict=True):
            assert score[2] == pytest.approx(without[2], abs=1e-14)
            np.testing.assert_array_equal(np.delete(score, 2), np.delete(whole, 2))
    broken = z.copy()
    broken[:, 2] = np.nan
    assert all(
        np.isnan(score).tolist() == [False, False, True, False, False]
        for score in pool_scores(broken)
    )


def test_logits_of_minus_infinity_are_classes_that_cannot_be() -> None:
    found = pool_scores(np.array([[[0.0, -np.inf]], [[-np.inf, 0.0]]]))
    assert found.mutual_information == pytest.approx(math.log(2))
    assert found.entropy == pytest.approx(math.log(2))
    assert found.margin == 1.0


def test_a_large_pool_is_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    z = random_logits()
    whole = pool_scores(z)
    monkeypatch.setattr("dml_fast.selection.scores._AT_ONCE", 100)
    for part, all_at_once in zip(pool_scores(z), whole, strict=True):
        np.testing.assert_array_equal(part, all_at_once)


def test_tensors_and_empty_pools() -> None:
    z = random_logits()
    half = torch.from_numpy(z).bfloat16()
    for a, b in zip(pool_scores(half), pool_scores(half.double().numpy()), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [len(score) for score in pool_scores(z[:, :0])] == [0, 0, 0]


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (np.zeros((3, 4)), r"shape \(3, 4\): pass \(students, rows, classes\)"),
        (np.zeros((0, 4, 2)), "at least one student"),
        (np.zeros((2, 4, 1)), "two classes"),
        (np.zeros((2, 4, 3), dtype=complex), "complex128: pass real"),
        (np.array([[["a", "b"]]]), "pass real numbers"),
    ],
)
def test_wrong_logits_are_refused(logits: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        pool_scores(logits)


def test_topk_takes_the_highest_and_among_equals_the_first() -> None:
    scores = [0.5, 2.0, math.nan, 0.0, 2.0, 0.5, -math.inf]
    assert acquire(scores, 7, how="topk").tolist() == [1, 4, 0, 5, 3, 6, 2]
    assert acquire(scores, 2, how="topk", exclude=[1]).tolist() == [4, 0]
    mask = np.array([True, True, False, False, True, True, False])
    assert acquire(scores, 2, how="topk", exclude=mask).tolist() == [3, 6]
    assert acquire(scores, 0, how="topk").tolist() == []
    assert acquire(np.array([1.0]), 1, how="topk").dtype == np.int64


def test_power_draws_by_the_gumbel_trick() -> None:
    """The order is by beta log s + g, g being the same for a row whatever its score."""
    ones = acquire(np.ones(6), 6, seed=5).tolist()
    assert sorted(ones) == [*range(6)]
    assert acquire(np.full(6, 3.0), 6, seed=5).tolist() == ones
    assert acquire(np.arange(6.0), 6, beta=0.0, seed=5).tolist() == ones
    assert acquire(np.zeros(6), 6, seed=5).tolist() == ones
    assert acquire(np.ones(6), 5, seed=5, exclude=ones[:1]).tolist() == ones[1:]
    assert acquire(np.ones(6), 6, seed=6).tolist() != ones
    # a score of e^50 outweighs any noise, one of 0 loses against all; NaN comes after it
    scores = [1.0, 0.0, math.nan, math.exp(50.0), 1.0]
    for seed in range(20):
        order = acquire(scores, 5, seed=seed).tolist()
        assert order[0] == 3
        assert order[3:] == [1, 2]


def test_power_frequencies_are_those_of_the_closed_form() -> None:
    """One row of a pool is drawn with probability s^beta / sum s^beta: chi squared, 10^5 draws.

    Many pools of five rows lie side by side in one call, the first of each in the order counts.
    """
    scores, beta, draws = np.array([0.1, 0.2, 0.5, 1.0, 3.0]), 1.5, 100_000
    order = acquire(np.tile(scores, draws), 5 * draws, beta=beta, seed=1)
    place = np.empty(5 * draws, dtype=np.int64)
    place[order] = np.arange(5 * draws)
    counts = np.bincount(place.reshape(draws, 5).argmin(1), minlength=5)
    expected = draws * scores**beta / (scores**beta).sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < CHI_SQUARED_4


def test_seeds_are_independent_draws() -> None:
    """The same over seeds, as a loop of rounds draws."""
    scores = np.array([1.0, 2.0, 5.0])
    counts = np.bincount([acquire(scores, 1, seed=s)[0] for s in range(2000)], minlength=3)
    expected = 2000 * scores / 8
    assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARED_2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": 4}, "q is 4 and there are 3 rows to choose from"),
        ({"q": 3, "exclude": [0]}, "there are 2 rows"),
        ({"q": -1}, "q is -1: give a whole number"),
        ({"how": "best"}, "how is 'best', which is none of power, topk"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"beta": math.nan}, "beta is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"scores": [0.1, -0.5, 1.0]}, r"scores\[1\] is -0.5"),
        ({"scores": [0.1, 0.5, math.inf]}, r"scores\[2\] is inf"),
        ({"scores": [[0.1]]}, "pass .N,. real numbers"),
        ({"exclude": [3]}, "indices of the 3 rows"),
        ({"exclude": [-1]}, "indices of the 3 rows"),
        ({"exclude": [True]}, "indices of the 3 rows"),
        ({"exclude": [0.5]}, "indices of the 3 rows"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"scores": [0.1, 0.2, 0.3], "q": 1} | change
    with pytest.raises(UserError, match=words):
        acquire(arguments.pop("scores"), arguments.pop("q"), **arguments)
