"""Warnings of a run with hash codes: batches without a pair to compare, and collapsed codes."""

from __future__ import annotations

import logging

import pytest
import torch

from dml_fast.distributed.world import World
from dml_fast.loss.mihash import has_anchors
from dml_fast.training.meter import StudentSums
from dml_fast.training.watch import HashWatch


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("dml_fast"), "propagate", True)


def watch() -> HashWatch:
    return HashWatch(torch.device("cpu"), World.alone(2))


def sums(*information: float | None) -> list[StudentSums]:
    extras = [None if bits is None else -bits for bits in information]
    return [StudentSums(1.0, 1.0, 0.0, extra, 0.5, 1.0, 0, 0) for extra in extras]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ([0, 0, 1], True),
        ([2, 0, 2], True),
        ([3, 3, 3], False),
        ([0, 1, 2], False),
        ([-100, -100, 1, 1], False),
        ([-100, -100, 1, 2], False),
        ([1, -100, 2, 1], True),
        ([-100, -100], False),
        ([4], False),
    ],
)
def test_an_anchor_has_a_row_of_its_class_and_one_of_another(
    target: list[int], expected: bool
) -> None:
    assert has_anchors(torch.tensor(target)).item() is expected


def test_batches_that_teach_nothing_are_counted_and_named_once_an_epoch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mine = watch()
    for labels in ([0, 0, 1], [1, 1, 1], [2, 2, 2], [0, 1, 2]):
        mine.add(torch.tensor(labels))
    assert not caplog.records
    mine.end_epoch(3)
    assert "epoch 3: MIHash learned nothing from 3 of 4 batches" in caplog.text
    mine.add(torch.tensor([0, 0, 1]))
    mine.end_epoch(4)
    assert len(caplog.records) == 1


def test_collapsed_codes_are_named_once_with_their_information(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mine = watch()
    mine.look(99, sums(0.0, 0.0))
    mine.look(100, sums(0.011, None))
    assert not caplog.records
    mine.look(150, sums(0.3, 0.0021))
    assert "codes have collapsed: by step 150" in caplog.text
    assert "information this epoch of 0.0021 bits (student 1): lower --lr" in caplog.text
    mine.look(200, sums(0.0, 0.0))
    assert len(caplog.records) == 1
