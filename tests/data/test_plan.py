"""The plan: ranks, views, what is drawn, and that draws depend on their key alone."""

from __future__ import annotations

import numpy as np
import pytest

from dml_fast.data.plan import Augmentation, BatchPlan, Plan
from dml_fast.data.sampling import IdentityOrder, Order, ShuffledOrder

EVERYTHING = Augmentation(pad=2, flip=True, policy="trivial", erasing=0.5, jitter=0.4, mixup=0.3)


def plan_of(order: Order, how: Augmentation = EVERYTHING, **options: int) -> Plan:
    return Plan(order, how, size=(16, 12), **({"seed": 5} | options))


def arrays(plan: BatchPlan) -> list[np.ndarray]:
    found = (plan.ids, plan.crops, plan.erased, plan.jitter, plan.resized, plan.policy)
    return [array for array in found if array is not None]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_see_each_sample_once_and_together_what_one_would(ranks: int) -> None:
    orders = [ShuffledOrder(103, 24, 1), IdentityOrder(np.arange(103) % 20, 24, 3, 1)]
    for order in orders:
        alone = plan_of(order)
        shards = [plan_of(order, rank=rank, ranks=ranks) for rank in range(ranks)]
        for epoch in range(2):
            seen = []
            for step in range(order.steps):
                parts = [arrays(shard(epoch, step)) for shard in shards]
                together = [np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)]
                for ours, expected in zip(together, arrays(alone(epoch, step)), strict=True):
                    np.testing.assert_array_equal(ours, expected)
                assert len({shard(epoch, step).mix for shard in shards}) == 1
                seen += together[0].tolist()
            assert len(seen) == len(set(seen)) == order.steps * 24


def test_a_sample_is_treated_alike_in_whatever_batch_it_comes() -> None:
    found: list[dict] = []
    for batch_size in (10, 25):
        plan = plan_of(ShuffledOrder(100, batch_size, 1), views=2)
        rows = {}
        for step in range(plan.steps_per_epoch):
            ids, *drawn = arrays(plan(3, step))
            rows |= {i: [a[..., k].tolist() for a in drawn] for k, i in enumerate(ids.tolist())}
        found.append(rows)
    assert len(found[0]) == 100 and found[0] == found[1]


def test_views_epochs_and_seeds_differ_and_the_first_view_is_the_shared_one() -> None:
    order = ShuffledOrder(64, 64, 1)
    shared, several = plan_of(order)(0, 0), plan_of(order, views=3)(0, 0)
    assert several.crops.shape == (3, 3, 64)
    np.testing.assert_array_equal(shared.crops[0], several.crops[0])
    draws = [several.crops[k].tobytes() for k in range(3)]
    draws.append(plan_of(order, seed=6)(0, 0).crops.tobytes())
    assert len(set(draws)) == 4
    by_epoch = [plan_of(order)(e, 0) for e in range(2)]
    first, second = (p.crops[0][:, np.argsort(p.ids)] for p in by_epoch)
    assert (first != second).any()


def test_an_image_that_comes_twice_in_a_batch_is_augmented_twice() -> None:
    labels = np.repeat(np.arange(3), [1, 2, 9])
    order = IdentityOrder(labels, 12, 4, 0)
    plan = plan_of(order, Augmentation(pad=8, flip=True, erasing=1.0))(0, 0)
    twins = np.flatnonzero(plan.ids == 0)
    assert len(twins) == 4
    assert plan.crops is not None and plan.erased is not None
    drawn = {plan.crops[0, :, k].tobytes() + plan.erased[0, :, k].tobytes() for k in twins}
    assert len(drawn) == 4


def test_any_step_can_be_asked_for_first() -> None:
    order = ShuffledOrder(9000, 8, 1)  # several chunks of draws per epoch
    walked = plan_of(order)
    steps = [[arrays(walked(epoch, step)) for step in range(order.steps)] for epoch in (0, 1)]
    for epoch, step in [(1, 1100), (0, 3), (0, 600), (1, 0)]:
        fresh = arrays(plan_of(order)(epoch, step))
        for ours, expected in zip(fresh, steps[epoch][step], strict=True):
            np.testing.assert_array_equal(ours, expected)
    for step in (-1, order.steps):
        with pytest.raises(IndexError, match=str(step)):
            walked(0, step)


def test_draws_cover_every_shift_both_mirrors_and_the_share_that_is_erased() -> None:
    plan = plan_of(ShuffledOrder(4000, 4000, 1))(0, 0)
    assert plan.erased is not None and plan.jitter is not None
    for row in plan.crops[0, :2]:
        assert np.bincount(row).min() > 700 and row.max() == 4
    assert 1850 < plan.crops[0, 2].sum() < 2150
    assert 1850 < (plan.erased[0, 2] > 0).sum() < 2150
    assert plan.jitter.min() >= 0.6 and plan.jitter.max() <= 1.4
    np.testing.assert_allclose(plan.jitter.mean(2), 1, atol=0.02)
    still = plan_of(ShuffledOrder(50, 50, 1), Augmentation(pad=3))(0, 0)
    assert not still.crops[0, 2].any() and still.erased is None and still.mix is None


@pytest.mark.slow
def test_weights_of_mixing_follow_beta_and_cutmix_counts_its_pixels() -> None:
    order = ShuffledOrder(4000, 1, 1)
    mixes = [plan_of(order, Augmentation(mixup=0.4))(0, step).mix for step in range(3000)]
    weights = np.array([mix.weight for mix in mixes if mix is not None and mix.box is None])
    assert len(weights) == 3000
    expected = np.random.default_rng(0).beta(0.4, 0.4, 100_000)
    for quantile in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert abs((weights < np.quantile(expected, quantile)).mean() - quantile) < 0.04
    both = [plan_of(order, Augmentation(mixup=1, cutmix=1))(0, step).mix for step in range(500)]
    pasted = [mix for mix in both if mix is not None and mix.box is not None]
    assert 190 < len(pasted) < 310
    for mix in pasted:
        assert mix.box is not None
        top, left, bottom, right = mix.box
        assert 0 <= top <= bottom <= 16 and 0 <= left <= right <= 12
        assert mix.weight == pytest.approx(1 - (bottom - top) * (right - left) / (16 * 12))
