"""The runs of a comparison: ordinary run folders, several trained side by side."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dml_fast.comparison.methods import Contestant
from dml_fast.comparison.worker import Answer, Order
from dml_fast.config import flag
from dml_fast.config.files import check_same_run
from dml_fast.errors import TrainingError, UserError
from dml_fast.foreign import shown
from dml_fast.machine import cores
from dml_fast.reporting.console import progress
from dml_fast.runs.description import in_words
from dml_fast.runs.folder import Run
from dml_fast.training.signals import StopRequest

if TYPE_CHECKING:
    import torch

_LOOK_S = 0.5  # between two looks at the runs' progress
_CONTEXT = 1 << 29  # bytes that a process takes of a GPU beside its tensors


class Entry(NamedTuple):
    """One run of a comparison.

    Attributes:
        method: the name of what is compared.
        seed: its seed.
        run: its folder, ``METHOD-sSEED``.
        contestant: whose configuration it has.
    """

    method: str
    seed: int
    run: Run
    contestant: Contestant

    @property
    def complete(self) -> bool:
        """Whether it is measured, or its students' weights are written, training's last act."""
        students = range(len(self.contestant.config.architectures))
        return self.run.config_file.is_file() and (
            self.measures_file.is_file() or all(self.run.weights(k).is_file() for k in students)
        )

    @property
    def measures_file(self) -> Path:
        """What `dml_fast.comparison.measures` keeps of it."""
        return self.run.folder / "test.json"

    @property
    def epochs(self) -> int:
        """How many epochs it has done."""
        try:
            return len(self.run.metrics())
        except UserError:  # it has no description yet
            return 0


def entries(found: Sequence[Contestant], seeds: Sequence[int], folder: Path) -> list[Entry]:
    """Return the runs, seed by seed; those that are there must have the same options.

    Raises:
        UserError: one has others.
    """
    all_of_them = [
        Entry(one.name, seed, Run(folder / f"{one.name}-s{seed}"), one)
        for seed in seeds
        for one in found
    ]
    for entry in all_of_them:
        if entry.run.config_file.is_file():
            own = entry.run.config  # the folder may have been moved, with all that is in it
            wanted = replace(entry.contestant.config, seed=entry.seed, out=own.out)
            check_same_run(own, wanted, entry.run.folder)
            if (changed := in_words(entry.run.changes)) or own.patience != wanted.patience:
                what = changed or f"--patience {own.patience}, and not {wanted.patience}"
                raise UserError(
                    f"the run {entry.run.folder} has {what}: move it elsewhere to compare others "
                    "with a new one"
                )
    return all_of_them


@dataclass
class _Worker:
    """A process of `dml_fast.comparison.worker`, and what it trains."""

    process: subprocess.Popen[str]
    entry: Entry | None = None

    @classmethod
    def start(cls, threads: int) -> _Worker:
        command = [sys.executable, "-m", "dml_fast.comparison.worker"]
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        pipe = subprocess.PIPE
        return cls(
            # of its own session, so that the terminal's Ctrl-C comes to this process alone
            subprocess.Popen(
                command, stdin=pipe, stdout=pipe, text=True, env=environment, start_new_session=True
            )
        )

    def train(self, entry: Entry) -> None:
        self.entry = entry
        begun = entry.run.config_file.is_file()
        config = replace(entry.contestant.config, seed=entry.seed, out=str(entry.run.folder))
        order: Order = {
            "config": (entry.run.config if begun else config).to_dict(),
            "resume": str(entry.run.folder) if begun else "",
            "log": f"{entry.run.folder}.log",
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Answer:
        """Return what it says of its run; call this when there is something to read."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer: Answer = json.loads(line) if line else {"code": self.process.wait(), "gpu_bytes": 0}
        return answer


def train_all(wanted: Iterable[Entry], jobs: int, gpu: torch.device | None) -> int:
    """Train what is not complete, ``jobs`` runs at a time.

    Args:
        wanted: in the order in which to begin.
        jobs: how many; 0 for one for each core, or on a GPU as many as fit beside the first.
        gpu: on which they train; None for a CPU.

    Returns:
        0, or 128 + the signal that stopped all.

    Raises:
        TrainingError: a run failed; the others were stopped, and continue later.
    """
    wanted = list(wanted)
    todo = [entry for entry in wanted if not entry.complete]
    if not todo:
        return 0
    total = sum(entry.contestant.config.total_epochs for entry in wanted)
    count = max(1, min(jobs or (1 if gpu else cores()), len(todo)))
    with StopRequest() as stop, progress("epochs", total, hidden=False) as show:
        pool = _Pool(count, lambda: show(sum(entry.epochs for entry in wanted)), stop)
        try:
            pool.train(todo, gpu=None if jobs else gpu)
        finally:
            pool.close()
        return stop.exit_code


class _Pool:
    """Workers, each of which gets the next run when it is done with one."""

    def __init__(self, count: int, look: Callable[[], None], stop: StopRequest) -> None:
        self._look, self._stop = look, stop
        self._threads = max(1, cores() // count)
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        for _ in range(count):
            self._add()

    def _add(self) -> _Worker:
        worker = _Worker.start(self._threads)
        self._workers.append(worker)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
        return worker

    def train(self, todo: Sequence[Entry], gpu: torch.device | None) -> None:
        """Train all, or until a signal; for a GPU add workers once a run's memory is known."""
        left = list(todo)
        for worker in self._workers:
            worker.train(left.pop(0))
        told, failed = False, ""
        while any(worker.entry for worker in self._workers):
            for key, _ in self._selector.select(_LOOK_S):
                worker = key.data
                answer, entry = worker.answer(), worker.entry
                worker.entry = None
                if answer["code"] and not told:
                    failed = failed or _why(entry, answer["code"])
                    left.clear()
                if gpu and not told and not failed:
                    for _ in range(min(_room(answer["gpu_bytes"], gpu), len(left) - 1)):
                        self._add().train(left.pop(0))
                    gpu = None
                if left:
                    worker.train(left.pop(0))
                elif worker.process.poll() is not None:
                    self._selector.unregister(worker.process.stdout)
            self._look()
            if (self._stop.signal or failed) and not told:
                told = True
                left.clear()
                for worker in self._workers:
                    if worker.entry:
                        worker.process.send_signal(signal.SIGTERM)
        if failed:
            raise TrainingError(failed)

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.process.stdin.close()  # type: ignore[union-attr]
        for worker in self._workers:
            worker.process.wait()
            worker.process.stdout.close()  # type: ignore[union-attr]
        self._selector.close()


def _why(entry: Entry, code: int) -> str:
    log = Path(f"{entry.run.folder}.log")
    try:
        text = log.read_text(errors="replace").rstrip()
    except OSError:
        text = f"exit code {code}"
    last = text.rpartition("\n")[2]
    more = "what has trained is kept" if code == 2 else "the same command goes on"
    if "OutOfMemoryError" in last:
        more = f"the GPU's memory was full: the same command goes on with a smaller {flag('jobs')}"
    name = entry.run.folder.name
    return f"{name} failed ({shown(last)}): {shown(log)} has all of its output; {more}"


def _room(used: int, gpu: torch.device) -> int:
    """Return how many more runs fit on the GPU, each as large as one that used these bytes.

    That one's process gave its memory back, and needs as much for the next run.
    """
    import torch

    if not used:
        return 0
    free, _ = torch.cuda.mem_get_info(gpu)
    return max(0, min((free - used) // (used + _CONTEXT), cores() - 1))
