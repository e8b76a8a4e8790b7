"""Runs that end without the curves drawn, which costs as much CPU as a hundred steps.

The figure itself is tested in tests/reporting; `drawn` has it in a test of a whole run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dml_fast.runs.history import History
from dml_fast.training import trainer

_DRAW = trainer.draw_curves


def leave_out() -> None:
    """From now on each run of this process writes an empty file."""
    trainer.draw_curves = _blank


@contextmanager
def drawn() -> Iterator[None]:
    """Within it, runs draw their curves as always."""
    before, trainer.draw_curves = trainer.draw_curves, _DRAW
    yield
    trainer.draw_curves = before


def _blank(path: Path, label: str, history: History) -> None:
    assert history and label
    path.touch()
