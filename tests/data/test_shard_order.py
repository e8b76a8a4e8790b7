"""The order of an epoch over tar shards: whole, mixed, local to ranks, the same on any number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dml_fast.data.sampling import LANES, ShardOrder, ShuffledOrder
from dml_fast.errors import UserError


def shards(sizes: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


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
    """Of 64 shards each of 8 ranks reads an eighth, and those that lie across a border."""
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
    """Positions of a shard's images over epochs are even: every shard comes early and late."""
    of = shards([100] * 16)
    order = ShardOrder(of, 8, 5, 200)
    early = [np.unique(of[order(epoch)[:10]]) for epoch in range(40)]
    counts = np.bincount(np.concatenate(early), minlength=16)
    assert counts.min() > 0


def test_a_batch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="batch size 11 does not fit 10 training images"):
        ShardOrder(shards([5, 5]), 11, 0, 5)
