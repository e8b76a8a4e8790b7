"""What a run writes, and how it resumes: description, checkpoints, metrics, final weights."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from dml_fast import rng
from dml_fast.config import TrainConfig
from dml_fast.data.corrupt import CorruptFiles
from dml_fast.distributed.failure import is_lost
from dml_fast.distributed.world import agreed
from dml_fast.engine import Cohort
from dml_fast.errors import CheckpointError, TrainingError, UserError, reason
from dml_fast.foreign import reading
from dml_fast.reporting.console import logger
from dml_fast.runs import checkpoint
from dml_fast.runs.description import Change, StudentJson, check_epochs, in_words, with_new
from dml_fast.runs.facts import DataFacts
from dml_fast.runs.files import link
from dml_fast.runs.folder import Run
from dml_fast.runs.history import EpochLine, best_epoch
from dml_fast.runs.weights import save_student
from dml_fast.training.elsewhere import changed_mesh, changed_surroundings, surroundings
from dml_fast.training.meter import Meter

_LONGER = "from here on its schedules are those of the new number"


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        meter: totals of the epoch under way.
        executor: the name of the executor in use; ``auto`` until the trial.
        step: steps done in the whole run.
        seconds: of training in the epoch under way.
        history: one line for each finished epoch.
    """

    meter: Meter
    executor: str
    step: int = 0
    seconds: float = 0.0
    history: list[EpochLine] = field(default_factory=list)

    def end_epoch(self, line: EpochLine) -> None:
        """Add an epoch's line and begin the next epoch."""
        self.history.append(line)
        self.meter.start_epoch()
        self.seconds = 0.0


