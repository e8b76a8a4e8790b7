"""What the lines of a run's metrics say."""

from __future__ import annotations

from dml_fast.runs.history import best_epoch, best_score, best_student, mean_score, written


def test_the_best_epoch_is_the_first_with_the_highest_mean() -> None:
    rows = [(0.5, 0.5), (0.9, 0.3), (0.7, 0.5), (0.6, 0.5)]
    history = [{"students": [{"val_acc": x} for x in row]} for row in rows]
    assert best_epoch(history) == 2


def test_of_pairs_the_last_epoch_is_kept_and_the_least_error_is_the_best() -> None:
    """Errors of rough pairs grow as students see through them: nothing is chosen by these."""
    rows = [(3.0, 2.0), (4.0, 3.5)]
    history = [
        {"students": [{"val_acc": 0.1, "val_error_px": x} for x in row], "ensemble_val_error_px": 3}
        for row in rows
    ]
    assert best_epoch(history) == 2
    last = history[-1]
    assert (best_student(last), best_score(last), mean_score(last)) == (1, 3.5, 3.75)
    assert written(last, 3.75) == "3.75"
    last["students"][1]["val_error_px"] = None  # it diverged
    assert best_student(last) == 0
