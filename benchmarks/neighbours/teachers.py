"""Is a cohort's gain kept in one student? Distilled from four, on 400 digits, 30 % wrong labels.

    python -m benchmarks.neighbours.teachers                 # what has no line yet
    python -m benchmarks.neighbours.teachers --seeds 0 1
    python -m benchmarks.neighbours.teachers --table

Each seed trains one student alone, four that teach one another and four that do not, and from each
of these fours one new student on the same rows and labels, with ``--teachers``. Accuracies and
negative log-likelihoods are those on the test set after the last epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro

from benchmarks.neighbours import harness
from benchmarks.neighbours.harness import Job, Lines, Places

NAME = "neighbours_teachers"
RECIPE = (
    *("--data", "digits", "--train-fraction", "0.3425", "--label-noise", "0.3"),
    *("--arch", "resnet8", "--epochs", "40"),
)
ALONE = "alone"
FOURS = {"taught": "dml", "independent": "independent"}
ROWS = ("one of four", "distilled", "ensemble")


@dataclass(frozen=True)
class Arguments(Places):
    """Train everything that has no line yet, then print the table."""

    seeds: tuple[int, ...] = (0, 1, 2)


def jobs(args: Arguments) -> Iterator[Job]:
    """Yield the runs, seed by seed, so that a killed experiment has whole pairs."""
    for seed in args.seeds:
        flags = (*RECIPE, "--method", "independent", "--cohort", "1")
        yield Job(ALONE, seed, flags, partial(alone, flags, seed))
        for name, method in FOURS.items():
            flags = (*RECIPE, "--method", method, "--cohort", "4")
            yield Job(name, seed, flags, partial(four, flags, seed))


def alone(flags: Sequence[str], seed: int, folder: Path) -> dict[str, float]:
    """Train one student."""
    run = folder / "run"
    harness.train(run, [*flags, "--seed", str(seed)])
    return figures(harness.evaluate(run)["students"][0])


def four(flags: Sequence[str], seed: int, folder: Path) -> dict[str, Any]:
    """Train four students; and one that they teach, from the weights with which `alone` begins."""
    run, distilled = folder / "run", folder / "distilled"
    harness.train(run, [*flags, "--seed", str(seed)])
    options = [*RECIPE, "--cohort", "1", "--teachers", str(run), "--seed", str(seed)]
    harness.train(distilled, options)
    found = harness.evaluate(run)
    students = [figures(one) for one in found["students"]]
    ensemble = {name: found[f"ensemble_{name}"] for name in ("accuracy", "nll")}
    rows = (
        {name: fmean(one[name] for one in students) for name in students[0]},
        figures(harness.evaluate(distilled)["students"][0]),
        figures(ensemble),
    )
    return {"rows": dict(zip(ROWS, rows, strict=True))}


def figures(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return accuracy in %, and negative log-likelihood in nats times 100."""
    return {"accuracy": 100 * scores["accuracy"], "nll x 100": 100 * scores["nll"]}


def tables(lines: Lines) -> str:
    """Return the table, with differences from one student alone."""
    settings = [ALONE, *(f"{name}, {row}" for name in FOURS for row in ROWS)]
    return harness.comparison(
        harness.flat(lines), settings, ("accuracy", "nll x 100"), lambda setting: ALONE
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = tyro.cli(Arguments, args=argv, description=__doc__)
    lines = harness.lines_of(jobs(args), NAME, args)
    print(tables(lines))


if __name__ == "__main__":
    main()