class Saver:
    """Writes the folder of a run, and continues it. Several processes call each method together.

    Args:
        config: of the run.
        run: its folder, which can be written to.
        facts: of the data that the run trains on.
        corrupt: the files that this process has skipped; None where the data has no files.
        cohort: the students of this process.
        progress: how far the run is; `resume` sets it.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        facts: DataFacts,
        corrupt: CorruptFiles | None,
        cohort: Cohort,
        progress: Progress,
    ) -> None:
        self.config, self.run, self.facts, self.corrupt = config, run, facts, corrupt
        self.cohort, self.progress, self.world = cohort, progress, cohort.world
        self._every_steps, self._every_seconds = config.save_interval
        self._saved_step, self._saved_at = 0, time.monotonic()  # of the newest checkpoint
        self._changes: list[Change] = []

    def describe(self) -> list[StudentJson]:
        """Write ``config.json``; return the architecture and parameters of each student."""
        mine: dict[int, StudentJson] = {
            k: {"arch": s.arch, "parameters": sum(p.numel() for p in s.model.parameters())}
            for k, s in zip(self.cohort.numbers, self.cohort, strict=True)
        }
        found = {k: v for part in self.world.all_gather(mine) for k, v in part.items()}
        students = [found[k] for k in range(self.cohort.total)]
        with self._writing():
            if self.world.main:
                self.run.describe(self._picked_config(), self.facts, students, self._changes)
        return students

    def bytes_needed(self) -> int:
        """Return what the run will need: three checkpoints, a spare one, and the weights."""
        tensors = [t for s in self.cohort for t in s.model.state_dict().values()]
        mine: int = sum(t.numel() * t.element_size() for t in tensors)
        weights: int = sum(self.world.all_gather(mine)) // self.world.mesh.data
        networks = 1 + (self.config.ema != "off")
        states = 2 if "adamw" in self.config.algorithms else 1
        return 4 * weights * (networks + states) + networks * weights + 2**22

    @property
    def saved(self) -> bool:
        """Whether a checkpoint of this step is there."""
        return 0 < self._saved_step == self.progress.step

    def steps_due(self) -> bool:
        """Whether ``--save-every`` asks for a checkpoint after this step."""
        return 0 < self._every_steps <= self.progress.step - self._saved_step

    def seconds_due(self) -> bool:
        """Whether the newest checkpoint is older than the seconds of ``--save-every``."""
        return 0 < self._every_seconds <= time.monotonic() - self._saved_at

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint, and the list of the files that were skipped as corrupt.

        Args:
            best: whether it is also the best so far.

        Raises:
            TrainingError: the folder cannot be written to.
        """
        progress = self.progress
        state = {
            "config": json.dumps(self._picked_config().to_dict()),
            "fingerprint": self.facts.fingerprint,
            "mesh": str(self.world.mesh),
            "surroundings": json.dumps(surroundings(self.cohort, progress.executor)),
            "step": progress.step,
            "seconds": progress.seconds,
            "history": json.dumps(progress.history),
            "meter": progress.meter.state(),
            "students": self.cohort.state_dict(),
            "rng": [rng.state()],
        }
        with self._writing():
            checkpoint.save(self.run, state, best=best, world=self.world)
            self._write_corrupt()
        self._mark_saved()

    def save_epoch(self) -> None:
        """Write a checkpoint at the end of an epoch, then ``metrics.jsonl``.

        Raises:
            TrainingError: the folder cannot be written to.
        """
        history = self.progress.history
        self.save(best=best_epoch(history) == len(history))
        with self._writing():
            if self.world.main:
                self.run.write_metrics(history)

    def resume(self, path: Path) -> None:
        """Continue from the checkpoint ``path``, which becomes ``last.pt``.

        Nothing in it communicates, so an error of one process can be raised on all.

        Raises:
            UserError: it cannot be read, or is of another run, other data or another cohort.
        """
        state = checkpoint.load(path, self.cohort.numbers, verify=self.world.main)
        self._check(state, path)
        progress = self.progress
        rows = self.config.rows_of_pass()  # of all ranks
        mesh = changed_mesh(state["mesh"], self.world.mesh, rows, path)
        progress.history = checkpoint.history_of(self.run, state, path)
        progress.step, progress.seconds = state["step"], state["seconds"]
        epochs = len(progress.history)
        ended = progress.history[-1]["step"] if epochs else 0
        check_epochs(self.run.config, self.config, epochs, epochs + (progress.step > ended))
        known = self.run.changes
        self._changes = with_new(known, self.run.config, self.config, progress.step, epochs)
        with reading(path):
            self.cohort.load_state_dict(state["students"])
            progress.meter.load(state["meter"])
            if not mesh:
                rng.set_state(state["rng"][self.world.launch.rank])
        self._mark_saved()
        here = surroundings(self.cohort, progress.executor)
        new = in_words(self._changes[len(known) :])
        for change in (
            mesh,
            changed_surroundings(state, here, path),
            new and f"the run has {new}: {_LONGER}",
        ):
            if change:
                logger.info("%s", change)
        if not self.world.main:
            return
        if path != self.run.checkpoint("last"):
            link(path, self.run.checkpoint("last"))
        # the process may have been killed between the checkpoint and what is written after it
        history = progress.history
        self.run.write_metrics(history)
        ended = bool(history) and history[-1]["step"] == progress.step
        if ended and best_epoch(history) == len(history):
            checkpoint.mark_best(self.run)

    def write_results(self) -> None:
        """Write the students' final weights.

        Raises:
            TrainingError: the folder cannot be written to.
        """
        with self._writing():
            for place in range(max(map(len, self.world.shares))):
                self._write_students(place, "student")
                if self.config.ema != "off":
                    self._write_students(place, "ema")

    def _picked_config(self) -> TrainConfig:
        """Return the configuration with the executor in use, which a resumed run keeps."""
        return replace(self.config, executor=self.progress.executor)  # type: ignore[arg-type]

    def _check(self, state: checkpoint.State, path: Path) -> None:
        """Refuse a checkpoint of another run, or of other data."""
        checkpoint.check_run(self.run, state, path)
        if state["fingerprint"] != self.facts.fingerprint:
            what = "images" if self.facts.of_images else "rows"
            raise UserError(
                f"{self.run.folder} was trained on other {what} or labels than "
                f"--data {self.config.data} holds: give the data it was trained on"
            )

    def _mark_saved(self) -> None:
        self._saved_step, self._saved_at = self.progress.step, time.monotonic()

    def _write_students(self, place: int, which: str) -> None:
        """Let rank 0 write the final weights of one student of each row, or their average."""
        mine = None
        if place < len(self.cohort):
            student = self.cohort.students[place]
            weights = student.weights(which)
            if self.world.column == 0:
                mine = self.cohort.numbers[place], student.arch, weights
        for found in self.world.gather(mine) or ():
            if found is not None:
                number, arch, weights = found
                path = self.run.weights(number, averaged=which == "ema")
                save_student(path, weights, arch, self.facts, self.facts.view_of(number))

    def _write_corrupt(self) -> None:
        """List the files that any rank has skipped so far."""
        if self.corrupt is None:
            return
        mine = dict(zip(self.corrupt.names, self.corrupt.reasons.values(), strict=True))
        if (found := self.world.gather(mine)) is not None:
            self.run.write_corrupt({name: why for part in found for name, why in part.items()})

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn the errors of a full disk into one sentence; earlier checkpoints are whole."""
        try:
            yield
        except (OSError, RuntimeError, CheckpointError) as error:
            # torch.save turns an OSError into a RuntimeError
            if is_lost(error):
                raise
            found = TrainingError(
                f"{self.run.folder} cannot be written to at step {self.progress.step} "
                f"({reason(error)}): make room, then continue from step {self._saved_step} with "
                f"--resume {self.run.folder}"
            )
            raise (agreed(found) if isinstance(error, CheckpointError) else found) from error
