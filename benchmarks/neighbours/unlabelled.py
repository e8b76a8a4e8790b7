"""Do rows without a label teach? Mutual learning with and without them, paired by seed.

    python -m benchmarks.neighbours.unlabelled                      # what has no line yet
    python -m benchmarks.neighbours.unlabelled --labels 30 --seeds 100 101
    python -m benchmarks.neighbours.unlabelled --table

Digits, labels + 1,000 unlabelled images, two ResNet-8 with their own crops, 600 steps; tested on
the 359 test images after the last step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from benchmarks.neighbours import harness
from benchmarks.neighbours.harness import Job, Lines, Places

NAME = "neighbours_unlabelled"
IMAGES = 1168  # training images of the digits, without those that validate
METHODS = {
    "independent": ("--method", "independent", "--unlabelled-share", "0"),
    "dml": ("--method", "dml", "--unlabelled-share", "0"),
    "dml + unlabelled": ("--method", "dml", "--unlabelled-share", "0.67"),
}


@dataclass(frozen=True)
class Arguments(Places):
    """Train every cohort that has no line yet, then print the table."""

    labels: tuple[int, ...] = (30, 20, 60)
    """How many labels, of all ten classes together."""
    seeds: tuple[int, ...] = tuple(range(100, 112))
    """Of the labels, the weights and the order."""


def options(labels: int, method: str) -> tuple[str, ...]:
    """Flags of a run, without seed and folder: 32 labelled rows a step, and 64 unlabelled."""
    share = f"{(1000 + labels) / IMAGES:.4f}"
    batch = "96" if "unlabelled" in method else "32"
    return (
        *("--data", "digits", "--train-fraction", share, "--labels-per-class", str(labels // 10)),
        *("--arch", "resnet8", "--cohort", "2", "--views", "per-student"),
        *("--epochs", "10", "--epoch-steps", "60", "--batch-size", batch, "--kl-warmup", "3"),
        *METHODS[method],
    )


def name(labels: int, method: str) -> str:
    """The setting's."""
    return f"{labels} labels, {method}"


def jobs(args: Arguments) -> Iterator[Job]:
    """Yield the runs, seed by seed, so that a killed experiment has whole pairs."""
    for labels in args.labels:
        for seed in args.seeds:
            for method in METHODS:
                flags = options(labels, method)
                yield Job(name(labels, method), seed, flags, partial(measure, flags, seed))


def measure(flags: Sequence[str], seed: int, folder: Path) -> dict[str, float]:
    """Train and evaluate on the test images."""
    harness.train(folder / "run", [*flags, "--seed", str(seed)])
    return harness.accuracies(harness.evaluate(folder / "run"))


def tables(lines: Lines, labels: Sequence[int] = Arguments.labels) -> str:
    """Return the tables: against independent, and against the same cohort without the rows."""
    settings = [name(count, method) for count in sorted(labels) for method in METHODS]
    parts = []
    for base, rows in (("independent", settings), ("dml", [s for s in settings if "dml" in s])):
        text = harness.comparison(
            lines, rows, ("students", "ensemble"), lambda s, base=base: f"{s.split(',')[0]}, {base}"
        )
        parts.append(f"Differences from `{base}`:\n\n{text}")
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = tyro.cli(Arguments, args=argv, description=__doc__)
    path = args.out / f"{NAME}.jsonl"
    if not args.table:
        harness.finish(jobs(args), path, args.work)
    print(tables(harness.read(path), args.labels))


if __name__ == "__main__":
    main()
