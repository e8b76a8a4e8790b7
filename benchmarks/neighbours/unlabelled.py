"""Do rows without a label teach? Mutual learning with and without them, paired by seed.

    python -m benchmarks.neighbours.unlabelled                      # what has no line yet
    python -m benchmarks.neighbours.unlabelled --tasks digits30 --seeds 100 101
    python -m benchmarks.neighbours.unlabelled --table

Cohorts of two are trained for 600 steps of 32 labelled rows, and of 64 unlabelled ones where these
teach; they are tested after the last step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import tyro

from benchmarks.neighbours import harness, vectors
from benchmarks.neighbours.harness import Job, Lines, Places

NAME = "neighbours_unlabelled"
METHODS = {
    "independent": ("--method", "independent", "--unlabelled-share", "0", "--batch-size", "32"),
    "dml": ("--method", "dml", "--unlabelled-share", "0", "--batch-size", "32"),
    "dml + unlabelled": (*("--method", "dml", "--unlabelled-share", "0.67", "--batch-size", "96"),),
}
TaskName = Literal[
    "digits30", "digits20", "digits60", "trec6-views", "trec6", "halves", "whole", "digits30-short"
]


class Task(NamedTuple):
    """Data with few labels.

    Attributes:
        title: in the table.
        per_class: labels of each class.
        options: further flags; ``{shared}`` and ``{folder}`` stand for folders.
        steps: of each of the ten epochs.
    """

    title: str
    per_class: int
    options: tuple[str, ...]
    steps: int = 60


def images(per_class: int) -> tuple[str, ...]:
    """Return flags of digits as images: 1,000 unlabelled ones, of the 1,168 that train."""
    share = f"{(1000 + 10 * per_class) / 1168:.4f}"
    return (
        *("--data", "digits", "--train-fraction", share, "--views", "per-student"),
        *("--arch", "resnet8", "--optimizer", "adamw", "--lr", "0.01"),
    )


MLP = ("--arch", "mlp_64", "--optimizer", "adamw", "--lr", "0.003")
TREC = ("--data", "text:{shared}/trec6.tsv", *MLP)
HALVES = ("--data", "vectors:{folder}/halves.npz", "--views", "levels", "--levels", "left,right")
TASKS: dict[str, Task] = {
    "digits20": Task("digits, 20 labels", 2, images(2)),
    "digits30": Task("digits, 30 labels", 3, images(3)),
    "digits60": Task("digits, 60 labels", 6, images(6)),
    "digits30-short": Task("digits, 30 labels, 150 steps", 3, images(3), 15),
    "whole": Task(
        "digits as vectors, 30 labels", 3, ("--data", "vectors:{folder}/whole.npz", *MLP)
    ),
    "halves": Task("digits, left and right halves, 30 labels", 3, (*HALVES, *MLP)),
    "trec6": Task("TREC-6, 60 labels", 10, TREC),
    "trec6-views": Task(
        "TREC-6, words and chars, 60 labels",
        10,
        (*TREC, "--views", "levels", "--levels", "words,chars"),
    ),
}


@dataclass(frozen=True)
class Arguments(Places):
    """Train every cohort that has no line yet, then print the table."""

    tasks: tuple[TaskName, ...] = get_args(TaskName)
    """Which data, in the order of running."""
    seeds: tuple[int, ...] = tuple(range(100, 112))
    """Of the labels, the weights and the order."""
    shared: Path = harness.SHARED
    """Folder of trec6.tsv."""


def jobs(args: Arguments) -> Iterator[Job]:
    """Yield the runs, seed by seed, so that a killed experiment has whole pairs."""
    for task in args.tasks:
        title, per_class, options, steps = TASKS[task]
        for seed in args.seeds:
            for method, choice in METHODS.items():
                flags = (
                    *(*options, "--labels-per-class", str(per_class), "--cohort", "2"),
                    *("--epochs", "10", "--epoch-steps", str(steps), "--kl-warmup", "3"),
                    *choice,
                )
                run = partial(measure, args.shared, flags, seed)
                yield Job(f"{title}, {method}", seed, flags, run)


def measure(shared: Path, flags: Sequence[str], seed: int, folder: Path) -> dict[str, float]:
    """Train and evaluate on the test rows."""
    vectors.write_digits(folder / "whole.npz")
    vectors.write_digits(folder / "halves.npz", halves=True)
    given = [flag.format(shared=shared, folder=folder) for flag in flags]
    harness.train(folder / "run", [*given, "--seed", str(seed)])
    return harness.accuracies(harness.evaluate(folder / "run"))


def tables(lines: Lines) -> str:
    """Return the tables: against independent students, and against dml without the rows."""
    parts = []
    for base in ("independent", "dml"):
        methods = [*METHODS][[*METHODS].index(base) :]
        of = {f"{t.title}, {m}": f"{t.title}, {base}" for t in TASKS.values() for m in methods}
        text = harness.comparison(lines, of, ("students", "ensemble"), of.__getitem__)
        parts.append(f"Differences from `{base}`:\n\n{text}")
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = tyro.cli(Arguments, args=argv, description=__doc__)
    lines = harness.lines_of(jobs(args), NAME, args)
    print(tables(lines))


if __name__ == "__main__":
    main()
