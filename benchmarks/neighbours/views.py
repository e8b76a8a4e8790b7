"""Students that read different views of a text: GUM's implicit discourse relations, paired by seed.

    python -m benchmarks.neighbours.views               # what has no line yet
    python -m benchmarks.neighbours.views --table

Both files of GUM: their train rows train, dev and test rows test. Macro-F1 in percent of the
students of the last epoch; three MLPs of 64 units.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import tyro

from benchmarks.neighbours import harness
from benchmarks.neighbours.harness import Job, Lines, Places
from dml_fast.comparison.statistics import paired

NAME = "neighbours_views"
FILES = ("gum_implicit_open.tsv", "gum_implicit_rest.tsv")
# Out of domain; they validate, which selects nothing here: the last epoch is tested.
SPLITS = {"train": "train", "dev": "test", "test": "test", "test2": "val"}
RECIPE = ("--cohort", "3", "--epochs", "10", "--arch", "mlp_64", "--prior", "balance")
THREE = ("--views", "levels", "--levels", "args,pairs,edges")
NO_KL = ("--method", "independent")
SETTINGS = {
    "three levels, no KL": (*THREE, *NO_KL),
    "three levels, λ = 1, T = 1": (*THREE, "--kl-weight", "1", "--temperature", "1"),
    "three levels, λ = 1, T = 4": (*THREE, "--kl-weight", "1", "--temperature", "4"),
    "three levels, λ = 3, T = 4": (*THREE, "--kl-weight", "3", "--temperature", "4"),
    **{
        f"3 x {level}, no KL": ("--views", "levels", "--levels", level, *NO_KL)
        for level in ("args", "pairs", "edges")
    },
}


@dataclass(frozen=True)
class Arguments(Places):
    """Train every cohort that has no line yet, then print the table."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the weights and the order."""
    shared: Path = harness.SHARED
    """Folder of GUM's two files."""


def write_gum(shared: Path, path: Path) -> None:
    """Write both files of GUM as one."""
    names = ("split", "label", "arg1", "arg2")
    rows = ["\t".join(names)]
    for name in FILES:
        with open(shared / name, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                rows.append("\t".join([SPLITS[row["split"]], *(row[key] for key in names[1:])]))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def jobs(args: Arguments) -> Iterator[Job]:
    """Yield the runs, seed by seed, so that a killed experiment has whole pairs."""
    for seed in args.seeds:
        for setting, choice in SETTINGS.items():
            flags = (*RECIPE, *choice)
            yield Job(setting, seed, flags, partial(measure, args.shared, flags, seed))


def measure(shared: Path, flags: Sequence[str], seed: int, folder: Path) -> dict[str, object]:
    """Train and evaluate on the test rows."""
    data = folder / "gum.tsv"
    write_gum(shared, data)
    harness.train(folder / "run", [*flags, "--data", f"text:{data}", "--seed", str(seed)])
    result = harness.evaluate(folder / "run")
    each = [100 * student["f1"] for student in result["students"]]
    return {"students": fmean(each), "ensemble": 100 * result["ensemble_f1"], "each": each}


def tables(lines: Lines) -> str:
    """Return the table, and how far three levels are from the mean of the same-level cohorts."""
    settings = [*SETTINGS]
    text = harness.comparison(lines, settings, ("students", "ensemble"), lambda _: settings[0])
    same = [harness.figures(lines, setting, "ensemble") for setting in settings[4:]]
    three = harness.figures(lines, settings[0], "ensemble")
    seeds = sorted(three.keys() & same[0].keys() & same[1].keys() & same[2].keys())
    if not seeds:
        return text
    found = paired([three[s] - fmean(cohort[s] for cohort in same) for s in seeds])
    each = " / ".join(
        f"{fmean(line['each'][k] for key, line in lines.items() if key[0] == settings[0]):.1f}"
        for k in range(3)
    )
    return (
        f"{text}\n\nStudents of three levels without KL (args / pairs / edges): {each}. Their "
        f"ensemble\nminus the mean of the same-level ensembles: {found}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = tyro.cli(Arguments, args=argv, description=__doc__)
    lines = harness.lines_of(jobs(args), NAME, args)
    print(tables(lines))


if __name__ == "__main__":
    main()
