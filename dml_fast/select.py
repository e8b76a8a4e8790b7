"""Which rows to label next, and which labels to doubt: ``python -m dml_fast.select RUN``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from dml_fast import cli
from dml_fast.config import TrainConfig, flag
from dml_fast.config.types import Count, CountOrZero
from dml_fast.distributed.launch import Launch
from dml_fast.errors import UserError, check_whole
from dml_fast.foreign import shown
from dml_fast.selection.scores import How, Score
from dml_fast.selection.scores import Scores as Scores
from dml_fast.selection.scores import acquire as acquire
from dml_fast.selection.scores import pool_scores as pool_scores


@dataclass(frozen=True)
class SelectArguments:
    """Choose the rows of a run's data to label next, by how its students see them.

    With --suspects: the labelled rows whose label they doubt most. With --simulate: rounds of
    choosing and labelling on data whose labels are known; python -m dml_fast.select --simulate
    --help lists its options.
    """

    run: Positional[Path | None] = None
    """Folder of the run, whose data have rows without a label."""
    acquire: int = 20
    """How many rows to choose."""
    score: Score = "mutual_information"
    """mutual_information: how much the students disagree (BALD). entropy: how unsure the ensemble
    is. margin: how near its two likeliest classes are."""
    how: How = "power"
    """power: draw rows, with probabilities proportional to their scores. topk: take the highest."""
    seed: int = 0
    """Of what is drawn."""
    suspects: bool = False
    """Choose labelled training rows instead, those whose label is most doubtful."""
    out: str = ""
    """File for the rows, best first, with tabs between the columns; - for the standard output."""
    checkpoint: Literal["best", "last", "previous"] = "best"
    """best: of the epoch with the highest mean validation score."""
    allow_code: str = ""
    """The function package.module:function (or several, with commas) that the run may call to build
    its students; others that it names are refused."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or cuda:N."""
    batch_size: int = 512
    """Rows at a time."""
    simulate: bool = False
    """Simulate rounds in the folder --out, without a run."""

    def check(self) -> None:
        """Refuse what can be seen to be wrong without the run.

        Raises:
            UserError: which, and what to give.
        """
        if self.run is None:
            raise UserError("give the folder of a run, or --simulate and options of training")
        for name in ("acquire", "batch_size"):
            check_whole(flag(name), getattr(self, name), 1)
        check_whole("--seed", self.seed, 0)
        if not self.out:
            raise UserError("give --out FILE.tsv for the rows, or --out - to print them")
        if self.suspects:
            for name in ("score", "how", "seed"):
                if getattr(self, name) != getattr(SelectArguments, name):
                    raise UserError(
                        f"{flag(name)} means nothing with --suspects, which go by the "
                        "probability of their label: leave it out"
                    )


@dataclass(frozen=True)
class SimulateArguments(TrainConfig):
    """Simulate rounds of labelling: train, choose rows, label them, train from scratch.

    The labels of the training rows are hidden, and given where a round asks for them. All options
    of training hold for each round. A loop that was stopped goes on by the same command.
    """

    simulate: bool = True
    """Simulate rounds, in place of choosing rows for a run."""
    start: Count = 30
    """Labels in round 0, drawn uniformly."""
    acquire: Count = 20
    """Labels that each round adds."""
    rounds: Count = 11
    """How often labels are added. One cohort more than that is trained."""
    score: Score = "mutual_information"
    """As without --simulate."""
    how: How = "power"
    """As without --simulate."""
    out: str = ""
    """Folder for the rounds: rounds.jsonl, rounds.png, and a run for each."""
    epoch_steps: CountOrZero = 20
    """Steps of an epoch, so that every round takes as many (0: one pass over its labels)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, choose or simulate, say what was written; return the exit code."""
    if "--simulate" in (sys.argv[1:] if argv is None else argv):
        return _simulate(cli.parse(SimulateArguments, argv, "select"))
    args = cli.parse(SelectArguments, argv, "select")
    args.check()
    assert args.run is not None
    from dml_fast.runs.folder import Run
    from dml_fast.selection.committee import Committee
    from dml_fast.selection.of_run import select_next, select_suspects

    committee = Committee.load(
        Run.open(args.run),
        args.checkpoint,
        allow_code=args.allow_code.split(","),
        device=args.device,
        batch_size=args.batch_size,
    )
    if args.suspects:
        done = select_suspects(committee, args.acquire, out=args.out)
    else:
        done = select_next(
            committee, args.acquire, score=args.score, how=args.how, seed=args.seed, out=args.out
        )
    printed = args.out == "-"
    what = "" if printed else f"wrote {shown(args.out)}: "
    for line in (f"{what}{shown(done.words)}", done.planted):
        if line:
            print(line, file=sys.stderr if printed else sys.stdout)
    return 0


def _simulate(args: SimulateArguments) -> int:
    if not args.simulate:
        raise UserError("--simulate and --no-simulate exclude each other: give one")
    if not args.out:
        raise UserError("--simulate writes a folder of rounds: give it with --out")
    config = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
    from dml_fast.selection.rounds import Plan
    from dml_fast.selection.simulation import simulate

    plan = Plan(args.start, args.acquire, args.rounds, args.score, args.how)
    return simulate(replace(config, out=""), plan, Path(args.out), Launch.from_environment())


if __name__ == "__main__":
    sys.exit(cli.run(main))
