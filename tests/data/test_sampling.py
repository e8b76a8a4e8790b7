"""Orders of an epoch: shuffled images, identities, and shards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dml_fast.data.sampling import (
    LANES,
    IdentityOrder,
    ShardOrder,
    ShuffledOrder,
    sequential,
)
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
    # as many batches as can be filled: for one more there are not enough identities
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
    # over epochs each identity is in a batch with each other one, and so are images
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
        with pytest.raises(UserError, match=r"--batch-size from 1 to 23|batch_size is 0: give"):
            ShuffledOrder(23, size, 1)


def test_an_impossible_batch_is_refused() -> None:
    with pytest.raises(UserError, match="--num-instances 3 does not divide --batch-size 8"):
        IdentityOrder(np.arange(10), 8, 3, 0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_sequential_order_holds_everything_once(ranks: int) -> None:
    shares = [list(sequential(23, 4, rank, ranks)) for rank in range(ranks)]
    everything = np.concatenate([ids for share in shares for ids in share])
    assert sorted(everything.tolist()) == list(range(23))
    assert [len(ids) for ids in sequential(10, 4)] == [4, 4, 2]


def shards(sizes: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


@pytest.mark.slow
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum),
    st.integers(1, 64),
    st.integers(1, 60),
    st.integers(0, 3),
)
@settings(max_examples=300, deadline=None)
def test_every_image_at_most_once_and_only_the_remainder_is_left_out(
    sizes: list[int], batch_size: int, window: int, epoch: int
) -> None:
    batch_size = min(batch_size, sum(sizes))
    order = ShardOrder(shards(sizes), batch_size, 1, window)
    batches = order(epoch)
    assert batches.shape == (order.steps, batch_size) == (sum(sizes) // batch_size, batch_size)
    assert len(np.unique(batches)) == batches.size and batches.max() < sum(sizes)
    assert (batches == ShardOrder(shards(sizes), batch_size, 1, window)(epoch)).all()


def test_what_fits_in_one_window_is_shuffled_as_any_other_images() -> None:
    plain = ShuffledOrder(50, 8, 3)
    for window in (26, 50, 65536):  # the second window would be too small: it joins the first
        ours = ShardOrder(shards([10] * 5), 8, 3, window)
        assert all((ours(epoch) == plain(epoch)).all() for epoch in range(3))
    assert (ShardOrder(shards([10] * 5), 8, 3, 20)(0) != plain(0)).any()


def test_windows_are_of_whole_shards_and_large_enough() -> None:
    sizes = [30, 50, 20, 70, 10, 40, 60, 25, 5]
    order = ShardOrder(shards(sizes), 10, 0, 80)
    seen = set()
    for epoch in range(20):
        windows = order._windows(epoch)
        held = np.bincount(windows, weights=sizes)
        assert (
            (held >= 80).all() and len(held) >= 2 and sorted(set(windows)) == list(range(len(held)))
        )
        seen.add(tuple(windows))
    assert len(seen) > 10


def test_a_rank_reads_its_own_part_of_the_shards() -> None:
    """Each of 8 ranks reads an eighth of the 64 shards, and shards that two ranks share."""
    of, batch_size = shards([100] * 64), 64
    order = ShardOrder(of, batch_size, 0, 200)
    for epoch in range(3):
        read = of[order(epoch)].reshape(order.steps, 8, -1)
        touched = [len(np.unique(read[:, rank])) for rank in range(8)]
        assert max(touched) <= 64 // 8 + 4, touched
        at_once = [len(np.unique(read[step : step + 5, 0])) for step in range(order.steps - 5)]
        assert max(at_once) <= 4
    everything = ShuffledOrder(6400, batch_size, 0)(0)
    assert len(np.unique(of[everything][:, :8])) == 64  # without lanes and windows: all of them


def test_a_batch_mixes_lanes() -> None:
    of = shards([100] * 64)
    for batch_size, lanes in ((64, LANES), (36, 4), (7, 1)):
        order = ShardOrder(of, batch_size, 0, 200)
        for batch in order(0)[:5]:
            assert lanes <= len(np.unique(of[batch])) <= 4 * lanes


def test_images_of_one_class_a_shard_are_spread_over_time() -> None:
    """Over epochs, images of a shard are spread evenly over the epoch."""
    of = shards([100] * 16)
    order = ShardOrder(of, 8, 5, 200)
    early = [np.unique(of[order(epoch)[:10]]) for epoch in range(40)]
    counts = np.bincount(np.concatenate(early), minlength=16)
    assert counts.min() > 0


def test_a_batch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="batch size 11 does not fit 10 training rows"):
        ShardOrder(shards([5, 5]), 11, 0, 5)
