"""Do rows with a wrong label get left out? Small-loss selection on 400 digits, 30 % wrong labels.

    python -m benchmarks.neighbours.small_loss                 # what has no line yet
    python -m benchmarks.neighbours.small_loss --seeds 0 1
    python -m benchmarks.neighbours.small_loss --table

The recipe is that of the row digits400 in docs/results.md; accuracies are those on the test set
after the last epoch. *Found* says what the choice is worth: of the 30 % of the training rows whose
joint loss is the largest for the students after the last epoch, the share with a wrong label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

from benchmarks.neighbours import harness
from benchmarks.neighbours.harness import Job, Lines, Places
from dml_fast.data.loaders import evaluation_batches
from dml_fast.engine.small_loss import joint_loss, row_weights
from dml_fast.eval.of_run import run_precision, run_students
from dml_fast.loss import mutual_loss
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import Trained, open_data

NAME = "neighbours_small_loss"
NOISE = 0.3
RECIPE = (
    *("--data", "digits", "--train-fraction", "0.3425", "--label-noise", str(NOISE)),
    *("--cohort", "2", "--arch", "resnet32", "--epochs", "40"),
)
METHODS = {
    "independent": ("--method", "independent"),
    "dml": ("--method", "dml"),
    "small loss": ("--method", "dml", "--small-loss", str(NOISE)),
    "small loss without KL": (
        *("--method", "dml", "--kl-weight", "0", "--small-loss", str(NOISE)),
    ),
}


@dataclass(frozen=True)
class Arguments(Places):
    """Train every cohort that has no line yet, then print the table."""

    seeds: tuple[int, ...] = tuple(range(10))
    """0 to 4, and 5 to 9, which nothing was tried on before."""


def jobs(args: Arguments) -> Iterator[Job]:
    """Yield the runs, seed by seed, so that a killed experiment has whole pairs."""
    for seed in args.seeds:
        for method, choice in METHODS.items():
            flags = (*RECIPE, *choice)
            yield Job(method, seed, flags, partial(measure, flags, seed))


def measure(flags: Sequence[str], seed: int, folder: Path) -> dict[str, float]:
    """Train, and evaluate on the test rows and on the wrong labels."""
    run = folder / "run"
    harness.train(run, [*flags, "--seed", str(seed)])
    return {**harness.accuracies(harness.evaluate(run)), "found": found(run)}


@torch.inference_mode()
def found(folder: Path) -> float:
    """Return how many percent of the rows that would be left out have a wrong label."""
    run = Run.open(folder)
    trained, data = Trained.load(run, "last"), open_data(run)
    precision = run_precision(run.config, torch.device("cpu"))
    models = run_students(trained, run.config, precision)
    labels, truth = data.train.labels, data.train.hidden
    assert truth is not None
    batches = evaluation_batches(
        data.train, batch_size=512, mean=data.mean, std=data.std, device="cpu"
    )
    logits = [torch.cat(z) for z in zip(*([m(b.inputs) for m in models] for b in batches))]  # noqa: B905
    weight = 0.0 if run.config.method == "independent" else run.config.kl_weight
    losses = mutual_loss(logits, labels, kl_weight=weight, reduction="none")
    assert isinstance(losses, torch.Tensor)
    joint = joint_loss(losses, torch.ones(len(labels), dtype=torch.bool))
    left_out = (row_weights(joint, NOISE) == 0).numpy()
    return 100 * float((labels != truth)[left_out].mean())


def tables(lines: Lines) -> str:
    """Return the table: all seeds, and the fresh ones alone, against plain mutual learning."""
    parts = []
    fresh = {key: line for key, line in lines.items() if key[1] > 4}
    for title, part in (("All seeds", lines), ("Seeds 5 to 9 alone", fresh)):
        text = harness.comparison(
            part, [*METHODS], ("students", "ensemble", "found"), lambda setting: "dml"
        )
        parts.append(f"{title}; differences from `dml`:\n\n{text}")
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = tyro.cli(Arguments, args=argv, description=__doc__)
    lines = harness.lines_of(jobs(args), NAME, args)
    print(tables(lines))


if __name__ == "__main__":
    main()
