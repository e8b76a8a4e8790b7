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
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dml_fast.engine.class_weight import check_class_weight
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.executor import Executor, Lesson, Sequential, StepResult
from dml_fast.engine.features import FeatureLoss, check_feature_loss, checked_value
from dml_fast.engine.mutual import Mutual, MutualTerm, Taught, check_labels
from dml_fast.engine.parts import added, check_parts, split
from dml_fast.engine.peers import check_teach_with, exchanged, needed_exchange
from dml_fast.engine.prior import check_prior
from dml_fast.engine.roles import learners_of, views_of
from dml_fast.engine.small_loss import check_small_loss
from dml_fast.engine.student import Student
from dml_fast.engine.teacher import Teacher, check_teachers
from dml_fast.engine.together import backward
from dml_fast.errors import UserError, brief, check_choice, check_number, check_whole, first_line
from dml_fast.loss.checks import check_options

logger = logging.getLogger(__name__)


class _Passed(NamedTuple):
    """What a student's passes gave: logits, a loss on features, logits of the average."""

    logits: Tensor
    extra: Tensor | None = None
    heard: Tensor | None = None


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
        class_weight: (C,) weights of the cross-entropy, as of `torch.nn.CrossEntropyLoss`: its mean
            divides by the sum of the rows' weights. The mutual term has none.
        small_loss: the share of a batch's labelled rows that are left out of every loss: those
            with the largest joint loss (`dml_fast.engine.small_loss`), in [0, 1).
        teach_with: ``ema``: students are heard by the averages of their weights
            (`dml_fast.engine.averaging.Average`), which compute as in training, and not by
            themselves (``student``); for method dml.
        clip_norm: the largest norm of each student's gradient, as of
            `torch.nn.utils.clip_grad_norm_`, above 0; None: any.
        teachers: fixed networks that teach every student beside its peers, with ``dml`` and
            ``dml_e``; with them one student is enough.
        parts: into how many equal parts a batch is divided. They run one after the other, each
            with BatchNorm and ``feature_loss`` of its own, before one update: memory is that of a
            part, all else is of the whole batch.
        class_dim: the dimension of the logits that has the classes: -1, or 1 for (N, C, H, W).
        distribution: ``categorical``, one class for each row; or ``bernoulli``, for targets (N, C)
            of labels that do not exclude each other.
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
        class_weight: Tensor | None = None,
        small_loss: float = 0.0,
        teach_with: str = "student",
        clip_norm: float | None = None,
        teachers: Sequence[Teacher] = (),
        parts: int = 1,
        class_dim: int = -1,
        distribution: str = "categorical",
        executor: Executor | None = None,
    ) -> None:
        if not isinstance(cohort, Cohort):
            raise UserError(f"the cohort of an engine is {brief(cohort)}: give Cohort(students)")
        check_choice("method", method, ("dml", "dml_e", "independent", "distill"))
        check_choice("update", update, ("simultaneous", "alternating"))
        check_options(kl_weight, temperature, label_smoothing, peer_reduction, "mean")
        if clip_norm is not None:
            check_number("clip_norm", clip_norm, "a number above 0", lambda x: 0 < x < math.inf)
        check_whole("class_dim", class_dim, -1)
        check_labels(distribution, prior, small_loss, class_weight)
        if executor is not None and not isinstance(executor, Executor):
            raise UserError(
                f"executor is {brief(executor)}: give an object, such as Threads({len(cohort)}) "
                "of dml_fast.engine"
            )
        check_feature_loss(feature_loss, feature_weight, cohort)
        check_small_loss(small_loss, method, update, feature_weight)
        check_teach_with(teach_with, method, update, len(teachers), cohort)
        check_parts(parts, update, small_loss)
        if update == "alternating" and cohort.exchange is not None:
            raise UserError(
                "update is alternating, for which one process must hold all students, and they "
                "are shared out: choose simultaneous"
            )
        if update == "alternating" and cohort.together is not None:
            raise UserError(
                "update is alternating and the students are compiled together, of whom each then "
                "waits for the one before it: compile each student, or choose simultaneous"
            )
        if update == "alternating" and executor is not None and executor.name != Sequential.name:
            logger.info("updates are alternating: the executor %s is not used", executor)
        if method in ("dml", "dml_e"):
            cohort.check_distinct()
        self.cohort = cohort
        self.method = method
        self.kl_weight = 0.0 if method == "independent" else kl_weight
        self.update = update
        self.feature_loss = feature_loss
        self.feature_weight = feature_weight
        self.small_loss = small_loss
        self.teach_with = teach_with
        self.clip_norm = clip_norm
        self.teachers = check_teachers(teachers, method, cohort)
        self.parts = parts
        self.term = MutualTerm(
            method,
            temperature,
            label_smoothing,
            peer_reduction,
            None if prior is None else check_prior(prior, _device(cohort)),
            None
            if class_weight is None
            else check_class_weight(class_weight, small_loss, _device(cohort)),
            small_loss > 0,
            class_dim,
            distribution,
        )
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
        accumulate: bool = False,
    ) -> StepResult:
        """Update every learner once on one batch.

        Args:
            inputs: what each model is called with: (N, ...) on the students' device, or anything
                else that all of them take. A mapping is given as keywords, and a tuple or list as
                positions, to a ``forward`` that takes them so.
            target: (N,) classes or (N, C) probabilities; (N, T) and (N, T, C) for logits
                (N, T, C), and so on.
            views: whether ``inputs`` are a sequence of K such, one for each student.
            kl_scale: multiplies the weight of the mutual term (a ramp).
            small_loss_scale: multiplies the share of rows to leave out (a ramp), in [0, 1].
            learners: the numbers of the students that learn; by default all K.
            teacher: the number of a student that does not learn and alone teaches the learners.
            accumulate: keep the gradients and update nobody: the next step without this updates by
                the mean over its batch and those kept. BatchNorm sees each batch alone.

        Raises:
            UserError: the number of views is not K, a learner or the teacher is no student, a
                model returned no logits, or the loss refuses them (`dml_fast.loss.mutual_loss`).
        """
        if accumulate and self.update == "alternating":
            raise UserError(
                "accumulate keeps gradients, and alternating students learn from one another's "
                "updates: leave it out, or choose simultaneous"
            )
        count = self.cohort.total
        given = views_of(inputs, count) if views else (inputs,) * count
        chosen = learners_of(learners, teacher, count, self.method)
        if teacher is not None and self.teachers:
            raise UserError("the step has a teacher and the engine fixed ones: leave out one")
        if self.small_loss and target.is_floating_point():
            raise UserError(
                "small_loss is for rows of one class, and the target has probabilities: leave out "
                "small_loss, or what blends labels, such as mixup"
            )
        if self.term.distribution == "bernoulli" and not target.is_floating_point():
            target = target.float()
        left_out = self.small_loss * small_loss_scale
        weight = self.kl_weight * kl_scale
        lesson = Lesson(given, target, weight, chosen, teacher, left_out, accumulate)
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

    def state_dict(self) -> dict[str, Any]:
        """Return what goes on where this is: students, optimizers with options, and scalers.

        Data, schedulers and random generators are the caller's.

        Raises:
            UserError: gradients have accumulated, which would be lost.
        """
        if any(student.pending for student in self.cohort):
            raise UserError(
                "gradients have accumulated, which a state does not hold: take it after a step "
                "without accumulate"
            )
        students = self.cohort.state_dict()
        for state, student in zip(students, self.cohort, strict=True):
            groups = student.optimizer.state_dict()["param_groups"]
            state["optimizer"]["param_groups"] = groups
        return {"students": students}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned.

        Raises:
            UserError: it is of other architectures.
        """
        self.cohort.load_state_dict(state["students"])

    def _step(self, lesson: Lesson, executor: Executor) -> StepResult:
        """Let all learn from one snapshot of predictions, part by part of the batch."""
        return added([self._part(part, executor) for part in split(lesson, self.parts)])

    def _part(self, lesson: Lesson, executor: Executor) -> StepResult:
        """Run the passes of a part of a batch; after the last one, update."""
        here = [k for k in lesson.learners if k in self.cohort.numbers]
        students = [self.cohort.student(k) for k in here]
        taught = self._taught(lesson)
        count = len(students)
        together, made = self.cohort.together, None
        if together and students:
            inputs = [lesson.inputs[k] for k in here]
            made = together(students, inputs, self.feature_loss is not None)

        def work(k: int) -> _Passed:
            if k < count:
                ready = None if made is None else made[k]
                return self._forward(students[k], lesson, lesson.inputs[here[k]], ready)
            return _Passed(self.teachers[k - count](lesson.inputs))

        teachers = self.teachers if here else ()
        found = executor.fork_in_order([*students, *teachers], work)
        passes = found[:count]
        if teachers:
            taught = Taught(tuple(one.logits for one in found[count:]))
        logits = {k: one.logits.detach() for k, one in zip(here, passes, strict=True)}
        heard = {k: z for k, (*_, z) in zip(here, passes, strict=True) if z is not None}
        if exchange := needed_exchange(self.cohort, lesson):
            logits, heard, taught = exchanged(exchange, logits, heard, taught, lesson)
        if not here:
            return StepResult.empty(lesson.target.device)
        if heard:
            taught = Taught.by_averages([heard[k] for k in logits], self.term.peer_reduction)
        mutual = self.term(logits, lesson, taught, here, self.cohort)
        if made is not None:
            parts = lesson.parts
            ends = [
                end
                for student, (logits, extra, _), grad in zip(
                    students, passes, mutual.grads, strict=True
                )
                for end in student.ends(logits, grad, extra, self.feature_weight / parts)
            ]
            backward(students, ends, Fraction(1, parts))
        updates = executor.fork(
            students,
            lambda k: self._update(
                students[k], passes[k], None if made is not None else mutual.grads[k], lesson
            ),
        )
        return self._result(mutual, updates)

    def _alternating_step(self, lesson: Lesson) -> StepResult:
        """Let each learn from predictions that the updates before its own have refreshed."""
        students = {k: self.cohort.student(k) for k in lesson.learners}
        if not students:
            return StepResult.empty(lesson.target.device)
        taught = self._taught(lesson)
        if self.teachers:
            taught = Taught(tuple(one(lesson.inputs) for one in self.teachers))
        passes = {k: self._forward(one, lesson, lesson.inputs[k]) for k, one in students.items()}
        logits = {k: one.logits.detach() for k, one in passes.items()}
        turns = []
        for k, student in students.items():
            mutual = self.term(logits, lesson, taught, [k], self.cohort)
            update = self._update(student, passes[k], mutual.grads[0], lesson)
            turns.append(self._result(mutual, [update]))
            logits[k] = student.predict(lesson.inputs[k], training=True)
        return StepResult.joined(turns)

    def _forward(self, student: Student, lesson: Lesson, inputs: Any, ready: Any = None) -> _Passed:
        """Run the passes of a student; ``ready`` is what the first gave, if it has been run.

        One thread makes them: autograd numbers the nodes of each thread apart, and adds gradients
        up in an order that depends on these numbers.
        """
        extra = heard = None
        with student.deferring(not lesson.last):
            if self.feature_loss is None:
                logits = student.forward(inputs) if ready is None else student.logits_of(ready)
            else:
                features, logits = ready or student.features_and_logits(inputs)
        if self.feature_loss is not None:
            extra = checked_value(self.feature_loss(features, lesson.target), self.feature_loss)
        if self.teach_with == "ema" and lesson.teacher is None:
            heard = student.predict(inputs, training=True, weights="ema")
        return _Passed(logits, extra, heard)

    def _update(
        self, student: Student, passed: _Passed, grad: Tensor | None, lesson: Lesson
    ) -> tuple[Tensor, Tensor]:
        """Update a student; return its loss on features, and whether the step was skipped.

        ``grad`` is None where the backward pass has been run.
        """
        logits, extra, _ = passed
        parts = lesson.parts
        if grad is not None:
            with student.deferring(not lesson.last):
                weight, share = self.feature_weight / parts, Fraction(1, parts)
                student.backward(logits, grad, extra, weight, share)
        none = logits.new_zeros((), dtype=torch.float32)
        goes_on = lesson.accumulate or not lesson.last
        skipped = none.bool() if goes_on else student.update(self.clip_norm)
        if extra is None:
            return none, skipped
        return extra.detach() if parts == 1 else extra.detach() / parts, skipped

    def _taught(self, lesson: Lesson) -> Taught | None:
        """Return what the teacher says, if it is in this process."""
        if (k := lesson.teacher) is None or k not in self.cohort.numbers:
            return None
        logits = self.cohort.student(k).predict(lesson.inputs[k])
        return Taught.alone(logits, len(lesson.learners))

    def _result(self, mutual: Mutual, updates: Sequence[tuple[Tensor, Tensor]]) -> StepResult:
        extra, skipped = (torch.stack(column) for column in zip(*updates, strict=True))
        losses, ce, kl, correct, labelled, kept, _ = mutual
        losses = losses + self.feature_weight * extra
        return StepResult(losses, ce, kl, extra, correct, labelled, kept, skipped)


def _device(cohort: Cohort) -> torch.device:
    """Return where the students are."""
    return next(cohort.students[0].model.parameters()).device
