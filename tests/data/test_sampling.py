"""Batches of identities: how they are made up, and what an epoch leaves out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dml_fast.data.sampling import IdentityOrder, ShuffledOrder
from dml_fast.errors import UserError


@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=15),
    people=st.integers(1, 4),
    each=st.integers(1, 4),
    epoch=st.integers(0, 5),
)
def test_a_batch_holds_k_images_of_each_of_p_identities(
    sizes: list[int], people: int, each: int, epoch: int
) -> None:
    labels = np.random.default_rng(len(sizes)).permutation(np.repeat(np.arange(len(sizes)), sizes))
    if len(sizes) < people:
        with pytest.raises(UserError, match=f"needs {people} identities"):
            IdentityOrder(labels, people * each, each, 0)
        return
    order = IdentityOrder(labels, people * each, each, 0)
    batches = order(epoch)
    assert batches.shape == (order.steps, people * each) and order.steps > 0
    for batch in labels[batches].reshape(order.steps, people, each):
        assert (batch == batch[:, :1]).all()
        assert len(set(batch[:, 0].tolist())) == people
    used, counts = np.unique(batches, return_counts=True)
    few = np.bincount(labels)[labels[used]] < each
    assert (counts[~few] == 1).all()  # only identities with too few images repeat any
    # as many batches as can be filled: with one more, some would want for identities
    groups = np.maximum(np.bincount(labels) // each, 1)
    more = order.steps + 1
    assert np.minimum(groups, more).sum() < people * more


def test_identities_with_too_few_images_are_filled_up() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
    for epoch in range(5):
        for batch in IdentityOrder(labels, 8, 4, 0)(epoch):
            for label, least in ((0, 4), (1, 2), (2, 3)):
                mine = batch[labels[batch] == label]
                assert len(mine) in (0, 4)
                if len(mine):
                    assert len(set(mine.tolist())) == least


def test_orders_are_functions_of_seed_and_epoch() -> None:
    labels = np.repeat(np.arange(20), 8)
    first = IdentityOrder(labels, 32, 4, 7)
    np.testing.assert_array_equal(first(3), IdentityOrder(labels, 32, 4, 7)(3))
    assert not np.array_equal(first(3), first(4))
    assert not np.array_equal(first(3), IdentityOrder(labels, 32, 4, 8)(3))
    assert first.steps == 5
    # over epochs everybody meets everybody else, and images change their company
    pairs = {tuple(sorted(set(labels[b].tolist()))) for e in range(10) for b in first(e)}
    assert len(pairs) > 45
    groups = {tuple(sorted(g)) for e in range(10) for g in first(e).reshape(-1, 4).tolist()}
    assert len(groups) > 250


def test_every_image_has_its_turn() -> None:
    labels = np.repeat(np.arange(10), [4, 5, 6, 7, 8, 9, 10, 11, 12, 13])
    order = IdentityOrder(labels, 16, 4, 0)
    seen = np.unique(np.concatenate([order(e).ravel() for e in range(40)]))
    assert len(seen) == len(labels)


def test_shuffled_batches_hold_each_image_at_most_once() -> None:
    order = ShuffledOrder(23, 5, 1)
    assert order.steps == 4
    for epoch in range(3):
        assert len(np.unique(order(epoch))) == 20
    assert not np.array_equal(order(0), order(1))
    for size in (0, 24):
        with pytest.raises(UserError, match="--batch-size from 1 to 23"):
            ShuffledOrder(23, size, 1)


def test_an_impossible_batch_is_refused() -> None:
    with pytest.raises(UserError, match="--num-instances 3 does not divide --batch-size 8"):
        IdentityOrder(np.arange(10), 8, 3, 0)
