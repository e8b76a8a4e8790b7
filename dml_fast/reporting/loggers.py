"""Copies of a run's metrics for other programs: TensorBoard, Weights & Biases, MLflow, CSV.

All of them lie in the run folder, unless the program's own settings name a server. ``logs.json``
there says what each has: a resumed run goes on in the same place, and a line is logged once.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import netrc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypedDict
from urllib.parse import urlsplit

from dml_fast import rng
from dml_fast.errors import UserError, reason
from dml_fast.foreign import content, json_value, reading, shown, typed
from dml_fast.runs.files import atomic_write, writing
from dml_fast.runs.folder import Run
from dml_fast.runs.history import EpochLine, History

_log = logging.getLogger("dml_fast")

_PROJECT = "dml_fast"
_FIX = "make it a folder with room, or leave the option out"


class _Place(TypedDict):
    """What ``logs.json`` holds of a log: the run's name there, "" if it has none, and its end."""

    id: str
    step: int


class Log(Protocol):
    """One log of a run.

    Attributes:
        where: it is, for a person.
    """

    where: str

    def open(self, run: Run, options: Mapping[str, Any], known: str, there: History) -> str:
        """Begin, or go on.

        Args:
            run: the run.
            options: its configuration.
            known: what this method returned when the log was begun; "" for a new one.
            there: the lines that the log has.

        Returns:
            The run's name in the log, by which it goes on.

        Raises:
            UserError: its file cannot be written.
            Exception: any other; of what kind depends on the program.
        """

    def epoch(self, line: EpochLine) -> None:
        """Add a line; its step is above that of the line before."""

    def close(self, complete: bool) -> None:
        """End, by saying whether the run is complete."""


def values_of(line: EpochLine) -> dict[str, float | None]:
    """Return the numbers of a line by name: ``lr``, or ``loss/student_0`` of a student.

    What a student has skipped is not one of them.
    """
    found: dict[str, Any] = {}
    for name, value in line.items():
        if isinstance(value, list) and name != "students":  # a number for each student
            found |= {f"{name}/student_{k}": one for k, one in enumerate(value)}
        else:
            found[name] = value
    for k, student in enumerate(line["students"]):
        found |= {f"{name}/student_{k}": v for name, v in student.items() if name != "skipped"}
    return {name: v for name, v in found.items() if v is None or isinstance(v, int | float)}


def _numbers(line: EpochLine) -> dict[str, float]:
    """Return the numbers of a line that are there, but for its place in the run."""
    places = ("epoch", "step", "seconds")
    found = values_of(line).items()
    return {name: float(v) for name, v in found if v is not None and name not in places}


def _end(lines: History) -> int:
    """Return the step of the newest line; 0 for none."""
    return lines[-1]["step"] if lines else 0


class _TensorBoard:
    where = ""

    def open(self, run: Run, options: Mapping[str, Any], known: str, there: History) -> str:
        from torch.utils.tensorboard import SummaryWriter

        self.where = str(run.folder / "tensorboard")
        with writing(f"--log tensorboard: {self.where}", _FIX):
            # a killed run may have written events that it has forgotten, or its first ones twice
            self._writer = SummaryWriter(self.where, purge_step=_end(there) + 1)
        return ""

    def epoch(self, line: EpochLine) -> None:
        for name, value in _numbers(line).items():
            self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def close(self, complete: bool) -> None:
        self._writer.close()


