"""Which rows to label next: `select --simulate` with several scores, paired by seed with random.

    python -m benchmarks.neighbours.selection                       # what has no line yet
    python -m benchmarks.neighbours.selection --tasks digits --seeds 0 1
    python -m benchmarks.neighbours.selection --table

MLPs of 64 units, trained from scratch in each round for 300 steps of 32 rows. Test accuracy of the
ensemble after the last step; area: its mean over the rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
import tyro

from benchmarks.neighbours import harness, vectors
from benchmarks.neighbours.harness import Job, Lines, Places
from dml_fast.reporting.markdown import table

NAME = "neighbours_selection"
SCORES = {
    "random": ("--score", "random"),
    "mutual_information, power": ("--score", "mutual_information", "--how", "power"),
    "mutual_information, topk": ("--score", "mutual_information", "--how", "topk"),
    "entropy, topk": ("--score", "entropy", "--how", "topk"),
    "margin, topk": ("--score", "margin", "--how", "topk"),
}


class Task(NamedTuple):
    """Data, and how its labels grow.

    Attributes:
        start: labels of the first round.
        acquire: labels that each later round has more.
        rounds: times that labels are acquired.
        cohort: students.
        options: of training.
    """

    start: int
    acquire: int
    rounds: int
    cohort: int
    options: tuple[str, ...] = ()


RECIPE = (
    *("--arch", "mlp_64", "--optimizer", "adamw", "--lr", "0.01", "--batch-size", "32"),
    *("--epochs", "10", "--epoch-steps", "30"),
)
TASKS = {
    "digits": Task(20, 10, 18, 4),
    "banking77": Task(200, 100, 8, 3),
    "trec6": Task(30, 20, 11, 3),
}


@dataclass(frozen=True)
class Arguments(Places):
    """Simulate every selection that has no line yet, then print the tables."""

    tasks: tuple[Literal["digits", "banking77", "trec6"], ...] = ("digits", "banking77")
    """Which data."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the first labels, the weights, the order and the selection."""
    shared: Path = harness.SHARED
    """Folder of banking77.tsv and trec6.tsv."""


def jobs(args: Arguments) -> Iterator[Job]:
    """Yield the loops, seed by seed, so that a killed experiment has whole pairs."""
    for task in args.tasks:
        start, acquire, rounds, cohort, more = TASKS[task]
        for seed in args.seeds:
            for score, choice in SCORES.items():
                flags = (
                    *("--start", str(start), "--acquire", str(acquire), "--rounds", str(rounds)),
                    *(*choice, *RECIPE, "--cohort", str(cohort), *more),
                )
                run = partial(measure, task, args.shared, flags, seed)
                yield Job(f"{task}, {score}", seed, flags, run)


def measure(
    task: str, shared: Path, flags: Sequence[str], seed: int, folder: Path
) -> dict[str, object]:
    """Simulate; a killed loop goes on at the round that it was in."""
    data = f"text:{shared / task}.tsv"
    if task == "digits":
        path = folder / "digits.npz"
        vectors.write_digits(path)
        data = f"vectors:{path}"
    rounds = harness.simulate(folder / "loop", [*flags, "--data", data, "--seed", str(seed)])
    ensemble = [100 * line["ensemble_test_acc"] for line in rounds]
    labels = [line["labels"] for line in rounds]
    return {"area": fmean(ensemble), "last": ensemble[-1], "labels": labels, "ensemble": ensemble}


def tables(lines: Lines, tasks: Sequence[str] = tuple(TASKS)) -> str:
    """Return a table for each task that has lines."""
    parts = []
    for task in tasks:
        settings = [f"{task}, {score}" for score in SCORES]
        base = settings[0]
        if not (theirs := curves(lines, base)):
            continue
        rows = []
        for setting in settings:
            if not (ours := curves(lines, setting)):
                continue
            areas = harness.figures(lines, setting, "area")
            rows.append(
                [
                    setting,
                    str(len(areas)),
                    harness.mean_and_error(areas.values()),
                    "" if setting == base else harness.difference(lines, setting, base, "area"),
                    harness.mean_and_error(harness.figures(lines, setting, "last").values()),
                    labels_to(ours, theirs),
                ]
            )
        header = ["selection", "seeds", "area, %", "area - random (wins)", "last round, %"]
        parts.append(table([*header, "labels to random's last mean point"], rows))
    return "\n\n".join(parts) or "Not measured yet."


def curves(lines: Lines, setting: str) -> list[tuple[list[int], list[float]]]:
    """Return (labels, ensemble's accuracy) of each seed."""
    return [(x["labels"], x["ensemble"]) for key, x in lines.items() if key[0] == setting]


def labels_to(
    ours: Sequence[tuple[list[int], list[float]]], theirs: Sequence[tuple[list[int], list[float]]]
) -> str:
    """Return the number of labels at which our mean curve reaches the last point of theirs."""
    goal = fmean(accuracy[-1] for _, accuracy in theirs)
    mean = np.mean([accuracy for _, accuracy in ours], axis=0)
    reached = np.flatnonzero(mean >= goal - 1e-9)
    return f"{ours[0][0][reached[0]]:,}" if len(reached) else "never"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = tyro.cli(Arguments, args=argv, description=__doc__)
    lines = harness.lines_of(jobs(args), NAME, args)
    print(tables(lines, args.tasks))


if __name__ == "__main__":
    main()
