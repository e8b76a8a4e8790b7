"""The folder of simulated rounds: its options, one line for each round, files of labels."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

from dml_fast.config import TrainConfig, flag
from dml_fast.config.files import difference, from_mapping
from dml_fast.errors import UserError, check_choice, check_whole, escaped
from dml_fast.foreign import Unfit, content, json_value, reading, typed
from dml_fast.runs.files import atomic_write, writing
from dml_fast.runs.folder import Run, held
from dml_fast.selection.scores import HOWS, SCORES, How, Score
from dml_fast.version import __version__


@dataclass(frozen=True)
class Plan:
    """What simulated rounds do, beside the options of their training.

    Attributes:
        start: labels in round 0, drawn uniformly.
        acquire: labels that each round adds.
        rounds: how often labels are added; one cohort more than that is trained.
        score: see `dml_fast.selection.of_run.select_next`.
        how: see there.
    """

    start: int
    acquire: int
    rounds: int
    score: Score
    how: How

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: it names the option.
        """
        for name in ("start", "acquire", "rounds"):
            check_whole(flag(name), getattr(self, name), 1)
        check_choice("--score", self.score, SCORES)
        check_choice("--how", self.how, HOWS)


class RoundLine(TypedDict):
    """A line of ``rounds.jsonl``: a cohort that was trained, and what it asked for.

    ``test_acc`` and ``test_f1`` (macro-F1) are those of each of K students on the test rows, in
    0..1. ``acquired`` are the names of rows, best first; none in the last line.
    """

    round: int
    labels: int
    test_acc: list[float]
    ensemble_test_acc: float
    test_f1: list[float]
    ensemble_test_f1: float
    acquired: list[str]


class _Options(TypedDict):
    dml_fast: str
    plan: dict[str, Any]
    config: dict[str, Any]


@dataclass(frozen=True)
class Rounds:
    """A folder of rounds: ``round-NN`` are ordinary runs, ``labels-NN.tsv`` their labels.

    Whatever else is there follows from ``rounds.jsonl``, which grows by a whole line.
    """

    folder: Path

    @property
    def options_file(self) -> Path:
        """JSON: the plan and the configuration of the rounds."""
        return self.folder / "simulation.json"

    @property
    def lines_file(self) -> Path:
        """One line of JSON for each finished round."""
        return self.folder / "rounds.jsonl"

    @property
    def picture(self) -> Path:
        """The curve of the accuracy over the labels."""
        return self.folder / "rounds.png"

    def run(self, number: int) -> Run:
        """Return the run of a round."""
        return Run(self.folder / f"round-{number:02d}")

    def labels_file(self, number: int) -> Path:
        """Return the file of a round's labels, for ``--labels``."""
        return self.folder / f"labels-{number:02d}.tsv"

    def lock(self) -> AbstractContextManager[None]:
        """Make the folder, and keep other processes from working in it.

        Raises:
            UserError: as `dml_fast.runs.folder.held`.
        """
        return held(self.folder, "works on the rounds in")

    def begin(self, plan: Plan, config: TrainConfig) -> None:
        """Write the options, or compare them with those that rounds here were begun with.

        Raises:
            UserError: an option differs, or the file is damaged or cannot be written.
        """
        if not os.path.lexists(self.options_file):
            options: _Options = {
                "dml_fast": __version__,
                "plan": asdict(plan),
                "config": config.to_dict(),
            }
            self._write(self.options_file, [json.dumps(options, indent=2)])
            return
        found = json_value(content(self.options_file), self.options_file)
        with reading(self.options_file):
            known = typed(found, _Options, "it")
            own = Plan(**typed(known["plan"], dict[str, Any], "its plan"))
        theirs = from_mapping(known["config"], str(self.options_file))
        for field in fields(Plan):
            self._compare(field.name, own, plan)
        if name := difference(theirs, config):
            self._compare(name, theirs, config)

    def _compare(self, name: str, own: object, wanted: object) -> None:
        mine, given = getattr(own, name), getattr(wanted, name)
        if mine != given:
            raise UserError(
                f"{flag(name)} is {given} and the rounds in {self.folder} were begun with {mine}: "
                f"give {flag(name)} {mine} to go on with them, or another --out"
            )

    def lines(self, rows: Mapping[str, int]) -> list[RoundLine]:
        """Read the finished rounds.

        Args:
            rows: the names of all rows that may be acquired.

        Raises:
            UserError: the file is damaged, or of other data.
        """
        if not os.path.lexists(self.lines_file):
            return []
        text = content(self.lines_file)
        with reading(self.lines_file):
            found = [
                typed(json_value(line, self.lines_file), RoundLine, f"its line {number}")
                for number, line in enumerate(text.splitlines(), 1)
            ]
            for number, line in enumerate(found):
                if line["round"] != number:
                    raise Unfit(f"its line {number + 1} is of round {line['round']}")
                for name in line["acquired"]:
                    if name not in rows:
                        raise Unfit(f"no row of the data is called {name!r}")
        return found

    def write_lines(self, lines: Sequence[RoundLine]) -> None:
        """Rewrite ``rounds.jsonl`` as a whole."""
        self._write(self.lines_file, (json.dumps(line) for line in lines))

    def write_labels(self, number: int, labels: Mapping[str, str]) -> None:
        """Write the labels of a round.

        Args:
            number: of the round.
            labels: a row's name to its class.
        """
        pairs = (f"{escaped(name)}\t{escaped(label)}" for name, label in labels.items())
        self._write(self.labels_file(number), ("name\tclass", *pairs))

    def _write(self, path: Path, lines: Iterable[str]) -> None:
        advice = "make room, then give the same command again"
        with writing(path, advice), atomic_write(path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
