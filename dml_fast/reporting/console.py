"""What a person sees of a run under way: a bar on a terminal, and a line for each epoch."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dml_fast.errors import reason
from dml_fast.foreign import shown
from dml_fast.reporting.loggers import Logs
from dml_fast.runs.history import LABELS, MAP, EpochLine, of_pairs, percent, pixels, score_of

if TYPE_CHECKING:
    from dml_fast.config import TrainConfig
    from dml_fast.data import DataSet
    from dml_fast.distributed.world import World
    from dml_fast.engine.precision import Precision

logger = logging.getLogger("dml_fast")


class PlainConsole(Console):
    """A console that prints text as it is: names are no markup, no emoji and nothing to colour."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def on_broken_pipe(self) -> None:
        """Let the caller see the error; rich would end the process with exit code 1."""
        raise


class _OneLine(logging.Formatter):
    """Formats a message as one line that can be printed, whatever names are in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = shown(record.message)
        return super().formatMessage(record)


def set_up_logging(console: Console) -> None:
    """Send the package's messages to stderr, above the progress bar on a terminal."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format="%X")
        handler.setFormatter(_OneLine())
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_OneLine("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


@contextmanager
def at_the_end(what: str, again: str) -> Iterator[None]:
    """Let the work inside fail without failing the run, which is finished: say so in one line.

    Args:
        what: what the work makes.
        again: what the user can do to get it.
    """
    try:
        yield
    except Exception as error:
        logger.warning("%s: not written (%s); %s", what, reason(error), again)


@contextmanager
def progress(what: str, total: int, *, hidden: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr while inside, if it is a terminal and the bar is not ``hidden``.

    Yields:
        A function to call with how many of ``total`` are done.
    """
    console = PlainConsole(stderr=True)
    if hidden or not console.is_terminal:
        yield lambda done: None
        return
    with _bar(console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)


class Reporter:
    """Show a run on stderr as it proceeds; `tables.show_run` prints its last table.

    Args:
        logs: other places to which each epoch is written.
    """

    def __init__(self, logs: Logs | None = None) -> None:
        self.console = PlainConsole(stderr=True)
        set_up_logging(self.console)
        self._rows = "images"
        self._bar: tuple[Progress, Any] | None = None
        self.logs = logs or Logs()
        self._complete = False

    def start(
        self,
        config: TrainConfig,
        data: DataSet,
        students: Sequence[Mapping[str, Any]],
        precision: Precision,
        world: World,
    ) -> None:
        """Log what is about to be trained."""
        self._rows = config.row_name
        names = ", ".join(f"{s['arch']} ({s['parameters'] / 1e6:.2f}M)" for s in students)
        logger.info("%s: %d students: %s", config.method, len(students), names)
        if not world.single:
            logger.info("%s", world)
        if data.choice:
            logger.info("%s", data.choice)
        logger.info(
            "data %s: %d %s to train, %d to validate, %s; %s, %s",
            data.name,
            len(data.train),
            self._rows if data.features is None else "rows",
            len(data.val),
            "no test set" if data.test is None else f"{len(data.test)} to test",
            precision.device,
            precision,
        )

    @contextmanager
    def progress(self, total: int, done: int) -> Iterator[None]:
        """Show a bar while inside, on a terminal."""
        if not self.console.is_terminal:
            yield
            return
        with _bar(self.console) as bar:
            self._bar = bar, bar.add_task("training", total=total, completed=done)
            yield
        self._bar = None

    def step(self, step: int, losses: Sequence[float | None]) -> None:
        """Show the mean losses of the epoch so far."""
        if self._bar:
            text = " ".join("-" if loss is None else f"{loss:.3f}" for loss in losses)
            self._bar[0].update(self._bar[1], completed=step, description=f"loss {text}")

    def epoch(self, line: EpochLine, epochs: int) -> None:
        """Log one epoch's line of metrics."""
        students = line["students"]
        losses = " ".join("-" if s["loss"] is None else f"{s['loss']:.3f}" for s in students)
        logger.info(
            "epoch %d/%d  loss %s  %s  %.0f %s/s",
            line["epoch"],
            epochs,
            losses,
            _scores(line),
            line["images_per_s"],
            self._rows,
        )
        for k, student in enumerate(students):
            if student["skipped"]:
                logger.warning(
                    "student %d skipped %d updates in this epoch for non-finite gradients",
                    k,
                    student["skipped"],
                )
        self.logs.epoch(line)

    def completed(self) -> None:
        """Note that the run is complete, for the logs."""
        self._complete = True

    def close(self) -> None:
        """Flush what is still to be written."""
        self.logs.close(self._complete)


def _scores(line: EpochLine) -> str:
    """Return the validation scores of one epoch, in words."""
    students = line["students"]
    if score_of(line) is MAP:
        means = " ".join(percent(s["val_mAP"], 1) for s in students)
        firsts = " ".join(percent(s["val_rank1"], 1) for s in students)
        both = (
            f"{percent(line['ensemble_val_mAP'], 1)} and {percent(line['ensemble_val_rank1'], 1)}"
        )
        return f"val mAP {means} %, rank-1 {firsts} %  ensemble {both} %"
    if score_of(line) is LABELS:
        means = " ".join(percent(s["val_mAP"], 1) for s in students)
        return f"val mAP {means} %  ensemble {percent(line['ensemble_val_mAP'], 1)} %"
    if of_pairs(line):
        errors = " ".join(pixels(s["val_error_px"]) for s in students)
        return f"val error {errors} px  ensemble {pixels(line['ensemble_val_error_px'])} px"
    accuracies = " ".join(percent(s["val_acc"], 1) for s in students)
    return f"val {accuracies} %  ensemble {percent(line['ensemble_val_acc'], 1)} %"
