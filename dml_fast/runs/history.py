"""What the lines of a run's ``metrics.jsonl`` say, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

History = Sequence[Mapping[str, Any]]


class Score(NamedTuple):
    """What students are judged by.

    Attributes:
        key: of a student's entry in a line; the ensemble's has ``ensemble_`` before it.
        name: in titles.
        ensemble: what the ensemble goes by.
    """

    key: str
    name: str
    ensemble: str


ACCURACY = Score("val_acc", "accuracy", "mean of probabilities")
MAP = Score("val_mAP", "mAP", "concatenated embeddings")


def score_of(line: Mapping[str, Any]) -> Score:
    """What a run is judged by: mAP where it learns identities, else accuracy."""
    return MAP if MAP.key in line["students"][0] else ACCURACY


def mean_score(line: Mapping[str, Any]) -> float:
    """Mean of the students' validation scores in one line, in 0..1."""
    return fmean(_scores(line))


def best_epoch(history: History) -> int:
    """The epoch of ``best.pt``, from 1: the first with the highest mean validation score."""
    means = [mean_score(line) for line in history]
    return 1 + means.index(max(means))


def best_student(line: Mapping[str, Any]) -> int:
    """The index of the first student with the highest validation score in one line."""
    scores = _scores(line)
    return scores.index(max(scores))


def best_score(line: Mapping[str, Any]) -> float:
    """The highest validation score of a student in one line, in 0..1."""
    return max(_scores(line))


def ensemble_score(line: Mapping[str, Any]) -> float | None:
    """The ensemble's validation score in one line, in 0..1."""
    score: float | None = line[f"ensemble_{score_of(line).key}"]
    return score


def _scores(line: Mapping[str, Any]) -> list[float]:
    """One a student; 0 for one that diverged and found nothing."""
    key = score_of(line).key
    return [student[key] or 0.0 for student in line["students"]]


def percent(share: float | None, digits: int = 2) -> str:
    """0.9712 as ``97.12``; None as a dash."""
    return "-" if share is None else f"{100 * share:.{digits}f}"


def images_per_s(history: History) -> float:
    """Images a second of the median epoch, each image counted once for all students."""
    return float(median(line["images_per_s"] for line in history))
