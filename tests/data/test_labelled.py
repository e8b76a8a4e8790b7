"""Batches with a fixed number of labelled rows, and epochs of a fixed number of steps."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import opened, pieces, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from dml_fast.data import DataSet
from dml_fast.data.labelled import LabelledOrder
from dml_fast.data.loaders import train_loader
from dml_fast.data.plan import Augmentation
from dml_fast.data.sampling import CyclicOrder, Regrouped, ShardOrder, ShuffledOrder
from dml_fast.data.sets import ImageSet
from dml_fast.data.vectors import VectorSet
from dml_fast.errors import UserError


def rows(known: int, unknown: int) -> np.ndarray:
    labels = np.concatenate([np.arange(known) % 3, np.full(unknown, -1)])
    return np.random.default_rng(0).permutation(labels)


@given(
    known=st.integers(1, 30),
    passes=st.integers(1, 5),
    each=st.integers(1, 6),
    without=st.integers(1, 6),
    ranks=st.integers(1, 4),
    steps=st.integers(0, 7),
)
@settings(deadline=None, max_examples=60)
def test_every_rank_has_its_share_of_both_kinds(
    known: int, passes: int, each: int, without: int, ranks: int, steps: int
) -> None:
    each, without = each * ranks, without * ranks
    size = each + without
    labels = rows(known, passes * without + (without > 1))
    order = LabelledOrder(labels, size, without / size, 3, steps, ranks)
    assert order.steps == steps or passes
    drawn = [order(epoch) for epoch in range(3)]
    for batches in drawn:
        assert batches.shape == (order.steps, size)
        kinds = (labels[batches] >= 0).reshape(order.steps, ranks, size // ranks)
        assert (kinds.sum(2) == each // ranks).all()
        unlabelled = batches[labels[batches] < 0]
        assert steps or len(np.unique(unlabelled)) == passes * without  # one pass
    taught = np.concatenate([b[labels[b] >= 0] for b in drawn])
    turns = np.bincount(taught, minlength=len(labels))[labels >= 0]
    assert turns.max() - turns.min() <= 1  # permutations end to end
    alone = LabelledOrder(labels, size, without / size, 3, steps)
    assert all((alone(epoch) == drawn[epoch]).all() for epoch in range(3))
    assert (LabelledOrder(labels, size, without / size, 3, steps, ranks)(2) == drawn[2]).all()


def test_the_order_is_another_in_each_epoch_and_of_each_seed() -> None:
    labels = rows(12, 40)
    one, other = (LabelledOrder(labels, 12, 0.67, seed) for seed in (0, 1))
    for part in (labels >= 0, labels < 0):
        several = [one(0), one(1), other(0)]
        seen = {tuple(b[part[b]].tolist()) for b in several}
        assert len(seen) == 3


def test_rows_of_permutations_come_end_to_end() -> None:
    for count, size, steps in ((10, 4, 3), (3, 8, 2), (7, 7, 1), (5, 1, 23)):
        order = CyclicOrder(count, size, 5, steps)
        epochs = [order(epoch) for epoch in range(6)]
        assert all(batches.shape == (steps, size) for batches in epochs)
        flat = np.concatenate(epochs).ravel()
        whole = flat[: len(flat) // count * count].reshape(-1, count)
        assert (np.sort(whole) == np.arange(count)).all()
        assert count == 3 or len({tuple(turn) for turn in whole.tolist()}) > 1
        assert (CyclicOrder(count, size, 5, steps)(4) == epochs[4]).all()


def test_batches_of_another_order_come_in_epochs_of_another_length() -> None:
    plain = ShuffledOrder(23, 5, 1)
    whole = np.concatenate([plain(epoch) for epoch in range(6)])
    for steps in (1, 3, 4, 11):
        order = Regrouped(plain, steps)
        for epoch in range(2):
            assert (order(epoch) == whole[epoch * steps : (epoch + 1) * steps]).all()


def test_rows_without_a_label_are_read_shard_by_shard() -> None:
    labels = np.where(np.arange(3000) % 100 == 0, 1, -1)
    shards = np.arange(3000) // 10
    order = LabelledOrder(labels, 100, 0.9, 0, shards=shards)
    unknown = np.flatnonzero(labels < 0)
    theirs = unknown[ShardOrder(shards[unknown], 90, 0, 1 << 16)(0)]
    batches = order(0)
    assert (np.sort(batches[labels[batches] < 0]) == np.sort(theirs.ravel())).all()
    assert LabelledOrder(labels, 100, 0.9, 0, 7, shards=shards)(1).shape == (7, 100)


def test_batches_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="no training row has a label"):
        LabelledOrder(np.full(9, -1), 4, 0.5, 0)
    with pytest.raises(UserError, match=r"has 43 rows without a label .* data 10: give a"):
        LabelledOrder(rows(30, 10), 64, 0.67, 0)
    assert LabelledOrder(rows(30, 10), 64, 0.67, 0, 5).steps == 5
    text = (
        r"0.67 of --batch-size 64 leaves 21 labelled rows, which 2 .* --unlabelled-share 0.6875, "
    )
    with pytest.raises(UserError, match=text + "which leaves 20"):
        LabelledOrder(rows(30, 100), 64, 0.67, 0, ranks=2)
    assert LabelledOrder(rows(30, 100), 64, 0.6875, 0, ranks=2).steps == 2
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match="share is"):
            LabelledOrder(rows(30, 100), 64, share, 0)


@pytest.mark.parametrize(
    ("share", "labelled", "words"),
    [
        (0.1, 4, "0.1 of --batch-size 4 is no row: rows without a label are in no batch"),
        (0.9, 1, "0.9 of --batch-size 4 leaves no labelled row: 3 rows of a batch have no label"),
        (0.67, 1, ""),
        (0.0, 4, ""),
    ],
)
def test_a_share_that_no_batch_can_have_is_said(
    share: float, labelled: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    labels = rows(8, 9)
    order = LabelledOrder(labels, 4, share, 0)
    assert ((labels[order(0)] >= 0).sum(1) == labelled).all()
    assert words in caplog.text and bool(words) == bool(caplog.text)
    if labelled == 4:
        assert (order(0) == np.flatnonzero(labels >= 0)[ShuffledOrder(8, 4, 0)(0)]).all()


def half_labelled(data: DataSet) -> DataSet:
    assert isinstance(data.train, ImageSet)
    labels = np.where(np.arange(len(data.train)) % 2, -1, data.train.labels)
    return replace(data, train=replace(data.train, labels=labels))


@pytest.mark.parametrize(
    "name", ["resident", "fallback", pytest.param("dali", marks=pytest.mark.dali)]
)
def test_loaders_of_images_give_targets_that_the_loss_ignores(name: str, tmp_path: Path) -> None:
    pieces(tmp_path, 24, [(32, 32)])
    options = {"batch_size": 3, "seed": 0, "device": "cpu", "unlabelled_share": 0.667, "ranks": 2}

    def walk(loader_name: str, rank: int) -> list:
        data = half_labelled(opened(tmp_path, loader_name))
        loader = train_loader(data, Augmentation(pad=2), rank=rank, epoch_steps=9, **options)
        found = list(loader.epoch(1, 4))
        loader.close()
        labels = torch.from_numpy(data.train.labels)
        for batch in found:
            target = torch.where(labels[batch.ids] < 0, -100, labels[batch.ids])
            assert torch.equal(batch.target, target) and (batch.target >= 0).sum() == 1
        return [tensors(batch) for batch in found]

    for rank in range(2):
        mine, theirs = walk(name, rank), walk("resident", rank)
        assert len(mine) == 5
        for ours, other in zip(mine, theirs, strict=True):
            assert all(map(torch.equal, ours, other))


def test_the_loader_of_vectors_gives_targets_that_the_loss_ignores() -> None:
    labels = rows(6, 20)
    train = VectorSet((np.eye(26, dtype=np.float32),), labels)
    data = DataSet(
        name="", train=train, val=train, test=None, classes=("a", "b", "c"), mean=(), std=(), pad=0,
        flip=False, fingerprint="",
    )  # fmt: skip
    loader = train_loader(data, Augmentation(), batch_size=6, seed=0, device="cpu")
    assert loader.steps_per_epoch == 5
    for batch in loader.epoch(0):
        assert (batch.target >= 0).sum() == 2
        assert torch.equal(batch.inputs.argmax(1), batch.ids)
        assert (batch.target >= 0).tolist() == (labels[batch.ids.numpy()] >= 0).tolist()


def test_groups_and_blends_of_rows_without_a_label_are_refused(tmp_path: Path) -> None:
    pieces(tmp_path, 24, [(32, 32)])
    data = half_labelled(opened(tmp_path, "resident"))
    usual = {"batch_size": 4, "seed": 0, "device": "cpu"}
    with pytest.raises(UserError, match="num_instances is 2 and 21 training rows have no label"):
        train_loader(data, Augmentation(), num_instances=2, **usual)
    with pytest.raises(UserError, match="blend labels and 21 training rows have none: leave out"):
        train_loader(data, Augmentation(cutmix=1.0), **usual)


def test_a_corrupt_file_is_replaced_by_one_that_has_a_label_or_not_as_it(tmp_path: Path) -> None:
    pieces(tmp_path, 12, [(16, 16)])
    data = opened(tmp_path, "fallback", skip_corrupt=True)
    assert isinstance(data.train, ImageSet)
    labels = np.full(len(data.train), -1)
    labels[[2, 9, 11]] = 0, 1, 1
    for wrong in (2, 3):
        Path(data.train.images.files.path(wrong)).write_bytes(b"")  # type: ignore[union-attr]
    few = replace(data, train=replace(data.train, labels=labels))
    loader = train_loader(few, Augmentation(), batch_size=6, seed=0, device="cpu", epoch_steps=8)
    for batch in loader.epoch(0):
        assert (batch.target >= 0).sum() == 2
        assert not set(batch.ids.tolist()) & {2, 3}
    loader.close()
