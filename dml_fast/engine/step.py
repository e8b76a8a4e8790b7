"""The cohort step. Students meet in one place only, the mutual loss of their detached logits.

fork, for each k: z_k = student_k(x); join
losses, grads = mutual loss of (z_1..z_K, y)         no autograd graph across students
fork, for each k: z_k.backward(grad_k); optimizer_k.step(); join

An executor (`dml_fast.engine.executor`) decides where each student's work between a fork and its
join runs. Where the students are in several processes, the first join is an all-gather of their
logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dml_fast.distributed.world import agreed
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.executor import Executor, Sequential
from dml_fast.engine.student import Student
from dml_fast.errors import UserError
from dml_fast.loss import mutual_loss_and_grad, peer_divergence
from dml_fast.loss.triplet import triplet_loss


@dataclass(frozen=True)
class StepResult:
    """What one step gave, for the A students of this process that learned, on the device.

    Attributes:
        losses: (A,) float, ce + kl_weight * kl + triplet_weight * triplet.
        ce: (A,) float, cross-entropy.
        kl: (A,) float, the mutual term before its weight.
        triplet: (A,) float, the triplet loss before its weight; 0 where it has none.
        correct: (A,) labelled rows whose class was predicted.
        skipped: (A,) bool, whether the update was skipped for a gradient that is not finite.
    """

    losses: Tensor
    ce: Tensor
    kl: Tensor
    triplet: Tensor
    correct: Tensor
    skipped: Tensor


@dataclass(frozen=True)
class Lesson:
    """What a step works on.

    Attributes:
        inputs: one (N, ...) a student, whether or not it learns; often one tensor K times.
        target: (N,) classes or (N, C) probabilities.
        kl_weight: of the mutual term in this step.
        learners: the A students that learn.
        teacher: the one that teaches alone, or None.
    """

    inputs: tuple[Tensor, ...]
    target: Tensor
    kl_weight: float | Tensor
    learners: tuple[int, ...]
    teacher: int | None = None


class Engine:
    """Trains a cohort, a step at a time.

    Args:
        cohort: the students.
        method: ``dml`` (Zhang et al. 2018, eq. 3 to 6), ``dml_e`` (its gradient with constant
            targets and simultaneous updates is dml's; only the reported KL differs),
            ``independent`` (no KL) or ``distill`` (a teacher's KL only).
        kl_weight: weight of the mutual term.
        temperature: T of the mutual term.
        label_smoothing: of the cross-entropy.
        peer_reduction: ``mean`` (the paper) or ``sum`` over the peers.
        update: ``simultaneous``, or ``alternating`` as in the paper's Algorithm 1.
        triplet_weight: weight of each student's own triplet loss, for students that embed
            (`dml_fast.models.embedding.EmbeddingNet`).
        triplet_margin: its margin.
        executor: runs the students, by default one after the other. With ``alternating`` updates
            it has nothing to overlap and is not used.
    """

    def __init__(
        self,
        cohort: Cohort,
        *,
        method: str = "dml",
        kl_weight: float = 1.0,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
        peer_reduction: str = "mean",
        update: str = "simultaneous",
        triplet_weight: float = 0.0,
        triplet_margin: float = 0.3,
        executor: Executor | None = None,
    ) -> None:
        if update == "alternating" and cohort.world.mesh.cohort > 1:
            raise agreed(
                UserError(
                    "--update alternating refreshes predictions one student after the other, in "
                    f"one process, and --mesh {cohort.world.mesh} has {cohort.world.mesh.cohort} "
                    f"rows: give --mesh 1x{cohort.world.launch.size}, or --update simultaneous"
                )
            )
        if method in ("dml", "dml_e"):
            cohort.check_distinct()
        self.cohort = cohort
        self.method = method
        self.kl_weight = 0.0 if method == "independent" else kl_weight
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.peer_reduction = peer_reduction
        self.update = update
        self.triplet_weight = triplet_weight
        self.triplet_margin = triplet_margin
        self.executor = executor or Sequential()

    def step(
        self,
        inputs: Tensor | Sequence[Tensor],
        target: Tensor,
        *,
        kl_scale: float = 1.0,
        learners: Sequence[int] | None = None,
        teacher: int | None = None,
    ) -> StepResult:
        """Update every learner once on one batch.

        Args:
            inputs: (N, ...) on the students' device, or K of these, one view a student.
            target: (N,) classes or (N, C) probabilities.
            kl_scale: multiplies the weight of the mutual term (a ramp).
            learners: the students that learn, by default all.
            teacher: a student that does not learn and teaches alone, in place of the peers.

        Raises:
            UserError: not one view a student.
        """
        count = self.cohort.world.total
        views = (inputs,) * count if isinstance(inputs, Tensor) else tuple(inputs)
        if len(views) != count:
            raise UserError(
                f"a step got {len(views)} views of its images and the cohort has {count} students: "
                "give one tensor, or one a student"
            )
        lesson = Lesson(
            views,
            target,
            self.kl_weight * kl_scale,
            tuple(learners or range(count)),
            teacher,
        )
        if self.update == "alternating":
            return self._alternating_step(lesson)
        return self.executor.run(self._step, lesson, self.cohort)

    def _step(self, lesson: Lesson, executor: Executor) -> StepResult:
        """All learn from one snapshot of predictions."""
        here = [k for k in lesson.learners if k in self.cohort.world.students]
        students = [self._student(k) for k in here]
        fixed = self._taught(lesson)
        passes = executor.fork_in_order(
            students, lambda k: self._forward(students[k], lesson, lesson.inputs[here[k]])
        )
        logits = {k: z.detach() for k, (z, _) in zip(here, passes, strict=True)}
        if self._exchanges(lesson):
            logits, fixed = self._exchanged(logits, fixed, lesson)
        if not here:
            nothing = torch.zeros(0, device=lesson.target.device)
            return StepResult(nothing, nothing, nothing, nothing, nothing, nothing.bool())
        parts, grads = self._loss(logits, lesson, fixed, here)
        rows = executor.fork(students, lambda k: self._update(students[k], *passes[k], grads[k]))
        triplet, skipped = (torch.stack(column) for column in zip(*rows, strict=True))
        return self._result(parts, triplet, skipped)

    def _student(self, number: int) -> Student:
        world = self.cohort.world
        return self.cohort.students[world.students.index(number)]

    def _exchanges(self, lesson: Lesson) -> bool:
        """Whether students of other ranks are heard; without teaching their KL is shown."""
        heard = len(lesson.learners) > 1 or lesson.teacher is not None
        return heard and self.cohort.world.exchange is not None

    def _exchanged(
        self, mine: dict[int, Tensor], fixed: Tensor | None, lesson: Lesson
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """The logits of all learners, and the teacher's, on every rank."""
        exchange, teacher = self.cohort.world.exchange, lesson.teacher
        assert exchange is not None
        if teacher is not None and fixed is not None:
            mine = {**mine, teacher: fixed}
        everyone = exchange(mine)
        fixed = None if teacher is None else everyone[teacher]
        return {k: everyone[k] for k in lesson.learners}, fixed

    def _alternating_step(self, lesson: Lesson) -> StepResult:
        """Each learns from predictions that its predecessors' updates have refreshed."""
        learners = lesson.learners
        fixed = self._taught(lesson)
        passes = {k: self._forward(self._student(k), lesson, lesson.inputs[k]) for k in learners}
        logits = {k: z.detach() for k, (z, _) in passes.items()}
        turns = []
        for k in learners:
            parts, (grad,) = self._loss(logits, lesson, fixed, [k])
            update = self._update(self._student(k), *passes[k], grad)
            turns.append([*(part[0] for part in parts), *update])
            logits[k] = self._student(k).predict(lesson.inputs[k], training=True)
        *columns, triplet, skipped = (torch.stack(c) for c in zip(*turns, strict=True))
        return self._result((columns[0], columns[1], columns[2], columns[3]), triplet, skipped)

    def _forward(
        self, student: Student, lesson: Lesson, inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, and the triplet loss of the same pass if there is one.

        Both by one thread: autograd numbers the nodes of each thread on its own, and adds up
        gradients in an order that depends on these numbers.
        """
        logits = student.forward(inputs, with_features=self.triplet_weight > 0)
        if student.features is None:
            return logits, None
        return logits, triplet_loss(student.features, lesson.target, self.triplet_margin)

    def _update(
        self, student: Student, logits: Tensor, triplet: Tensor | None, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update a student; its triplet loss, and whether the step was skipped."""
        skipped = student.update(logits, grad, triplet, self.triplet_weight)
        if triplet is None:
            return logits.new_zeros((), dtype=torch.float32), skipped
        return triplet.detach(), skipped

    def _taught(self, lesson: Lesson) -> Tensor | None:
        """The teacher's logits, if it is in this process."""
        if (k := lesson.teacher) is None or k not in self.cohort.world.students:
            return None
        return self._student(k).predict(lesson.inputs[k])

    def _result(
        self, parts: tuple[Tensor, Tensor, Tensor, Tensor], triplet: Tensor, skipped: Tensor
    ) -> StepResult:
        losses, ce, kl, correct = parts
        return StepResult(losses + self.triplet_weight * triplet, ce, kl, triplet, correct, skipped)

    def _loss(
        self,
        logits: dict[int, Tensor],
        lesson: Lesson,
        fixed: Tensor | None,
        here: Sequence[int],
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], list[Tensor]]:
        """The mutual loss of all learners, of which this process goes on with some.

        Args:
            logits: (N, C), detached, of every learner that is heard, by number.
            lesson: of the step.
            fixed: (N, C) of a teacher.
            here: H of the learners.

        Returns:
            (losses, ce, kl, correct), each (H,), and H gradients of logits.
        """
        everyone = list(logits.values())
        rows = [list(logits).index(k) for k in here]
        peer_weight = None
        if fixed is not None:  # the teacher alone is heard
            peer_weight = fixed.new_zeros(len(everyone), len(everyone) + 1, dtype=torch.float32)
            peer_weight[:, -1] = 1.0
        scales = {k: self._student(k).grad_scale for k in here}
        if len(here) < len(logits):  # the others' gradients are not used
            one = next(iter(scales.values())).new_ones(())
            scales = {k: scales.get(k, one) for k in logits}
        losses, grads, stats = mutual_loss_and_grad(
            everyone,
            lesson.target,
            kl_weight=lesson.kl_weight,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            peer_reduction=self.peer_reduction,
            peer_weight=peer_weight,
            teacher_logits=None if fixed is None else [fixed],
            grad_scale=torch.stack([scales[k] for k in logits]),
        )
        kl = stats.kl
        if self.method == "dml_e":
            peers = len(everyone) - 1 if self.peer_reduction == "sum" else 1
            spread = peers * self.temperature**2 * peer_divergence(everyone, self.temperature)
            losses, kl = losses - lesson.kl_weight * spread, kl - spread
        parts = losses, stats.ce, kl, stats.correct
        if len(here) < len(logits):
            parts = tuple(torch.stack([part[r] for r in rows]) for part in parts)  # type: ignore[assignment]
        return parts, [grads[r] for r in rows]
