"""The cohort step. Students meet in one place only: the mutual loss of their detached logits.

fork, for each k: z_k = student_k(x); join
losses, grads = mutual loss of (z_1..z_K, y)         no autograd graph across students
fork, for each k: z_k.backward(grad_k); optimizer_k.step(); join

An executor (`dml_fast.engine.executor`) decides where each student's work between a fork and its
join runs. Where the students are in several processes, the first join is an all-gather of their
logits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dml_fast.engine.cohort import Cohort
from dml_fast.engine.executor import Executor, Lesson, Sequential, StepResult
from dml_fast.engine.features import FeatureLoss, check_feature_loss, checked_value
from dml_fast.engine.prior import check_prior
from dml_fast.engine.small_loss import check_small_loss, joint_loss, row_weights
from dml_fast.engine.student import Student
from dml_fast.errors import UserError, brief, check_choice, first_line
from dml_fast.loss import mutual_loss, mutual_loss_and_grad, peer_divergence
from dml_fast.loss.checks import check_options
from dml_fast.loss.problem import UNLABELLED_TARGET

logger = logging.getLogger(__name__)


class _Mutual(NamedTuple):
    """What the mutual loss gave for H students: (H,) numbers, and H gradients (N, C) of logits."""

    losses: Tensor
    ce: Tensor
    kl: Tensor
    correct: Tensor
    labelled: Tensor
    kept: Tensor
    grads: list[Tensor]


class Engine:
    """Trains a cohort step by step.

    Args:
        cohort: the students.
        method: ``dml`` (Zhang et al. 2018, eq. 3 to 6), ``dml_e`` (its gradient with constant
            targets and simultaneous updates is dml's; only the reported KL differs),
            ``independent`` (no KL) or ``distill`` (a teacher's KL only).
        kl_weight: weight of the mutual term, a number or a 0-d tensor.
        temperature: T of the mutual term.
        label_smoothing: of the cross-entropy.
        peer_reduction: ``mean`` (the paper) or ``sum`` over the peers.
        update: ``simultaneous``, or ``alternating`` as in the paper's Algorithm 1, for which this
            process must hold all students.
        feature_loss: each student's own loss on its features (`dml_fast.engine.FeatureLoss`), such
            as `dml_fast.MIHashLoss`, for students that give features
            (`dml_fast.models.embedding.EmbeddingNet`).
        feature_weight: its weight, above 0 where there is such a loss.
        prior: (C,) logarithms of the classes' shares, added to the logits of students and teacher
            before every loss, and not in evaluation, which is then balanced (logit adjustment:
            Menon et al., ICLR 2021).
        small_loss: the share of a batch's labelled rows that are left out of every loss: those
            with the largest joint loss (`dml_fast.engine.small_loss`), in [0, 1).
        executor: runs the students, by default one after the other; ``alternating`` updates have
            nothing to overlap and do not use it.

    Raises:
        UserError: an option has an unknown name, a value out of range or another type, or the
            students are identical.
    """

    def __init__(
        self,
        cohort: Cohort,
        *,
        method: str = "dml",
        kl_weight: float | Tensor = 1.0,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
        peer_reduction: str = "mean",
        update: str = "simultaneous",
        feature_loss: FeatureLoss | None = None,
        feature_weight: float = 0.0,
        prior: Tensor | None = None,
        small_loss: float = 0.0,
        executor: Executor | None = None,
    ) -> None:
        if not isinstance(cohort, Cohort):
            raise UserError(f"the cohort of an engine is {brief(cohort)}: give Cohort(students)")
        check_choice("method", method, ("dml", "dml_e", "independent", "distill"))
        check_choice("update", update, ("simultaneous", "alternating"))
        check_options(kl_weight, temperature, label_smoothing, peer_reduction, "mean")
        if executor is not None and not isinstance(executor, Executor):
            raise UserError(
                f"executor is {brief(executor)}: give an object, such as Threads({len(cohort)}) "
                "of dml_fast.engine"
            )
        check_feature_loss(feature_loss, feature_weight, cohort)
        check_small_loss(small_loss, method, update, feature_weight)
        if update == "alternating" and cohort.exchange is not None:
            raise UserError(
                "update is alternating, for which one process must hold all students, and they "
                "are shared out: choose simultaneous"
            )
        if update == "alternating" and executor is not None and executor.name != Sequential.name:
            logger.info("updates are alternating: the executor %s is not used", executor)
        if method in ("dml", "dml_e"):
            cohort.check_distinct()
        self.cohort = cohort
        self.method = method
        self.kl_weight = 0.0 if method == "independent" else kl_weight
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.peer_reduction = peer_reduction
        self.update = update
        self.feature_loss = feature_loss
        self.feature_weight = feature_weight
        self.prior = None if prior is None else check_prior(prior, _device(cohort))
        self.small_loss = small_loss
        self.executor = executor or Sequential()

    def step(
        self,
        inputs: Any,
        target: Tensor,
        *,
        views: bool = False,
        kl_scale: float = 1.0,
        small_loss_scale: float = 1.0,
        learners: Sequence[int] | None = None,
        teacher: int | None = None,
    ) -> StepResult:
        """Update every learner once on one batch.

        Args:
            inputs: what each model is called with: (N, ...) on the students' device, or anything
                else that all of them take, such as a tuple of tensors.
            target: (N,) classes or (N, C) probabilities.
            views: whether ``inputs`` are a sequence of K such, one for each student.
            kl_scale: multiplies the weight of the mutual term (a ramp).
            small_loss_scale: multiplies the share of rows to leave out (a ramp), in [0, 1].
            learners: the numbers of the students that learn; by default all K.
            teacher: the number of a student that does not learn and alone teaches the learners.

        Raises:
            UserError: the number of views is not K, a learner or the teacher is no student, a
                model returned no logits, or the loss refuses them (`dml_fast.loss.mutual_loss`).
        """
        count = self.cohort.total
        given = self._views(inputs) if views else (inputs,) * count
        chosen = self._roles(range(count) if learners is None else learners, teacher)
        if self.small_loss and target.is_floating_point():
            raise UserError(
                "small_loss is for rows of one class, and the target has probabilities: leave out "
                "small_loss, or what blends labels, such as mixup"
            )
        left_out = self.small_loss * small_loss_scale
        lesson = Lesson(given, target, self.kl_weight * kl_scale, chosen, teacher, left_out)
        try:
            if self.update == "alternating":
                return self._alternating_step(lesson)
            return self.executor.run(self._step, lesson, self.cohort)
        except (TypeError, AttributeError) as error:
            if views or not isinstance(inputs, list | tuple) or len(inputs) != count:
                raise
            raise UserError(
                f"a model does not take {brief(inputs)} as its inputs ({first_line(error)[:100]}): "
                "give views=True if these are the inputs of each student"
            ) from error

    def _views(self, inputs: Any) -> tuple[Any, ...]:
        """Return the inputs of each of the K students."""
        if not isinstance(inputs, list | tuple):
            raise UserError(
                f"a step with views=True got {brief(inputs)}: give a list of the inputs of each "
                "student"
            )
        if len(inputs) != self.cohort.total:
            raise UserError(
                f"a step with views=True got {len(inputs)} views and the cohort has "
                f"{self.cohort.total} students: give one for each"
            )
        return tuple(inputs)

    def _roles(self, learners: Iterable[int], teacher: int | None) -> tuple[int, ...]:
        """Return the learners; refuse those, and a teacher, that a step cannot have."""
        count = self.cohort.total
        chosen = tuple(learners) if isinstance(learners, Iterable) else None
        known = {int(k) for k in chosen or () if k in range(count)}
        if chosen is None or len(known) < len(chosen):
            raise UserError(
                f"the learners are {learners}: give different numbers from 0 to {count - 1}"
            )
        if teacher is not None and (teacher in chosen or teacher not in range(count)):
            raise UserError(
                f"the teacher is {teacher}: give a number from 0 to {count - 1} of a student that "
                "does not learn"
            )
        if self.method == "distill" and teacher is None and len(chosen) > 1:
            raise UserError(
                "method is distill and several students learn without a teacher: give teacher=0 "
                "and the others as learners"
            )
        return tuple(int(k) for k in chosen)

    def _step(self, lesson: Lesson, executor: Executor) -> StepResult:
        """Let all learn from one snapshot of predictions."""
        here = [k for k in lesson.learners if k in self.cohort.numbers]
        students = [self.cohort.student(k) for k in here]
        fixed = self._taught(lesson)
        passes = executor.fork_in_order(
            students, lambda k: self._forward(students[k], lesson, lesson.inputs[here[k]])
        )
        logits = {k: z.detach() for k, (z, _) in zip(here, passes, strict=True)}
        if self._exchanges(lesson):
            logits, fixed = self._exchanged(logits, fixed, lesson)
        if not here:
            return StepResult.empty(lesson.target.device)
        mutual = self._loss(logits, lesson, fixed, here)
        updates = executor.fork(
            students, lambda k: self._update(students[k], *passes[k], mutual.grads[k])
        )
        return self._result(mutual, updates)

    def _exchanges(self, lesson: Lesson) -> bool:
        """Return whether logits of other ranks are needed; without teaching, their KL is shown."""
        needed = len(lesson.learners) > 1 or lesson.teacher is not None
        return needed and self.cohort.exchange is not None

    def _exchanged(
        self, mine: dict[int, Tensor], fixed: Tensor | None, lesson: Lesson
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """Return the logits of all learners, and the teacher's, on every rank."""
        exchange, teacher = self.cohort.exchange, lesson.teacher
        assert exchange is not None
        if teacher is not None and fixed is not None:
            mine = {**mine, teacher: fixed}
        found = exchange(mine)
        fixed = None if teacher is None else found[teacher]
        return {k: found[k] for k in lesson.learners}, fixed

    def _alternating_step(self, lesson: Lesson) -> StepResult:
        """Let each learn from predictions that the updates before its own have refreshed."""
        students = {k: self.cohort.student(k) for k in lesson.learners}
        if not students:
            return StepResult.empty(lesson.target.device)
        fixed = self._taught(lesson)
        passes = {k: self._forward(one, lesson, lesson.inputs[k]) for k, one in students.items()}
        logits = {k: z.detach() for k, (z, _) in passes.items()}
        turns = []
        for k, student in students.items():
            mutual = self._loss(logits, lesson, fixed, [k])
            update = self._update(student, *passes[k], *mutual.grads)
            turns.append(self._result(mutual, [update]))
            logits[k] = student.predict(lesson.inputs[k], training=True)
        return StepResult.joined(turns)

    def _forward(
        self, student: Student, lesson: Lesson, inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits, and the loss on the features of the same pass if there is one.

        One thread makes both: autograd numbers the nodes of each thread apart, and adds gradients
        up in an order that depends on these numbers.
        """
        if self.feature_loss is None:
            return student.forward(inputs), None
        features, logits = student.features_and_logits(inputs)
        return logits, checked_value(self.feature_loss(features, lesson.target), self.feature_loss)

    def _update(
        self, student: Student, logits: Tensor, extra: Tensor | None, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update a student; return its loss on features, and whether the step was skipped."""
        skipped = student.update(logits, grad, extra, self.feature_weight)
        if extra is None:
            return logits.new_zeros((), dtype=torch.float32), skipped
        return extra.detach(), skipped

    def _taught(self, lesson: Lesson) -> Tensor | None:
        """Return the teacher's logits, if it is in this process."""
        if (k := lesson.teacher) is None or k not in self.cohort.numbers:
            return None
        return self.cohort.student(k).predict(lesson.inputs[k])

    def _result(self, mutual: _Mutual, updates: Sequence[tuple[Tensor, Tensor]]) -> StepResult:
        extra, skipped = (torch.stack(column) for column in zip(*updates, strict=True))
        losses, ce, kl, correct, labelled, kept, _ = mutual
        losses = losses + self.feature_weight * extra
        return StepResult(losses, ce, kl, extra, correct, labelled, kept, skipped)

    def _loss(
        self,
        logits: dict[int, Tensor],
        lesson: Lesson,
        fixed: Tensor | None,
        here: Sequence[int],
    ) -> _Mutual:
        """Return the mutual loss of those learners that this process updates next.

        Args:
            logits: (N, C), detached, of every learner that the loss compares, by number.
            lesson: of the step.
            fixed: (N, C) of a teacher.
            here: the numbers of H of the learners.
        """
        networks = [self._adjusted(z) for z in logits.values()]
        rows = [list(logits).index(k) for k in here]
        peer_weight = None
        if fixed is not None:  # only the teacher teaches
            peer_weight = fixed.new_zeros(len(networks), len(networks) + 1, dtype=torch.float32)
            peer_weight[:, -1] = 1.0
        scales = {k: self.cohort.student(k).grad_scale for k in here}
        if len(here) < len(logits):  # the others' gradients are not used
            one = next(iter(scales.values())).new_ones(())
            scales = {k: scales.get(k, one) for k in logits}
        options: dict[str, Any] = {
            "kl_weight": lesson.kl_weight,
            "temperature": self.temperature,
            "label_smoothing": self.label_smoothing,
            "peer_reduction": self.peer_reduction,
            "peer_weight": peer_weight,
            "teacher_logits": None if fixed is None else [self._adjusted(fixed)],
        }
        row_weight, *counts = self._kept(networks, lesson, options)
        losses, grads, stats = mutual_loss_and_grad(
            networks,
            lesson.target,
            **options,
            row_weight=row_weight,
            grad_scale=torch.stack([scales[k] for k in logits]),
        )
        ce, kl, correct = stats.ce, stats.kl, stats.correct
        if self.method == "dml_e":
            peers = len(networks) - 1 if self.peer_reduction == "sum" else 1
            spread = peers * self.temperature**2 * peer_divergence(networks, self.temperature)
            losses, kl = losses - lesson.kl_weight * spread, kl - spread
        if len(here) < len(logits):  # a list of places would be copied to the device
            losses, ce, kl, correct = (
                torch.stack([part[r] for r in rows]) for part in (losses, ce, kl, correct)
            )
        mine = [grads[r].to(logits[k].dtype) for k, r in zip(here, rows, strict=True)]
        labelled, kept = (count.expand(len(here)) for count in counts)
        return _Mutual(losses, ce, kl, correct, labelled, kept, mine)

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Return logits (N, C) with the prior, in at least single precision."""
        if self.prior is None:
            return logits
        if self.prior.shape != logits.shape[-1:]:
            raise UserError(
                f"prior has {len(self.prior)} classes and the logits {logits.shape[-1]}: give a "
                "number for each"
            )
        return logits + self.prior.to(torch.promote_types(logits.dtype, torch.float32))

    def _kept(
        self, networks: list[Tensor], lesson: Lesson, options: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return weights (N,) where rows are left out; how many have a label; how many are kept."""
        target = lesson.target
        if target.is_floating_point():
            every = target.new_full((), len(target), dtype=torch.float32)
            return None, every, every
        labelled = target != UNLABELLED_TARGET
        count = labelled.sum()
        if not self.small_loss:
            return None, count, count
        losses = mutual_loss(networks, target, **options, reduction="none")
        assert isinstance(losses, Tensor)
        world = self.cohort.world
        joint = world.gather_rows(joint_loss(losses, labelled))
        start = world.column * len(target)
        weight = row_weights(joint, lesson.left_out)[start : start + len(target)]
        return weight, count, (labelled & (weight > 0)).sum()


def _device(cohort: Cohort) -> torch.device:
    """Return where the students are."""
    return next(cohort.students[0].model.parameters()).device
