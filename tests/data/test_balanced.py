"""Batches in which all classes are equally frequent, and a class's rows come in turn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dml_fast.data.balanced import BalancedOrder, order_of_rows
from dml_fast.data.labelled import LabelledOrder
from dml_fast.errors import UserError


def turns_of(batches: np.ndarray, labels: np.ndarray) -> None:
    """Check that no class is ahead by two rows, and no row of a class by two of its turns."""
    seen = batches.ravel()
    classes = np.unique(labels[labels >= 0])
    counts = np.cumsum(labels[seen][:, None] == classes, axis=0)
    assert (counts.max(1) - counts.min(1) <= 1).all()
    for each in classes:
        own = seen[labels[seen] == each]
        times = np.cumsum(own[:, None] == np.flatnonzero(labels == each), axis=0)
        assert not len(own) or (times.max(1) - times.min(1) <= 1).all()


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    batch_size=st.integers(1, 12),
    steps=st.integers(1, 9),
)
@settings(deadline=None, max_examples=40)
def test_classes_and_the_rows_of_each_come_in_turn_through_all_epochs(
    sizes: list[int], batch_size: int, steps: int
) -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    order = BalancedOrder(labels, batch_size, 3, steps)
    drawn = [order(epoch) for epoch in range(4)]
    assert all(batches.shape == (steps, batch_size) for batches in drawn)
    turns_of(np.stack(drawn), labels)
    assert (BalancedOrder(labels, batch_size, 3, steps)(2) == drawn[2]).all()


def test_orders_differ_by_epoch_seed_round_and_class() -> None:
    labels = np.repeat(np.arange(3), [20, 20, 60])
    order = BalancedOrder(labels, 30, 0, 10)
    first, second = (order(epoch).ravel() for epoch in range(2))
    assert (first != second).any() and (BalancedOrder(labels, 30, 1, 10)(0).ravel() != first).any()
    of_class = first.reshape(-1, 3)
    assert len({tuple(labels[turn]) for turn in of_class}) == 6  # all orders of three classes
    mine, other = (first[labels[first] == label] % 20 for label in range(2))
    rounds = [mine[:20], mine[20:40], mine[40:60], other[:20]]
    assert len({tuple(each) for each in rounds}) == 4


def test_an_epoch_has_as_many_steps_as_one_pass() -> None:
    labels = np.repeat(np.arange(2), [90, 10])
    assert order_of_rows(labels, 8, 0, balance=True).steps == 12
    assert order_of_rows(labels, 8, 0, steps=5, balance=True)(1).shape == (5, 8)
    with pytest.raises(UserError, match="batch size 101 does not fit 100 training rows"):
        order_of_rows(labels, 101, 0, balance=True)


@pytest.mark.parametrize("share", [0.5, 0.0])
@pytest.mark.parametrize("ranks", [1, 2])
def test_labelled_rows_are_balanced_beside_others(share: float, ranks: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, -1], [3, 25, 12, 40]))
    order = LabelledOrder(labels, 8, share, 5, 0, ranks, balance=True)
    drawn = np.stack([order(epoch) for epoch in range(3)])
    taught = drawn[labels[drawn] >= 0]
    assert len(taught) == drawn.size * (1 - share)
    turns_of(taught, labels)
    if share:
        plain = LabelledOrder(labels, 8, share, 5, 0, ranks)(0)
        assert (drawn[0] == plain)[labels[plain] < 0].all()