class _Csv:
    """A table that is written anew with each line, so that a crash leaves a whole one."""

    where = ""

    def open(self, run: Run, options: Mapping[str, Any], known: str, there: History) -> str:
        self._path = run.folder / "metrics.csv"
        self.where = str(self._path)
        self._lines = list(there)
        with writing(f"--log csv: {self._path}", _FIX):
            self._write()
        return ""

    def epoch(self, line: EpochLine) -> None:
        self._lines.append(line)
        self._write()

    def close(self, complete: bool) -> None:
        pass

    def _write(self) -> None:
        rows = [values_of(line) for line in self._lines]
        names = dict.fromkeys(name for row in rows for name in row)
        text = io.StringIO()
        table = csv.DictWriter(text, list(names), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        with atomic_write(self._path) as file:
            file.write(text.getvalue().encode())


class _Wandb:
    where = ""

    def open(self, run: Run, options: Mapping[str, Any], known: str, there: History) -> str:
        offline = not os.environ.get("WANDB_MODE") and not _logged_in()
        if offline:
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            name=os.environ.get("WANDB_NAME") or run.folder.resolve().name,
            id=known or None,
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or str(run.folder),
            mode="offline" if offline else None,
            config=dict(options),
            settings=wandb.Settings(console="off", silent=True),
        )
        local = self._run.settings._offline or not self._run.url
        self.where = self._run.dir.removesuffix("/files") if local else str(self._run.url)
        found: str = self._run.id
        return found

    def epoch(self, line: EpochLine) -> None:
        self._run.log({"epoch": line["epoch"], **_numbers(line)}, step=line["step"])

    def close(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


def _logged_in() -> bool:
    """Return whether Weights & Biases has a key for its server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class _MLflow:
    where = ""

    def open(self, run: Run, options: Mapping[str, Any], known: str, there: History) -> str:
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        self.where = os.environ.get("MLFLOW_TRACKING_URI") or ""
        if not self.where:
            self.where = (run.folder / "mlruns").resolve().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else MLflow 3.17 refuses it
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=self.where)
        if known:
            self._client.update_run(known, status="RUNNING")
            self._id = known
            return known
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
        experiment = self._client.get_experiment_by_name(name)
        found = experiment.experiment_id if experiment else self._client.create_experiment(name)
        made = self._client.create_run(found, run_name=run.folder.resolve().name)
        self._id = made.info.run_id
        given = [Param(key, str(v)[:500]) for key, v in options.items() if v != ""]
        for first in range(0, len(given), 100):  # more at once are refused
            self._client.log_batch(self._id, params=given[first : first + 100])
        return str(self._id)

    def epoch(self, line: EpochLine) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        found = {"epoch": float(line["epoch"]), **_numbers(line)}.items()
        metrics = [Metric(name, value, now, line["step"]) for name, value in found]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, complete: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")


_KINDS: dict[str, Callable[[], Log]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "csv": _Csv,
}


class Logs:
    """All logs of a run. One that fails is given up in one line; the run goes on.

    Nothing that they do reaches the random numbers of the run.

    Args:
        names: of the logs.
    """

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self._open: dict[str, Log] = {}
        self._names = names
        self._places: dict[str, _Place] = {}
        self._file: Path | None = None

    def open(self, run: Run, options: Mapping[str, Any], history: History) -> None:
        """Open each, and add the lines that it lacks.

        Args:
            run: the run.
            options: its configuration.
            history: the lines of the epochs that are done.

        Raises:
            UserError: a file in the run folder cannot be written.
        """
        if not self._names:
            return
        self._file = run.folder / "logs.json"
        self._places = _places_in(self._file)
        for name in self._names:
            place = self._places.setdefault(name, {"id": "", "step": 0})
            # a run may go back to an older checkpoint
            place["step"] = min(place["step"], _end(history))
            there = [line for line in history if line["step"] <= place["step"]]
            with self._guarded(name):
                log = _KINDS[name]()
                place["id"] = log.open(run, options, place["id"], there)
                self._open[name] = log
                _log.info("--log %s: %s", name, shown(log.where))
        self._save()
        for line in history:
            self.epoch(line)

    def epoch(self, line: EpochLine) -> None:
        """Add a line to each that does not have it."""
        for name, log in list(self._open.items()):
            if line["step"] > self._places[name]["step"]:
                with self._guarded(name):
                    log.epoch(line)
                    self._places[name]["step"] = line["step"]
        self._save()

    def close(self, complete: bool) -> None:
        """End each, by saying whether the run is complete."""
        for name, log in list(self._open.items()):
            with self._guarded(name):
                log.close(complete)
        self._open = {}

    def _save(self) -> None:
        if self._open and self._file is not None:
            with self._guarded(*self._open), atomic_write(self._file) as file:
                file.write((json.dumps(self._places) + "\n").encode())

    @contextmanager
    def _guarded(self, *names: str) -> Iterator[None]:
        """Give logs up in one line where the work inside fails."""
        before = rng.state()
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            for name in names:
                self._open.pop(name, None)
            _log.warning(
                "--log %s: not written from here on (%s); metrics.jsonl has all of it, and "
                "--resume logs what is missing",
                ", ".join(names),
                reason(error),
            )
        finally:
            rng.set_state(before)


def _places_in(path: Path) -> dict[str, _Place]:
    """Read ``logs.json``; where it is damaged, one line says that logs begin anew."""
    if not os.path.lexists(path):
        return {}
    try:
        with reading(path):
            found: dict[str, _Place] = typed(
                json_value(content(path), path), dict[str, _Place], "it"
            )
            return found
    except UserError as error:
        _log.warning("%s; until then the logs of the run begin anew", error)
        return {}
