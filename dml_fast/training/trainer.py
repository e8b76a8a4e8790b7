"""A run from its first step to its last table: epochs, validation, checkpoints, stops."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from dml_fast import rng
from dml_fast.config import TrainConfig
from dml_fast.data import DataSet
from dml_fast.data.loaders import train_loader
from dml_fast.data.loaders.assemble import TrainBatch
from dml_fast.data.plan import Augmentation
from dml_fast.distributed.failure import is_lost
from dml_fast.distributed.world import World, agreed
from dml_fast.engine import Engine
from dml_fast.engine.choice import make_executor, pick
from dml_fast.engine.optim import lr_factor, ramp
from dml_fast.engine.precision import Precision
from dml_fast.errors import TrainingError, reason
from dml_fast.eval.validation import validate
from dml_fast.reporting.console import Reporter, logger
from dml_fast.runs import checkpoint
from dml_fast.runs.facts import DataFacts
from dml_fast.runs.files import link
from dml_fast.runs.folder import Run
from dml_fast.runs.history import best_epoch
from dml_fast.runs.weights import save_student
from dml_fast.training.build import build_cohort
from dml_fast.training.meter import Meter
from dml_fast.training.signals import StopRequest


class Trainer:
    """Trains a cohort in a run folder.

    Order and augmentation of the data are functions of (seed, epoch, step); all else that a step
    depends on is in the checkpoint. So a run that was stopped anywhere continues bit for bit.

    Args:
        config: of the run.
        run: its folder, which can be written to.
        data: what ``config`` says, opened.
        precision: device and type.
        reporter: where progress is shown.
        stop: asks to stop after a step.
        world: the processes that train together; by default there is one.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        data: DataSet,
        precision: Precision,
        reporter: Reporter,
        stop: StopRequest,
        world: World | None = None,
    ) -> None:
        self.world = world = world or World.alone(len(config.architectures))
        self.config, self.run, self.data = config, run, data
        self.precision, self.reporter, self.stop = precision, reporter, stop
        channels, *size = data.train.images.shape[1:]
        self.facts = DataFacts.of(data)
        self.loader = train_loader(
            data,
            Augmentation(
                pad=data.pad if config.augment else 0,
                flip=data.flip and config.augment,
                resized=config.resized_crop and config.augment,
                erasing=config.random_erasing,
                jitter=config.color_jitter,
                mixup=config.mixup,
                cutmix=config.cutmix,
            ),
            batch_size=config.batch_size // world.mesh.data,
            seed=rng.derive_seed(config.seed, "data"),
            device=precision.device,
            channels_last=config.channels_last,
            num_instances=config.num_instances if config.retrieval else 0,
            views=len(config.architectures) if config.views == "per-student" else 1,
            threads=config.data_threads,
            rank=world.column,
            ranks=world.mesh.data,
        )
        self.cohort = build_cohort(
            config,
            precision,
            num_classes=len(data.classes),
            in_channels=channels,
            image_size=(size[0], size[1]),
            world=world,
        )
        self.engine = Engine(
            self.cohort,
            method=config.method,
            kl_weight=config.kl_weight,
            temperature=config.temperature,
            label_smoothing=config.label_smoothing,
            peer_reduction=config.peer_reduction,
            update=config.update,
            triplet_weight=config.triplet_weight,
            triplet_margin=config.triplet_margin,
            executor=make_executor(config.executor, len(self.cohort), precision.device),
        )
        self.meter = Meter(len(self.cohort), precision.device, world)
        self.step = 0  # over the whole run
        self.seconds = 0.0  # of the epoch under way
        self.history: list[dict[str, Any]] = []
        self._saved = (0, time.monotonic())  # step and time of the newest checkpoint

    def describe(self) -> None:
        """Write ``config.json`` and say what is about to be trained."""
        mine = {
            k: {"arch": s.arch, "parameters": sum(p.numel() for p in s.model.parameters())}
            for k, s in zip(self.world.students, self.cohort, strict=True)
        }
        found = {k: v for part in self.world.all_gather(mine) for k, v in part.items()}
        self._students = [found[k] for k in range(self.world.total)]
        if self.world.main:
            self.run.describe(self.config, self.facts, self._students)
        self.reporter.start(self.config, self.data, self._students, self.precision, self.world)

    def disk_bytes(self) -> int:
        """Bytes that the run folder will need: three checkpoints, a spare one, and the weights."""
        tensors = [t for s in self.cohort for t in s.model.state_dict().values()]
        mine: int = sum(t.numel() * t.element_size() for t in tensors)
        weights: int = sum(self.world.all_gather(mine)) // self.world.mesh.data
        states = 2 if self.config.algorithm == "adamw" else 1
        return 4 * weights * (1 + states) + weights + 2**22

    def fit(self) -> bool:
        """Train until the end or until somebody asks to stop.

        Returns:
            Whether the run is complete.

        Raises:
            TrainingError: a student's gradients stay non-finite.
        """
        for student in self.cohort:
            student.model.train()
        total = self.config.total_epochs * self.loader.steps_per_epoch
        with self.reporter.progress(total, self.step):
            while len(self.history) < self.config.total_epochs:
                epoch = len(self.history)
                if not self._train(epoch):
                    self._save()
                    return False
                self._finish(epoch)
                if self.world.vote(self.stop.signal != 0, False)[0]:
                    return len(self.history) == self.config.total_epochs
        return True

    def _train(self, epoch: int) -> bool:
        """Go through what is left of an epoch; False if stopped before its end."""
        per_epoch = self.loader.steps_per_epoch
        learners, teacher = self._roles(epoch)
        start, before = time.monotonic(), self.seconds
        done = self.step - epoch * per_epoch
        for batch in self.loader.epoch(epoch, done):
            stop, overdue = self.world.vote(self.stop.signal != 0, self._overdue())
            if stop:
                return False
            if self.config.executor == "auto" and self._shows_most(learners):
                begun = time.monotonic()
                self._pick_executor(batch, learners, teacher)
                start += time.monotonic() - begun  # which was no training
            for student in self.cohort:
                student.set_lr(self._lr(self.step))
            result = self.engine.step(
                batch.inputs,
                batch.target,
                kl_scale=ramp(self._local_epoch(self.step), self.config.kl_warmup),
                learners=learners,
                teacher=teacher,
            )
            places = [i for i, k in enumerate(self.world.students) if k in learners]
            self.meter.add(result, len(batch.target), places)
            self.step += 1
            if self.step % self.config.log_every == 0 or self.step % per_epoch == 0:
                self._check_students()  # waits for the device, so the time below is the work's
            self.seconds = before + time.monotonic() - start
            if overdue or 0 < self.config.save_interval[0] <= self.step - self._saved[0]:
                self._save()
        return True

    def _shows_most(self, learners: Sequence[int]) -> bool:
        """Whether a trial is of the steps that most of the run consists of.

        A distillation's teacher learns alone at first, which on a CPU has nothing to share out.
        """
        alone = self.config.method == "distill" and self.precision.device.type == "cpu"
        return len(learners) > 1 or not alone

    def _pick_executor(
        self, batch: TrainBatch, learners: Sequence[int], teacher: int | None
    ) -> None:
        """Once a run, and for good: executors may differ in roundings, as numbers of threads do."""
        chosen = pick(self.engine, batch.inputs, batch.target, learners=learners, teacher=teacher)
        self.config = replace(self.config, executor=chosen.name)  # type: ignore[arg-type]
        with self._writing():
            if self.world.main:
                self.run.describe(self.config, self.facts, self._students)

    def _finish(self, epoch: int) -> None:
        """Validate, write the epoch's line, save."""
        scores, ensemble = validate(
            self.cohort, self.data, self.precision, self.config.channels_last
        )
        images = self.loader.steps_per_epoch * self.config.batch_size
        line = {
            "epoch": epoch + 1,
            "step": self.step,
            "seconds": round(self.seconds, 3),
            "images_per_s": round(images / self.seconds, 1),
            "lr": self._lr(self.step - 1),
            "students": [
                {
                    "arch": arch,
                    "loss": sums.loss,
                    "ce": sums.ce,
                    "kl": sums.kl,
                    **({"triplet": sums.triplet} if self.config.triplet_weight else {}),
                    "train_acc": sums.accuracy,
                    **score,
                    "skipped": sums.skipped,
                }
                for arch, sums, score in zip(
                    self.config.architectures, self.meter.read(), scores, strict=True
                )
            ],
            **{f"ensemble_{name}": value for name, value in ensemble.items()},
        }
        self.history.append(line)
        self.meter.start_epoch()
        self.seconds = 0.0
        self._save(best=best_epoch(self.history) == epoch + 1)
        with self._writing():
            if self.world.main:
                self.run.write_metrics(self.history)
        self.reporter.epoch(line, self.config.total_epochs)

    def finish(self) -> None:
        """Write the students' weights and curves, and show the last table."""
        from dml_fast.reporting.plots import plot_curves  # matplotlib takes a second to import
        from dml_fast.reporting.tables import show_run

        with self._writing():
            for place in range(max(map(len, self.world.shares))):
                self._write_students(place)
            if not self.world.main:
                return
            plot_curves(self.run.folder / "curves.png", {self.run.folder.name: self.history})
        show_run(self.history, best_epoch(self.history), self.run.folder)

    def _write_students(self, place: int) -> None:
        """The final weights of one student of each row, by rank 0."""
        mine = None
        if place < len(self.cohort):
            student = self.cohort.students[place]
            weights = student.weights()
            if self.world.column == 0:
                mine = self.world.students[place], student.arch, weights
        for one in self.world.gather(mine) or ():
            if one is not None:
                save_student(self.run.weights(one[0]), one[2], one[1], self.facts)

    def resume(self, state: dict[str, Any], path: Path) -> None:
        """Continue from the checkpoint that ``path`` held, which becomes ``last.pt``.

        Raises:
            UserError: it belongs to another cohort.
        """
        self.cohort.load_state_dict(state["students"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.history = json.loads(state["history"])
        self._saved = (self.step, time.monotonic())
        self.meter.load(state["meter"])
        if state["mesh"] == str(self.world.mesh):
            rng.set_state(state["rng"][self.world.launch.rank])
        else:
            logger.info(
                "the run was saved on a mesh of %s and goes on on %s: networks that draw random "
                "numbers (dropout) go on with other draws; all else is as it was",
                state["mesh"],
                self.world.mesh,
            )
        if not self.world.main:
            return
        if path != self.run.checkpoint("last"):
            link(path, self.run.checkpoint("last"))
        # a kill can fall between the checkpoint and what is written after it
        self.run.write_metrics(self.history)
        at_end_of_epoch = self.step == len(self.history) * self.loader.steps_per_epoch
        if self.history and at_end_of_epoch and best_epoch(self.history) == len(self.history):
            checkpoint.mark_best(self.run)

    def _roles(self, epoch: int) -> tuple[tuple[int, ...], int | None]:
        """Who learns in an epoch, and who teaches instead of the peers."""
        everyone = tuple(range(self.world.total))
        if self.config.method != "distill":
            return everyone, None
        return (everyone[:1], None) if epoch < self.config.epochs else (everyone[1:], 0)

    def _local_epoch(self, step: int) -> float:
        """Epochs done before a step, since the schedule began; distillation begins it twice."""
        return (step / self.loader.steps_per_epoch) % self.config.epochs

    def _lr(self, step: int) -> float:
        c = self.config
        return c.peak_lr * lr_factor(c.schedule, self._local_epoch(step), c.epochs, c.warmup)

    def _check_students(self) -> None:
        """Read the metrics from the device; stop if a student no longer learns."""
        sums = self.meter.read()
        for k, (arch, mine) in enumerate(zip(self.config.architectures, sums, strict=True)):
            if mine.in_a_row >= self.config.max_skipped:
                raise agreed(
                    TrainingError(
                        f"student {k} ({arch}) had non-finite gradients in its last "
                        f"{mine.in_a_row} steps, up to step {self.step}: lower --lr, or add "
                        f"--warmup; the newest checkpoint is in {self.run.folder}"
                    )
                )
        self.reporter.step(self.step, [mine.loss for mine in sums])

    def _overdue(self) -> bool:
        """Whether the newest checkpoint is older than ``--save-every`` seconds."""
        return 0 < self.config.save_interval[1] <= time.monotonic() - self._saved[1]

    def _save(self, best: bool = False) -> None:
        state = {
            "config": json.dumps(self.config.to_dict()),
            "fingerprint": self.data.fingerprint,
            "mesh": str(self.world.mesh),
            "step": self.step,
            "seconds": self.seconds,
            "history": json.dumps(self.history),
            "meter": self.meter.state(),
            "students": self.cohort.state_dict(),
            "rng": [rng.state()],
        }
        with self._writing():
            checkpoint.save(self.run, state, best=best, world=self.world)
            self._write_corrupt()
        self._saved = (self.step, time.monotonic())

    def _write_corrupt(self) -> None:
        """The files that any rank has skipped so far."""
        if (corrupt := self.data.corrupt) is None:
            return
        mine = dict(zip(corrupt.names, corrupt.reasons.values(), strict=True))
        if (found := self.world.gather(mine)) is not None:
            self.run.write_corrupt({name: why for part in found for name, why in part.items()})

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A disk that fills up ends the run in one sentence; what was saved is whole."""
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            # torch.save turns an OSError into a RuntimeError
            if is_lost(error):
                raise
            found = TrainingError(
                f"{self.run.folder} cannot be written to at step {self.step} ({reason(error)}): "
                f"make room, then continue from step {self._saved[0]} with "
                f"--resume {self.run.folder}"
            )
            raise (agreed(found) if isinstance(error, CheckpointException) else found) from error
