"""Rounds of labelling, simulated: train a cohort from scratch, let it choose rows, label them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dml_fast.config import TrainConfig, flag
from dml_fast.data import open_dataset
from dml_fast.data.philox import Draws
from dml_fast.distributed.launch import Launch
from dml_fast.engine.precision import pick_device
from dml_fast.errors import UserError
from dml_fast.reporting.console import at_the_end
from dml_fast.rng import derive_seed
from dml_fast.runs.trained import open_data
from dml_fast.selection.committee import Committee, Rows
from dml_fast.selection.of_run import check_committee, choose, unfit_for_information
from dml_fast.selection.rounds import Plan, RoundLine, Rounds
from dml_fast.training import job

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
    if config.executor == "auto" and pick_device(config.device).type == "cpu":
        # a trial may choose differently in a round that is begun again, with other roundings
        config = replace(config, executor="sequential")
    return config


def _check(config: TrainConfig, plan: Plan, launch: Launch) -> None:
    if launch.size > 1:
        raise UserError(f"--simulate trains in one process and there are {launch.size}: start one")
    for name in ("labels", "labels_per_class", "label_noise"):
        if getattr(config, name) != getattr(TrainConfig, name):
            raise UserError(
                f"{flag(name)} means nothing with --simulate, which hides the labels of the data "
                "and gives them back: leave it out"
            )
    if config.retrieval:
        raise UserError(
            f"--simulate chooses rows by their classes and --data {config.data} has identities: "
            "give data with classes"
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
        train: the training rows, with the labels that the data have.
        test: the rows on which rounds are compared.
        lines: of finished rounds.
    """

    config: TrainConfig
    plan: Plan
    rounds: Rounds
    classes: tuple[str, ...]
    train: Rows
    test: Rows
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
        lines = rounds.lines({name: row for row, name in enumerate(data.train.names)})
        return cls(config, plan, rounds, data.classes, data.train, data.test, lines)

    def go_on(self, launch: Launch) -> int:
        """Do the rounds that are left; return the exit code."""
        labels = self._start()
        for line in self.lines:
            labels |= self._labels(line["acquired"])
        while len(self.lines) <= self.plan.rounds and (not self.lines or self.lines[-1]["acquired"]):
            number = len(self.lines)
            code = self._train(number, labels, launch)
            if code:
                print(f"round {number} is not complete; the same command goes on with it")
                return code
            line = self._judge(number, labels)
            self.lines.append(line)
            self.rounds.write_lines(self.lines)
            labels |= self._labels(line["acquired"])
            print(_words(line, self.plan.rounds), flush=True)
        self._draw()
        return 0
