"""Weights that the students of a new run start from: ``--pretrained`` or ``--init-from``."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dml_fast.config import TrainConfig
from dml_fast.distributed.world import agreed
from dml_fast.engine import Cohort
from dml_fast.errors import UserError
from dml_fast.models.pretrained import is_run, load_pretrained
from dml_fast.runs.facts import DataFacts
from dml_fast.runs.folder import Run
from dml_fast.runs.named import students_named
from dml_fast.runs.trained import trained_of_run, weights_of_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where the students' weights come from.

    Attributes:
        option: by which the user gives it, ``--pretrained`` or ``--init-from``.
        source: what follows the option; "" where all weights are new.
        states: of a run, the weights for each student; else none.
        whole: whether the head is taken too.
        for_all: whether all students get those of one.
    """

    option: str = ""
    source: str = ""
    states: tuple[dict[str, Any], ...] = ()
    whole: bool = False
    for_all: bool = False

    @classmethod
    def of(cls, config: TrainConfig, facts: DataFacts) -> Start:
        """Read the weights of the run that an option names, if it names one.

        Args:
            config: checked.
            facts: of the data of the new run.

        Raises:
            UserError: the run has none, or too few students.
        """
        if config.init_from:
            return cls._of_run(config, facts)
        _warn_of_other_columns("--pretrained", config.pretrained, facts)
        states = weights_to_start(config)
        return cls("--pretrained" * bool(config.pretrained), config.pretrained, states)

    @classmethod
    def _of_run(cls, config: TrainConfig, facts: DataFacts) -> Start:
        option, count = "--init-from", len(config.architectures)
        named, here = students_named(config.init_from, option), f"{option} {config.init_from}"
        folder, for_all = named[0].path, named[0].path != config.init_from
        trained = trained_of_run(folder, option)
        states, theirs = trained.states, trained.facts
        if for_all:
            states = (states[named[0].number],) * count
        elif len(states) < count:
            raise UserError(
                f"{here} has {len(states)} students and this run {count}: give the number of one "
                f"for all, as in {option} {folder}:0"
            )
        whole = theirs.classes == facts.classes and theirs.head == facts.head
        if not whole:
            what = "another head" if theirs.classes == facts.classes else "other classes"
            logger.info("%s has %s than this run: the students' heads are new", here, what)
        _warn_of_other_columns(option, folder, facts)
        return cls(option, config.init_from, states, whole, for_all)

    def load(self, model: nn.Module, student: int, arch: str) -> None:
        """Load one student's weights into its network, in place.

        Args:
            model: of `dml_fast.models.heads.new_network`.
            student: its number.
            arch: the network's name.

        Raises:
            UserError: they do not fit.
        """
        if self.source:
            state = self.states[student] if self.states else None
            load_pretrained(model, self.source, arch, state, option=self.option, whole=self.whole)

    def check(self, cohort: Cohort, method: str) -> None:
        """Refuse one student's weights for students that would stay the same.

        Raises:
            UserError: it says what to give.
        """
        if not (self.whole and self.for_all) or method not in ("dml", "dml_e"):
            return
        try:
            cohort.check_distinct()
        except UserError:
            raise agreed(
                UserError(
                    f"{self.option} {self.source} gives all students the same weights, and "
                    f"--method {method} needs students that differ: leave the number "
                    "out, or give --method independent"
                )
            ) from None


NEW = Start()
"""All weights are new."""


def weights_to_start(config: TrainConfig) -> tuple[dict[str, Any], ...]:
    """Return the weights of each student if ``--pretrained`` names a run, else nothing."""
    if not is_run(config.pretrained):
        return ()
    weights = weights_of_run(config.pretrained)
    if len(weights) < len(config.architectures):
        raise UserError(
            f"--pretrained {config.pretrained} has {len(weights)} students and this run "
            f"{len(config.architectures)}: give the file of one of them, student_K.safetensors"
        )
    return weights


def _warn_of_other_columns(option: str, source: str, facts: DataFacts) -> None:
    """Say so if weights are of vectors whose columns may mean something else."""
    if not source or facts.inputs[0].kind != "vector":
        return
    if is_run(source):
        run = Run.open(Path(source).expanduser())
        if facts.features and run.facts.features == facts.features:
            return
    logger.warning(
        "%s %s may be of other features: the first layer's weights are kept, and mean something "
        "only if each column is the same as there",
        option,
        source,
    )
