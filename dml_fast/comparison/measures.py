"""What is measured of each run of a comparison, on the test rows, after its last epoch."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from dml_fast.comparison.runs import Entry
from dml_fast.errors import UserError
from dml_fast.eval.of_run import evaluate_run
from dml_fast.foreign import content, json_value, reading, typed
from dml_fast.runs.files import atomic_write
from dml_fast.runs.history import best_student

Ids = npt.NDArray[np.int64]


class Measure(NamedTuple):
    """A figure of a run.

    Attributes:
        key: its name in ``compare.json``.
        title: in tables.
        percent: whether it is a share, shown in percent.
        up: whether more is better.
    """

    key: str
    title: str
    percent: bool
    up: bool


ACCURACY = (
    Measure("students", "students", True, True),
    Measure("best_student", "best student", True, True),
    Measure("ensemble", "ensemble", True, True),
)
CALIBRATION = (
    Measure("students_ece", "students' ECE", True, False),
    Measure("students_nll", "students' NLL", False, False),
    Measure("students_brier", "students' Brier", False, False),
    Measure("ensemble_ece", "ensemble's ECE", True, False),
    Measure("ensemble_nll", "ensemble's NLL", False, False),
    Measure("ensemble_brier", "ensemble's Brier", False, False),
)
RETRIEVAL = (
    *ACCURACY,
    Measure("students_rank1", "students' rank-1", True, True),
    Measure("ensemble_rank1", "ensemble's rank-1", True, True),
)


class Measured(TypedDict):
    """The figures of a run, and what it cost.

    ``measures`` are by `Measure.key`. ``parameters`` are those of all students together. ``images``
    counts every image as often as a student trained on it. ``seconds`` is what training took.
    """

    measures: dict[str, float]
    parameters: int
    images: int
    seconds: float


def measured(entry: Entry, device: str) -> tuple[Measured, Ids | None]:
    """Return a complete run's figures, and the classes that its students predict, (K + 1, N).

    Both are kept in the run's folder, so that a run is evaluated once.

    Raises:
        UserError: the run or its data cannot be read.
    """
    path, answers_path = entry.measures_file, entry.run.folder / "test_answers.npy"
    if not os.path.lexists(path):
        answers: list[Ids] = []
        result = evaluate_run(
            entry.run.folder,
            checkpoint="last",
            allow_code=entry.contestant.config.architectures,
            device=device,
            answers=answers,
            weights=entry.contestant.config.weights,
        )
        if answers:
            with atomic_write(answers_path) as file:
                np.save(file, answers[0], allow_pickle=False)
        with atomic_write(path) as file:
            file.write((json.dumps(_figures(entry, result), indent=2) + "\n").encode())
    found = json_value(content(path), path)
    with reading(path):
        figures: Measured = typed(found, Measured, "it")
    if not answers_path.exists():
        return figures, None
    raw = content(answers_path)
    with reading(answers_path):
        return figures, np.load(io.BytesIO(raw), allow_pickle=False)


def _figures(entry: Entry, result: Mapping[str, Any]) -> Measured:
    history, config = entry.run.metrics(), entry.contestant.config
    best = best_student(history[-1])
    if "ensemble_accuracy" in result:
        measures = _of_classes(result, best)
    elif "ensemble_mAP" in result:
        measures = _of_labels(result, best)
    else:
        measures = _of_identities(result, best)
    learners = len(config.architectures)
    if config.method == "distill":  # the first learns alone, then the others
        steps = history[-1]["step"] / 2
        passes = steps * learners
    else:
        passes = history[-1]["step"] * learners
    return {
        "measures": measures,
        "parameters": sum(student["parameters"] for student in result["students"]),
        "images": round(passes * config.batch_size),
        "seconds": round(sum(line["seconds"] for line in history), 1),
    }


def _of_classes(result: Mapping[str, Any], best: int) -> dict[str, float]:
    students = result["students"]
    found = {
        "students": fmean(s["accuracy"] for s in students),
        "best_student": students[best]["accuracy"],
        "ensemble": result["ensemble_accuracy"],
    }
    for name in ("ece", "nll", "brier"):
        found[f"students_{name}"] = fmean(s[name] for s in students)
        found[f"ensemble_{name}"] = result[f"ensemble_{name}"]
    return found


def _of_labels(result: Mapping[str, Any], best: int) -> dict[str, float]:
    scores = [student["mAP"] for student in result["students"]]
    if None in scores:
        raise UserError(
            f"{result['run']}: the logits of student {scores.index(None)} are not finite, or no "
            "test row has a label"
        )
    return {
        "students": fmean(scores),
        "best_student": scores[best],
        "ensemble": result["ensemble_mAP"],
    }


def _of_identities(result: Mapping[str, Any], best: int) -> dict[str, float]:
    students = result["students"]
    for k, student in enumerate(students):
        if student["mAP"] is None:
            raise UserError(f"{result['run']}: student {k} has no embeddings that are numbers")
    return {
        "students": fmean(s["mAP"] for s in students),
        "best_student": students[best]["mAP"],
        "ensemble": result["ensemble"]["mAP"],
        "students_rank1": fmean(s["rank1"] for s in students),
        "ensemble_rank1": result["ensemble"]["rank1"],
    }


def churn(answers: Sequence[Ids]) -> tuple[float, float] | None:
    """Return how many predictions change from one seed to another, as shares in 0..1.

    Args:
        answers: of each seed, (K + 1, N).

    Returns:
        The mean over all pairs of seeds and over the K students, and that of the ensemble. None
        for fewer than two seeds.
    """
    changed = [(one != other).mean(1) for one, other in combinations(answers, 2)]
    if not changed:
        return None
    mean = np.mean(changed, axis=0)
    return float(mean[:-1].mean()), float(mean[-1])
