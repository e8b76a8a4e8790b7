"""The lines of a run's ``metrics.jsonl`` and what they say of it, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from statistics import fmean, median
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

from dml_fast.errors import brief
from dml_fast.foreign import Unfit, typed


class StudentScores(TypedDict, total=False):
    """What a student's entry has in some runs only: scores are in 0..1, None if it diverged."""

    triplet: float | None
    mihash: float | None
    kept: float | None
    val_f1: float | None
    val_acc: float | None
    val_error_px: float | None
    val_mAP: float | None
    val_rank1: float | None


class StudentEntry(StudentScores):
    """One student in one epoch; losses and accuracy are None if it skipped each step."""

    arch: str
    loss: float | None
    ce: float | None
    kl: float | None
    train_acc: float | None
    skipped: int


class EnsembleScores(TypedDict, total=False):
    """The ensemble's validation scores, in 0..1."""

    ensemble_val_acc: float | None
    ensemble_val_f1: float | None
    ensemble_val_error_px: float | None
    ensemble_val_mAP: float | None
    ensemble_val_rank1: float | None


class EpochLine(EnsembleScores):
    """One epoch: its number, from 1, the steps since the run began, and what was measured."""

    epoch: int
    step: int
    seconds: float
    images_per_s: float
    lr: float | list[float]  # one per student where they differ
    students: list[StudentEntry]


History: TypeAlias = Sequence[EpochLine]


def checked(lines: Any, archs: Sequence[str]) -> list[EpochLine]:
    """Return the lines of a run, if they are complete and of its students.

    Args:
        lines: values of JSON: those of ``metrics.jsonl``, or the history in a checkpoint.
        archs: the students' architectures.

    Raises:
        Unfit: what is wrong with which line.
    """
    history: list[EpochLine] = typed(lines, list[EpochLine], "history")
    for number, line in enumerate(history, start=1):
        where = f"line {number}"
        if line["epoch"] != number:
            raise Unfit(f"{where} is of epoch {line['epoch']}")
        found = [student["arch"] for student in line["students"]]
        if found != list(archs):
            raise Unfit(
                f"it is of another run: {where} has students {brief(', '.join(found))} "
                f"and the run {brief(', '.join(archs))}"
            )
        score = score_of(history[0])
        shares = [
            line.get(score.ensemble_key, -1),
            *(s.get(score.key, -1) for s in line["students"]),
        ]
        if not all(share is None or 0 <= share <= 1 for share in shares):
            raise Unfit(f"{where} lacks {score.key} in 0..1")
    return history


class Score(NamedTuple):
    """By what students are compared.

    Attributes:
        key: in a student's entry.
        ensemble_key: in a line.
        name: in titles.
        ensemble: in words, how the students make an ensemble.
    """

    key: Literal["val_acc", "val_mAP"]
    ensemble_key: Literal["ensemble_val_acc", "ensemble_val_mAP"]
    name: str
    ensemble: str


ACCURACY = Score("val_acc", "ensemble_val_acc", "accuracy", "mean of probabilities")
MAP = Score("val_mAP", "ensemble_val_mAP", "mAP", "concatenated embeddings")
LABELS = Score("val_mAP", "ensemble_val_mAP", "mAP of classes", "mean of probabilities")


def score_of(line: EpochLine) -> Score:
    """Return the score of a run's lines: mAP of identities or of several labels, else accuracy."""
    student = line["students"][0]
    if MAP.key not in student:
        return ACCURACY
    return MAP if "val_rank1" in student else LABELS


def of_pairs(line: EpochLine) -> bool:
    """Return whether a line is of a run on pairs, whose scores include errors in pixels."""
    return "val_error_px" in line["students"][0]


def best_epoch(history: History) -> int:
    """Return the epoch of ``best.pt``, from 1: the first with the highest mean score.

    Of a run on pairs it is the last epoch. Pairs of validation are as roughly aligned as those of
    training, so nothing can be chosen by them.
    """
    if of_pairs(history[-1]):
        return len(history)
    means = [mean_score(line) for line in history]
    return 1 + means.index(max(means))


def out_of_patience(history: History, patience: int) -> bool:
    """Return whether the newest epochs, as many as ``patience``, are no better than one before."""
    return 0 < patience <= len(history) - best_epoch(history) if history else False


def mean_score(line: EpochLine) -> float:
    """Return the mean of the students' validation scores, in 0..1, or of their errors in pixels."""
    return fmean(_scores(line))


def best_student(line: EpochLine) -> int:
    """Return the index of the first student with the best validation score."""
    return _scores(line).index(best_score(line))


def best_score(line: EpochLine) -> float:
    """Return the highest validation score of a student, in 0..1, or its least error in pixels."""
    return min(_scores(line)) if of_pairs(line) else max(_scores(line))


def ensemble_score(line: EpochLine) -> float | None:
    """Return the ensemble's validation score, in 0..1, or its error in pixels."""
    return line["ensemble_val_error_px"] if of_pairs(line) else line[score_of(line).ensemble_key]


def _scores(line: EpochLine) -> list[float]:
    """Return each student's validation score, the worst one where it diverged."""
    if of_pairs(line):
        errors = [student["val_error_px"] for student in line["students"]]
        return [inf if error is None else error for error in errors]
    key = score_of(line).key
    return [student[key] or 0.0 for student in line["students"]]


def unit(line: EpochLine) -> str:
    """Return in what `written` gives scores: percent or pixels."""
    return "px" if of_pairs(line) else "%"


def written(line: EpochLine, score: float | None, digits: int = 2) -> str:
    """Write a score of a line in its `unit`, and None as a dash."""
    return pixels(score) if of_pairs(line) else percent(score, digits)


def percent(share: float | None, digits: int = 2) -> str:
    """Write 0.9712 as ``97.12``, and None as a dash."""
    return "-" if share is None else f"{100 * share:.{digits}f}"


def pixels(error: float | None) -> str:
    """Write 3.2154 as ``3.22``, and None as a dash."""
    return "-" if error is None else f"{error:.2f}"


def images_per_s(history: History) -> float:
    """Return the images per second of the median epoch; all students see each image."""
    return float(median(line["images_per_s"] for line in history))
