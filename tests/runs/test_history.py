"""What the lines of a run's metrics say."""

from __future__ import annotations

from dml_fast.runs.history import best_epoch


def test_the_best_epoch_is_the_first_with_the_highest_mean() -> None:
    rows = [(0.5, 0.5), (0.9, 0.3), (0.7, 0.5), (0.6, 0.5)]
    history = [{"students": [{"val_acc": x} for x in row]} for row in rows]
    assert best_epoch(history) == 2
