"""Rounds of labelling, simulated: train a cohort from scratch, let it choose rows, label them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np

from dml_fast.config import TrainConfig, flag
from dml_fast.config.checks_longer import refuse_limits
from dml_fast.data import PairSet, has_several_labels, open_dataset
from dml_fast.data.features import Features
from dml_fast.data.philox import Draws
from dml_fast.distributed.launch import Launch
from dml_fast.engine.precision import pick_device
from dml_fast.errors import UserError
from dml_fast.foreign import shown
from dml_fast.reporting.console import at_the_end
from dml_fast.rng import derive_seed
from dml_fast.runs.history import percent
from dml_fast.selection.committee import Committee, Rows
from dml_fast.selection.of_run import check_committee, choose, unfit_for_information
from dml_fast.selection.rounds import Plan, RoundLine, Rounds
from dml_fast.training import job
from dml_fast.training.executors import without_trial

_log = logging.getLogger("dml_fast")


def simulate(config: TrainConfig, plan: Plan, folder: Path, launch: Launch) -> int:
    """Simulate rounds of labelling, or what is left of them, in a folder.

    The labels that the data have are hidden, and given where a round asks for them. Round 0 has
    ``plan.start`` labels, drawn uniformly with the run's seed, whatever their class. Each round
    trains new students with the same options and seed, an ordinary run in ``round-NN``. Its last
    checkpoint is used, since a choice by validation would use labels that the budget does not have.
    What is written does not depend on where the loop was stopped or killed.

    Args:
        config: of each round; ``out``, ``labels`` and ``labels_per_class`` are empty.
        plan: how many rounds, and how they choose.
        folder: of the rounds.
        launch: how this process was started.

    Returns:
        The exit code: 0, or 128 + the signal that stopped a round.

    Raises:
        UserError: an option, the folder or the data does not allow it.
        TrainingError: a round cannot continue.
    """
    config = _settled(config)
    plan.check()
    _check(config, plan, launch)
    config.check()
    rounds = Rounds(folder)
    with rounds.lock():
        rounds.begin(plan, config)
        return _Loop.over(config, plan, rounds).go_on(launch)


def _settled(config: TrainConfig) -> TrainConfig:
    """Return the configuration with what is automatic in other runs: rounds must be alike."""
    if config.unlabelled_share == "auto":
        config = replace(config, unlabelled_share=0.0)
    return without_trial(config)


def _check(config: TrainConfig, plan: Plan, launch: Launch) -> None:
    if launch.size > 1:
        raise UserError(f"--simulate trains in one process and there are {launch.size}: start one")
    for name in ("labels", "labels_per_class", "label_noise"):
        if getattr(config, name) != getattr(TrainConfig, name):
            raise UserError(
                f"{flag(name)} means nothing with --simulate, which hides the labels of the data "
                "and gives them back: leave it out"
            )
    refuse_limits(config, "rounds of --simulate choose rows when they have ended")
    if config.retrieval:
        raise UserError(
            f"--simulate chooses rows by their classes and --data {config.data} has identities: "
            "give data with classes"
        )
    if has_several_labels(config.data):
        raise UserError(
            f"--simulate chooses rows by their one class and those of --data {config.data} may "
            "have several labels: give data with classes"
        )
    if config.input_kind == "pair":
        raise UserError(
            f"--simulate chooses rows to label and --data {config.data} has pairs, which need no "
            "labels: give data with classes"
        )
    check_committee(plan.score, len(config.architectures), "the cohort")
    if plan.score == "mutual_information" and config.unlabelled_share:
        share = f"--unlabelled-share {config.unlabelled_share} trains the students"
        raise UserError(unfit_for_information(share))


@dataclass(frozen=True)
class _Loop:
    """The rounds of one folder.

    Attributes:
        config: of each round, without its labels and folder.
        plan: how many rounds, and how they choose.
        rounds: the folder.
        classes: the names of all classes.
        features: of texts and vectors, fitted once to all training rows: they need no labels.
        train: the training rows, with the labels that the data have.
        test: the rows on which rounds are compared.
        rows: the training rows' indices by name.
        lines: of finished rounds.
    """

    config: TrainConfig
    plan: Plan
    rounds: Rounds
    classes: tuple[str, ...]
    features: Features | None
    train: Rows
    test: Rows
    rows: Mapping[str, int]
    lines: list[RoundLine]

    @classmethod
    def over(cls, config: TrainConfig, plan: Plan, rounds: Rounds) -> _Loop:
        """Read the data and the finished rounds."""
        options = {**config.data_options, "device": str(pick_device(config.device))}
        data = open_dataset(config.data, download=config.download, unlabelled=True, **options)
        if data.test is None:
            raise UserError(
                f"{config.data} has no test split, on which --simulate compares rounds: give data "
                "that has one"
            )
        assert not isinstance(data.train, PairSet)
        assert not isinstance(data.test, PairSet)
        rows = {name: row for row, name in enumerate(data.train.names)}
        lines = rounds.lines(rows)
        parts = data.features, data.train, data.test
        return cls(config, plan, rounds, data.classes, *parts, rows, lines)

    def go_on(self, launch: Launch) -> int:
        """Do the rounds that are left; return the exit code."""
        ids = [
            *self._start(),
            *(self.rows[name] for line in self.lines for name in line["acquired"]),
        ]
        while not self.lines or self.lines[-1]["acquired"]:
            number = len(self.lines)
            if code := self._train(number, ids, launch):
                print("the same command goes on with this round", file=sys.stderr)
                return code
            line = self._judge(number, ids)
            ids += [self.rows[name] for name in line["acquired"]]
            self.lines.append(line)
            self.rounds.write_lines(self.lines)
            print(_words(line, self.plan.rounds), flush=True)
        left = self.plan.rounds + 1 - len(self.lines)
        if left:
            _log.warning("every row has a label: %d rounds are left out", left)
        self._draw()
        return 0

    def _start(self) -> list[int]:
        """Return the rows that have a label in round 0, in the order of the draw."""
        known = np.flatnonzero(self.train.labels >= 0)
        if self.plan.start > len(known):
            raise UserError(
                f"--start is {self.plan.start} and {self.config.data} has {len(known)} training "
                "rows with a label: give at most that"
            )
        order = Draws(self.config.seed, "start").permutation(len(known), 0)
        drawn: list[int] = known[order[: self.plan.start]].tolist()
        return drawn

    def _train(self, number: int, ids: Sequence[int], launch: Launch) -> int:
        """Train a round, or what is left of it; return the exit code."""
        names, classes = self.train.names, self.classes
        labels = {names[i]: classes[self.train.labels[i]] for i in ids}
        self.rounds.write_labels(number, labels)
        run = self.rounds.run(number)
        begun = run.config_file.exists()
        config = replace(
            self.config, labels=str(self.rounds.labels_file(number)), out=str(run.folder)
        )
        if begun:  # maybe under another name of the folder, or with the fastest executor
            own = run.config
            config = replace(config, labels=own.labels, out=own.out, executor=own.executor)
        resume = str(run.folder) if begun else ""
        return job.train(config, resume, launch, brief=True, features=self.features)

    def _judge(self, number: int, ids: Sequence[int]) -> RoundLine:
        """Test the students of a round, and let them choose rows."""
        committee = Committee.load(
            self.rounds.run(number),
            "last",
            allow_code=self.config.architectures,
            device=self.config.device,
        )
        found = committee.classify(self.test)
        return {
            "round": number,
            "labels": len(ids),
            "test_acc": [scores.accuracy for scores in found.students],
            "ensemble_test_acc": found.ensemble.accuracy,
            "test_f1": [scores.f1 for scores in found.students],
            "ensemble_test_f1": found.ensemble.f1,
            "acquired": self._acquired(committee, number, ids),
        }

    def _acquired(self, committee: Committee, number: int, ids: Sequence[int]) -> list[str]:
        """Return the names of the rows that a round chooses; the last one chooses none."""
        hidden = self.train.labels >= 0
        hidden[ids] = False
        pool = np.flatnonzero(hidden)
        if number == self.plan.rounds or not len(pool):
            return []
        found = committee.ask(self.train, pool)
        places = choose(
            found,
            len(self.train),
            self.plan.acquire,
            score=self.plan.score,
            how=self.plan.how,
            seed=derive_seed(self.config.seed, "round", number),
        )
        return [self.train.names[i] for i in found.ids[places]]

    def _draw(self) -> None:
        with at_the_end(str(self.rounds.picture), "the same command draws it again"):
            from dml_fast.reporting.rounds import plot_rounds  # takes a second to import

            plot_rounds(
                self.rounds.picture,
                f"{self.config.data}: {self.plan.score}, {self.plan.how}",
                [line["labels"] for line in self.lines],
                [line["test_acc"] for line in self.lines],
                [line["ensemble_test_acc"] for line in self.lines],
            )
        area = fmean(line["ensemble_test_acc"] for line in self.lines)
        print(f"mean of {len(self.lines)} rounds: ensemble {percent(area)} % of the test rows")
        print(f"wrote {shown(self.rounds.lines_file)} and {shown(self.rounds.picture)}")


def _words(line: RoundLine, rounds: int) -> str:
    students = " ".join(percent(share, 1) for share in line["test_acc"])
    return (
        f"round {line['round']}/{rounds}  {line['labels']} labels  "
        f"test {students} %  ensemble {percent(line['ensemble_test_acc'], 1)} %"
    )
