"""Stratified splits, fractions and label noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dml_fast.data.splits import (
    add_label_noise,
    remaining,
    split_validation,
    stratified_sample,
    take_fraction,
)
from dml_fast.errors import UserError

label_arrays = st.lists(st.integers(0, 5), min_size=2, max_size=120).map(
    lambda labels: np.array(labels, dtype=np.int64)
)


@settings(deadline=None, max_examples=100)
@given(labels=label_arrays, share=st.floats(0, 1), seed=st.integers(0, 9))
def test_stratified_samples_are_proportional_and_spare_one_of_each_class(
    labels: np.ndarray, share: float, seed: int
) -> None:
    count = round(share * len(labels))
    ids = stratified_sample(labels, count, np.random.default_rng(seed))
    assert (np.diff(ids) > 0).all() and len(ids) <= count
    shortfall = 0
    for label in np.unique(labels):
        size, taken = (labels == label).sum(), (labels[ids] == label).sum()
        assert taken <= size - 1
        assert taken <= np.ceil(size * count / len(labels))
        assert taken >= min(np.floor(size * count / len(labels)), size - 1)
        shortfall += taken == size - 1
    assert len(ids) == count or shortfall  # only the spared ones can be missing
    others = remaining(len(labels), ids)
    assert sorted([*ids, *others]) == list(range(len(labels)))


def test_samples_of_a_class_are_drawn_by_chance() -> None:
    labels = np.zeros(100, dtype=np.int64)
    draws = [stratified_sample(labels, 50, np.random.default_rng(seed)) for seed in range(2)]
    assert draws[0].tolist() != draws[1].tolist()
    assert draws[0].max() > 60 and draws[0].min() < 40


@settings(deadline=None, max_examples=100)
@given(
    labels=label_arrays,
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 9),
    num_classes=st.integers(6, 9),
)
def test_noise_makes_exactly_its_fraction_wrong(
    labels: np.ndarray, fraction: float, seed: int, num_classes: int
) -> None:
    before = labels.copy()
    noisy = add_label_noise(labels, num_classes, fraction, seed)
    assert (noisy != labels).sum() == round(fraction * len(labels))
    assert noisy.min() >= 0 and noisy.max() < num_classes and noisy.dtype == np.int64
    np.testing.assert_array_equal(labels, before)
    np.testing.assert_array_equal(noisy, add_label_noise(labels, num_classes, fraction, seed))


def test_noise_is_uniform_over_the_other_classes_and_depends_on_the_seed() -> None:
    labels = np.full(9000, 2, dtype=np.int64)
    noisy = add_label_noise(labels, 4, 0.5, seed=1)
    counts = np.bincount(noisy, minlength=4)
    assert counts[2] == 4500 and (abs(counts[[0, 1, 3]] - 1500) < 150).all()
    assert (noisy != add_label_noise(labels, 4, 0.5, seed=2)).any()
    with pytest.raises(UserError, match="at least 2 classes"):
        add_label_noise(labels, 1, 0.5, seed=1)


def test_training_fractions_are_stratified_nested_and_seeded() -> None:
    labels = np.repeat(np.arange(4), 100)
    tenth, half = take_fraction(labels, 0.1, 7), take_fraction(labels, 0.5, 7)
    assert np.bincount(labels[tenth]).tolist() == [10] * 4
    assert np.bincount(labels[half]).tolist() == [50] * 4
    assert set(tenth) <= set(half)
    assert set(tenth) != set(take_fraction(labels, 0.1, 8))
    assert np.bincount(labels[take_fraction(labels, 0.001, 7)]).tolist() == [1] * 4


def test_the_validation_split_is_fixed() -> None:
    labels = np.random.default_rng(0).integers(0, 5, 200)
    train, val = split_validation(labels, 0.1)
    np.testing.assert_array_equal(val, split_validation(labels.copy(), 0.1)[1])
    assert len(val) == 20 and sorted([*train, *val]) == list(range(200))
    with pytest.raises(UserError, match=r"--val-fraction 0.1 of 4 .*raise it"):
        split_validation(np.zeros(4, dtype=np.int64), 0.1)
