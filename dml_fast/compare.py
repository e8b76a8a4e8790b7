"""Which method is better on my data? ``python -m dml_fast.compare --methods independent,dml``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from dml_fast import cli
from dml_fast.config import TrainConfig
from dml_fast.config.types import Count, ThreadsOrZero
from dml_fast.errors import UserError, check_whole


@dataclass(frozen=True)
class CompareArguments(TrainConfig):
    """Train the same cohorts by several methods and seeds, and compare them on the test rows.

    All options of training hold for each method. A comparison that was stopped goes on by the same
    command; more seeds or methods may be added to it.
    """

    methods: tuple[str, ...] = ("independent,dml",)
    """Methods by name, with commas, or any options under a name of your own: independent,dml
    warm="--method dml --kl-warmup 10". Differences are taken from the first."""
    seeds: Count = 5
    """How many seeds, from --seed on. Runs of one seed are paired: the same weights at the start,
    order, crops and wrong labels."""
    jobs: ThreadsOrZero = 0
    """Runs side by side (0: one per core; on a GPU as many as fit)."""
    out: str = ""
    """Folder for the runs, compare.md, compare.json and compare.png."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, compare; return the exit code: 0, or 128 + the signal that stopped it."""
    args = cli.parse(CompareArguments, argv, "compare")
    if not args.out:
        raise UserError("give a folder for the runs with --out")
    if args.method != TrainConfig.method:
        raise UserError("--method is what is compared: give --methods")
    check_whole("--seeds", args.seeds, 1)
    check_whole("--jobs", args.jobs, 0)
    base = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
    from dml_fast.comparison.compare import compare
    from dml_fast.comparison.methods import contestants

    def parse(flags: list[str], default: TrainConfig) -> TrainConfig:
        return cli.parse(TrainConfig, flags, "train", default=default)

    found = contestants(args.methods, replace(base, out=""), parse)
    seeds = range(args.seed, args.seed + args.seeds)
    return compare(found, seeds, Path(args.out), args.jobs)


if __name__ == "__main__":
    sys.exit(cli.run(main))
