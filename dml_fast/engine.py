"""The cohort step. Students meet in one place only, the mutual loss of their detached logits.

for each k: z_k = student_k(x)
losses, grads = mutual loss of (z_1..z_K, y)         no autograd graph across students
for each k: z_k.backward(grad_k); optimizer_k.step()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dml_fast.cohort import Cohort
from dml_fast.loss import mutual_loss_and_grad, peer_divergence
from dml_fast.student import Student
from dml_fast.triplet import triplet_loss


@dataclass(frozen=True)
class StepResult:
    """What one step gave, for the A students that learned, on the device.

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


class Engine:
    """Trains a cohort, a step at a time, one student after the other.

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
    ) -> None:
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
            inputs: (N, ...) on the students' device; or K of them, one a student.
            target: (N,) classes or (N, C) probabilities.
            kl_scale: multiplies the weight of the mutual term (a ramp).
            learners: the students that learn, by default all.
            teacher: a student that does not learn and teaches alone, in place of the peers.
        """
        everyone = range(len(self.cohort))
        views = [inputs for _ in everyone] if isinstance(inputs, Tensor) else inputs
        chosen = list(learners or everyone)
        students = [self.cohort.students[k] for k in chosen]
        fixed = None if teacher is None else self.cohort.students[teacher].predict(views[teacher])
        embed = self.triplet_weight > 0
        logits = [
            student.forward(views[k], with_features=embed)
            for k, student in zip(chosen, students, strict=True)
        ]
        if self.update == "simultaneous":
            parts, grads = self._loss(students, logits, target, kl_scale, fixed)
            rows = [
                self._update(student, z, grad, target)
                for student, z, grad in zip(students, logits, grads, strict=True)
            ]
            triplet, skipped = (torch.stack(column) for column in zip(*rows, strict=True))
        else:
            turns = []
            for k, student in enumerate(students):
                parts, grads = self._loss(students, logits, target, kl_scale, fixed)
                turns.append(
                    [*(p[k] for p in parts), *self._update(student, logits[k], grads[k], target)]
                )
                logits[k] = student.predict(views[chosen[k]], training=True)
            *columns, triplet, skipped = (torch.stack(c) for c in zip(*turns, strict=True))
            parts = (columns[0], columns[1], columns[2], columns[3])
        losses, ce, kl, correct = parts
        return StepResult(losses + self.triplet_weight * triplet, ce, kl, triplet, correct, skipped)

    def _update(
        self, student: Student, logits: Tensor, grad: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update a student; its triplet loss, and whether the step was skipped."""
        if student.features is None:
            return logits.new_zeros((), dtype=torch.float32), student.update(logits, grad)
        term = triplet_loss(student.features, target, self.triplet_margin)
        skipped = student.update(logits, grad, self.triplet_weight * student.grad_scale * term)
        return term.detach(), skipped

    def _loss(
        self,
        students: list[Student],
        logits: list[Tensor],
        target: Tensor,
        kl_scale: float,
        fixed: Tensor | None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], list[Tensor]]:
        """(losses, ce, kl, correct), each (A,), and the gradient of each student's logits."""
        detached = [z.detach() for z in logits]
        peer_weight = None
        if fixed is not None:  # the teacher alone is heard
            peer_weight = fixed.new_zeros(len(students), len(students) + 1, dtype=torch.float32)
            peer_weight[:, -1] = 1.0
        weight = self.kl_weight * kl_scale
        losses, grads, stats = mutual_loss_and_grad(
            detached,
            target,
            kl_weight=weight,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            peer_reduction=self.peer_reduction,
            peer_weight=peer_weight,
            teacher_logits=None if fixed is None else [fixed],
            grad_scale=torch.stack([student.grad_scale for student in students]),
        )
        kl = stats.kl
        if self.method == "dml_e":
            peers = len(students) - 1 if self.peer_reduction == "sum" else 1
            spread = peers * self.temperature**2 * peer_divergence(detached, self.temperature)
            losses, kl = losses - weight * spread, kl - spread
        return (losses, stats.ce, kl, stats.correct), grads
