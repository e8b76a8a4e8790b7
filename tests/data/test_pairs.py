"""Crops of pairs: what they show, that draws are even, and that ranks and restarts see the same."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from pair_cases import MARGIN, SIZE, SMALL, numbered
from scipy.stats import chisquare

from dml_fast.data.loaders import evaluation_batches
from dml_fast.data.loaders.assemble import TrainBatch
from dml_fast.data.loaders.pairs import PairLoader
from dml_fast.data.pairs import PairSet, constant_squares, displacement_names, displacement_of
from dml_fast.data.sampling import CyclicOrder, ShuffledOrder

R, PATCH = SMALL["search"], SMALL["patch"]
SIDE = PATCH + 2 * R
CPU = {"device": "cpu"}


def loader(pairs: PairSet, batch: int = 20, seed: int = 3, **options: Any) -> PairLoader:
    return PairLoader(pairs, ShuffledOrder(len(pairs), batch, seed), seed=seed, **CPU, **options)


def batches(pairs: PairSet, epochs: int = 1, **options: Any) -> list[TrainBatch]:
    source = loader(pairs, **options)
    return [batch for epoch in range(epochs) for batch in source.epoch(epoch)]


def random_offsets(count: int) -> np.ndarray:
    most = SIZE - PATCH + MARGIN - 2 * R
    assert most == 6
    offset = np.random.default_rng(2).integers(-most, most + 1, (count, 2))
    offset[:4] = [[most, most], [-most, -most], [most, -most], [0, 0]]
    return offset


@pytest.mark.parametrize("symmetrise", [True, False])
def test_the_label_is_where_the_content_of_a_is_in_b(symmetrise: bool) -> None:
    offset = random_offsets(40)
    pairs = numbered(40, offset=offset)
    flips = set()
    for batch in batches(pairs, epochs=20, symmetrise=symmetrise):
        inputs = batch.inputs
        assert isinstance(inputs, torch.Tensor)
        assert inputs.shape == (20, 2, SIDE, SIDE)
        assert inputs.dtype == torch.float32
        for crop, label, pair in zip(inputs.numpy(), batch.target, batch.ids, strict=True):
            rows, columns = divmod(int(label), 2 * R + 1)  # the displacement, plus R
            a = crop[0, R : R + PATCH, R : R + PATCH]
            there = crop[1, rows : rows + PATCH, columns : columns + PATCH]
            moved = offset[pair] @ [100, 1]
            np.testing.assert_array_equal(there - a, np.full((PATCH, PATCH), moved))
            outside = crop[0].copy()
            outside[R : R + PATCH, R : R + PATCH] = 0
            assert not outside.any()
            flips.add((a[0, 0] > a[1, 0], a[0, 0] > a[0, 1]))
    assert len(flips) == (4 if symmetrise else 1)


def test_every_displacement_and_every_place_is_shown_as_often() -> None:
    pairs = numbered(200)
    seen = batches(pairs, epochs=50, batch=200)
    labels = torch.cat([batch.target for batch in seen])
    assert chisquare(torch.bincount(labels, minlength=49)).pvalue > 1e-3
    corner = torch.cat([batch.inputs[:, 0, R, R] % 1e5 for batch in seen])  # type: ignore[call-overload]
    first = corner.long() // 100  # the row of a corner of the crop, wherever it was flipped to
    plain = torch.where(first >= PATCH - 1, first - PATCH + 1, first)
    centre = (labels // (2 * R + 1)) == R
    assert set(plain[centre].tolist()) == set(range(SIZE - PATCH + 1))
    assert chisquare(torch.bincount(plain[centre])).pvalue > 1e-3


@pytest.mark.parametrize("dither", [0.7, 2.5, 1e-300])
def test_soft_targets_are_a_normal_distribution_around_the_label(dither: float) -> None:
    pairs = numbered(40)
    hard, soft = (batches(pairs, dither=sigma) for sigma in (0.0, dither))
    all_t = displacement_of(np.arange(49), R).astype(np.float64)
    for one, other in zip(hard, soft, strict=True):
        assert torch.equal(one.inputs, other.inputs)  # type: ignore[arg-type]
        e = displacement_of(one.target.numpy(), R)
        squares = ((all_t - e[:, None]) ** 2).sum(-1)
        with np.errstate(over="ignore"):
            wanted = np.exp(-squares / dither / dither / 2)
        wanted /= wanted.sum(1, keepdims=True)
        assert other.target.dtype == torch.float32
        np.testing.assert_allclose(other.target.numpy(), wanted, atol=1e-7)


def same(one: TrainBatch, other: TrainBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("dither", [0.0, 1.0])
def test_two_ranks_see_what_one_sees(dither: float) -> None:
    pairs = numbered(50)
    whole = batches(pairs, 2, batch=10, dither=dither)
    parts = [batches(pairs, 2, batch=10, rank=rank, ranks=2, dither=dither) for rank in (0, 1)]
    for batch, *halves in zip(whole, *parts, strict=True):
        joined = TrainBatch(*(torch.cat(sides) for sides in zip(*halves, strict=True)))  # type: ignore[arg-type]
        assert same(joined, batch)


def test_an_epoch_can_begin_at_any_step_and_no_global_generator_is_used() -> None:
    pairs = numbered(50)
    state = torch.get_rng_state()
    whole = list(loader(pairs, 10).epoch(1))
    rest = list(loader(pairs, 10).epoch(1, start_step=3))
    assert len(rest) == 2
    assert all(same(one, other) for one, other in zip(whole[3:], rest, strict=True))
    assert not same(whole[0], next(loader(pairs, 10).epoch(2)))
    assert not same(whole[0], next(loader(pairs, 10, seed=4).epoch(1)))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(IndexError, match="step 6"):
        next(loader(pairs, 10).epoch(0, 6))


def test_a_pair_that_comes_twice_in_an_epoch_is_shown_otherwise() -> None:
    order = CyclicOrder(6, batch_size=12, seed=0, steps=10)  # twice in each batch
    source = PairLoader(numbered(6), order, seed=0, **CPU)
    crops = [
        (int(pair), crop.numpy().tobytes())
        for batch in source.epoch(0)
        for pair, crop in zip(batch.ids, batch.inputs, strict=True)
    ]
    assert len(crops) == 120
    assert len(set(crops)) > 110


def test_pairs_are_evaluated_with_one_displacement_whatever_else_is_there() -> None:
    pairs = numbered(40, offset=random_offsets(40))
    (whole,) = evaluation_batches(pairs, batch_size=64, mean=(), std=(), **CPU)
    assert whole.ids.tolist() == list(range(40))
    assert whole.target.tolist() == pairs.labels.tolist()
    assert len(set(pairs.labels.tolist())) > 20
    some = pairs.subset(np.array([7, 31]))
    assert [*some.names] == ["7", "31"]
    found = list(evaluation_batches(some, batch_size=1, mean=(), std=(), **CPU))
    for place, pair in enumerate((7, 31)):
        assert torch.equal(found[place].inputs[0], whole.inputs[pair])  # type: ignore[index]
        assert found[place].target.item() == pairs.labels[pair]
    other = numbered(40, seed=4)
    assert (other.labels != pairs.labels).sum() > 30
    halves = [
        list(evaluation_batches(pairs, batch_size=8, mean=(), std=(), rank=r, ranks=2, **CPU))
        for r in (0, 1)
    ]
    assert sorted(i for half in halves for b in half for i in b.ids.tolist()) == list(range(40))


def test_few_pairs_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dml_fast"):
        loader(numbered(100))
        assert not caplog.records
        loader(numbered(99))
    assert "99 training pairs are few: with 80" in caplog.text
    assert "(4.1 to 5.2 px" in caplog.text


def test_classes_are_called_by_rows_and_columns() -> None:
    names = displacement_names(8)
    assert (names[0], names[1], names[17], names[-1]) == ("-8,-8", "-8,-7", "-7,-8", "8,8")
    for label in (0, 20, 288):
        assert names[label] == ",".join(map(str, displacement_of(np.array(label), 8).tolist()))


def test_squares_of_equal_pixels_are_found() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2, (300, 7, 9)).astype(np.float32)
    images[5, 2:6, 4:8] = 3
    for side in (2, 3, 4):
        windows = np.lib.stride_tricks.sliding_window_view(images, (side, side), (1, 2))
        wanted = (windows.max((3, 4)) == windows.min((3, 4))).any((1, 2))
        assert wanted[5]
        assert not wanted.all()
        np.testing.assert_array_equal(constant_squares(images, side), wanted)
