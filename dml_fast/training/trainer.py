"""The training loop: epochs, roles, learning rates, validation, and when to stop."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from dml_fast.config import TrainConfig
from dml_fast.data import DataSet
from dml_fast.data.loaders.assemble import Loader
from dml_fast.distributed.world import agreed
from dml_fast.engine import Engine, Precision
from dml_fast.engine.choice import pick
from dml_fast.engine.optim import lr_factor, ramp
from dml_fast.errors import TrainingError
from dml_fast.eval.validation import validate
from dml_fast.foreign import shown
from dml_fast.reporting.console import Reporter, at_the_end, logger
from dml_fast.reporting.tables import show_run
from dml_fast.runs.history import EpochLine, History, best_epoch, out_of_patience
from dml_fast.training.extra import extra_of
from dml_fast.training.saving import Progress, Saver
from dml_fast.training.signals import StopRequest
from dml_fast.training.watch import HashWatch


def draw_curves(path: Path, label: str, history: History) -> None:
    """Write the PNG of a run's curves."""
    from dml_fast.reporting.plots import plot_curves  # takes a second to import

    plot_curves(path, {label: history})


@dataclass(frozen=True)
class Trainer:
    """Trains a cohort and saves it.

    Order and augmentation of the data are functions of (seed, epoch, step); all else that a step
    depends on is in the checkpoint. So a run that was stopped anywhere continues bit for bit.

    Attributes:
        config: of the run.
        data: to validate on.
        precision: device and type.
        loader: of the training images.
        engine: of the cohort.
        progress: how far the run is.
        saver: writes this progress and the students into the run's folder.
        reporter: where progress is shown.
        stop: asks to stop after a step.
        watch: of a run with MIHash.
    """

    config: TrainConfig
    data: DataSet
    precision: Precision
    loader: Loader
    engine: Engine
    progress: Progress
    saver: Saver
    reporter: Reporter
    stop: StopRequest
    watch: HashWatch | None

    def fit(self) -> bool:
        """Train until the end, or until a signal, ``--max-time`` or ``--max-steps`` stops it.

        Returns:
            Whether the run is complete.

        Raises:
            TrainingError: a student's gradients stay non-finite, or the disk is full.
        """
        for student in self.engine.cohort:
            student.model.train()
        epochs, progress = self.config.total_epochs, self.progress
        ended = self._ended()
        with self.reporter.progress(epochs * self.loader.steps_per_epoch, progress.step):
            while not ended:
                if not self._train_epoch():
                    if not self.saver.saved:
                        self.saver.save()
                    return False
                self._end_epoch()
                ended = self._ended()
                stop = self.engine.cohort.world.vote(self._asked_to_stop(), False)[0]
                if not ended and (stop or self._at_limit()):
                    return False
        return True

    def finish(self, *, brief: bool = False) -> None:
        """Write the students' weights and curves, and show the last table.

        Curves or a table that fail are named in one line each.

        Args:
            brief: whether to write the weights alone.

        Raises:
            TrainingError: the weights cannot be written.
        """
        self.saver.write_results()
        self.reporter.completed()
        if brief or not self.saver.world.main:
            return
        history, folder = self.progress.history, self.saver.run.folder
        later = f"python -m dml_fast.report {folder} gives it"
        curves = folder / "curves.png"
        with at_the_end(str(curves), later):
            draw_curves(curves, folder.name, history)
        with at_the_end("the table of results", later):
            config = self.config
            show_run(history, best_epoch(history), folder, config.shows_f1, config.row_name)

    def close(self) -> None:
        """Stop the loader's threads and flush what is still to be written."""
        self.loader.close()
        self.reporter.close()

    def whereabouts(self) -> str:
        """Say how far the run is and how to continue it, to be appended to an error."""
        return (
            f", at step {self.progress.step}; continue from the newest checkpoint with "
            f"--resume {shown(self.saver.run.folder)}"
        )

    def _train_epoch(self) -> bool:
        """Train for what is left of an epoch; return False if stopped before its end."""
        progress, world = self.progress, self.engine.cohort.world
        epoch, per_epoch = len(progress.history), self.loader.steps_per_epoch
        learners, teacher = self._roles(epoch)
        places = [i for i, k in enumerate(self.engine.cohort.numbers) if k in learners]
        kl_warmup = self.config.kl_warmup
        assert kl_warmup != "auto"  # the configuration is settled
        start = time.monotonic() - progress.seconds
        for batch in self.loader.epoch(epoch, progress.step - epoch * per_epoch):
            stop, overdue = world.vote(self._asked_to_stop(), self.saver.seconds_due())
            if stop or self._at_limit():
                return False
            if progress.executor == "auto" and self._worth_a_trial(learners):
                begun = time.monotonic()
                chosen = pick(
                    self.engine,
                    batch.inputs,
                    batch.target,
                    views=isinstance(batch.inputs, tuple),
                    learners=learners,
                    teacher=teacher,
                )
                # for good, as executors may differ in roundings, like numbers of threads
                progress.executor = chosen.name
                self.saver.describe()
                start += time.monotonic() - begun  # the trial trained nothing
            rates = self._lrs(progress.step)
            for k, student in zip(self.engine.cohort.numbers, self.engine.cohort, strict=True):
                student.set_lr(rates[k])
            result = self.engine.step(
                batch.inputs,
                batch.target,
                views=isinstance(batch.inputs, tuple),
                kl_scale=ramp(self._local_epoch(progress.step), kl_warmup),
                small_loss_scale=ramp(
                    self._local_epoch(progress.step), self.config.small_loss_warmup(per_epoch)
                ),
                learners=learners,
                teacher=teacher,
            )
            progress.meter.add(result, len(batch.target), places)
            if self.watch:
                self.watch.add(batch.target)
            progress.step += 1
            if progress.step % self.config.log_every == 0 or progress.step % per_epoch == 0:
                self._check_students()  # waits for the device, so the time below is the work's
            progress.seconds = time.monotonic() - start
            if overdue or self.saver.steps_due():
                self.saver.save()
        return True

    def _asked_to_stop(self) -> bool:
        """Return whether a signal or, by the clock of rank 0, ``--max-time`` asks to stop."""
        return self.stop.signal != 0 or (self.saver.world.main and self.stop.overdue)

    def _at_limit(self) -> bool:
        """Return whether the steps of ``--max-steps`` are done."""
        return 0 < self.config.max_steps <= self.progress.step

    def _ended(self) -> bool:
        """Return whether the run is complete: by its epochs, or by ``--patience``.

        Ranks go by what rank 0 has measured.
        """
        history, patience = self.progress.history, self.config.patience
        if len(history) >= self.config.total_epochs:
            return True
        if not patience or not self.saver.world.from_main(
            lambda: out_of_patience(history, patience)
        ):
            return False
        logger.info(
            "--patience %d: no epoch since %d is better, so the run ends after epoch %d of %d",
            patience,
            best_epoch(history),
            len(history),
            self.config.total_epochs,
        )
        return True

    def _end_epoch(self) -> None:
        """Validate, write the epoch's line, save."""
        config, progress = self.config, self.progress
        scores, ensemble = validate(
            self.engine.cohort,
            self.data,
            self.precision,
            config.channels_last,
            config.val_protocol,
            config.weights,
        )
        images = self.loader.steps_per_epoch * config.batch_size
        rates = self._lrs(progress.step - 1)
        extra = extra_of(config).key
        students = [
            {
                "arch": arch,
                "loss": sums.loss,
                "ce": sums.ce,
                "kl": sums.kl,
                **({extra: sums.extra} if extra else {}),
                **({"kept": sums.kept} if config.small_loss else {}),
                "train_acc": sums.accuracy,
                **score,
                "skipped": sums.skipped,
            }
            for arch, sums, score in zip(
                config.architectures, progress.meter.read(), scores, strict=True
            )
        ]
        line = {
            "epoch": len(progress.history) + 1,
            "step": progress.step,
            "seconds": round(progress.seconds, 3),
            "images_per_s": round(images / progress.seconds, 1),
            "lr": rates[0] if len({*rates}) == 1 else rates,
            "students": students,
            **{f"ensemble_{name}": value for name, value in ensemble.items()},
        }
        finished = cast(EpochLine, line)  # mypy cannot follow keys that only some runs have
        progress.end_epoch(finished)
        self.saver.save_epoch()
        self.reporter.epoch(finished, config.total_epochs)
        if self.watch:
            self.watch.end_epoch(finished["epoch"])

    def _worth_a_trial(self, learners: tuple[int, ...]) -> bool:
        """Return whether a step is like most steps of the run.

        A distillation's teacher learns alone at first, which on a CPU leaves nothing to share out.
        """
        cpu_distillation = self.config.method == "distill" and self.precision.device.type == "cpu"
        return len(learners) > 1 or not cpu_distillation

    def _roles(self, epoch: int) -> tuple[tuple[int, ...], int | None]:
        """Return the students that learn in an epoch, and the one that teaches them, if any."""
        students = tuple(range(self.engine.cohort.total))
        if self.config.method != "distill":
            return students, None
        return (students[:1], None) if epoch < self.config.epochs else (students[1:], 0)

    def _local_epoch(self, step: int) -> float:
        """Return the epochs since the schedule began; a distillation begins it twice."""
        return (step / self.loader.steps_per_epoch) % self.config.epochs

    def _lrs(self, step: int) -> list[float]:
        """Return the learning rate of each of the K students."""
        c = self.config
        factor = lr_factor(c.schedule, self._local_epoch(step), c.epochs, c.warmup)
        return [peak * factor for peak in c.peak_lrs]

    def _check_students(self) -> None:
        """Read the metrics from the device; stop if a student no longer learns."""
        progress = self.progress
        sums = progress.meter.read()
        for k, (arch, mine) in enumerate(zip(self.config.architectures, sums, strict=True)):
            if mine.in_a_row >= self.config.max_skipped:
                raise agreed(
                    TrainingError(
                        f"student {k} ({arch}) had non-finite gradients in its last "
                        f"{mine.in_a_row} steps, up to step {progress.step}: lower --lr, or add "
                        f"--warmup; the newest checkpoint is in {self.saver.run.folder}"
                    )
                )
        if self.watch:
            self.watch.look(progress.step, sums)
        self.reporter.step(progress.step, [mine.loss for mine in sums])
