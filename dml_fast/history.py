"""What the lines of a run's ``metrics.jsonl`` say, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

History = Sequence[Mapping[str, Any]]


def mean_val_acc(line: Mapping[str, Any]) -> float:
    """Mean of the students' validation accuracies in one line, in 0..1."""
    return fmean(student["val_acc"] for student in line["students"])


def best_epoch(history: History) -> int:
    """The epoch of ``best.pt``, from 1: the first with the highest mean validation accuracy."""
    means = [mean_val_acc(line) for line in history]
    return 1 + means.index(max(means))


def best_student(line: Mapping[str, Any]) -> int:
    """The index of the first student with the highest validation accuracy in one line."""
    accuracies = [student["val_acc"] for student in line["students"]]
    return accuracies.index(max(accuracies))


def percent(share: float | None, digits: int = 2) -> str:
    """0.9712 as ``97.12``; None as a dash."""
    return "-" if share is None else f"{100 * share:.{digits}f}"


def images_per_s(history: History) -> float:
    """Images a second of the median epoch, each image counted once for all students."""
    return float(median(line["images_per_s"] for line in history))
