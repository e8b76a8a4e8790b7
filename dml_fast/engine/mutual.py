"""The mutual loss of a step: how students' detached logits become losses and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dml_fast.engine.cohort import Cohort
from dml_fast.engine.executor import Lesson
from dml_fast.engine.parts import denominators
from dml_fast.engine.small_loss import joint_loss, row_weights
from dml_fast.errors import UserError
from dml_fast.loss import mutual_loss, mutual_loss_and_grad, peer_divergence
from dml_fast.loss.bernoulli import two_classes
from dml_fast.loss.checks import check_distribution
from dml_fast.loss.problem import UNLABELLED_TARGET


class Mutual(NamedTuple):
    """What the mutual loss gave for H students: (H,) numbers, and H gradients (N, C) of logits."""

    losses: Tensor
    ce: Tensor
    kl: Tensor
    correct: Tensor
    labelled: Tensor
    kept: Tensor
    grads: list[Tensor]


class Taught(NamedTuple):
    """What M fixed teachers, which do not learn in this step, say about a batch.

    Attributes:
        logits: M of them, (N, C), detached.
        weight: (A, A + M) fp32 ``peer_weight`` of the loss, of A learners and then the teachers;
            None where all peers and all teachers count the same.
    """

    logits: tuple[Tensor, ...]
    weight: Tensor | None = None

    @classmethod
    def alone(cls, logits: Tensor, learners: int) -> Taught:
        """Return what one teacher (N, C) says that alone teaches the learners."""
        weight = logits.new_zeros(learners, learners + 1, dtype=torch.float32)
        weight[:, -1] = 1.0
        return cls((logits,), weight)

    @classmethod
    def by_averages(cls, logits: Sequence[Tensor], peer_reduction: str) -> Taught:
        """Return what the averages of A learners' weights, (N, C) each, say to all but their own.

        This is the mutual mean-teaching of Ge, Chen and Li (ICLR 2020, arXiv 2001.01526), whose
        averages compute as in training.
        """
        count = len(logits)
        peers = 1.0 - torch.eye(count, device=logits[0].device)
        if peer_reduction == "mean":
            peers = peers / max(1, count - 1)
        return cls(tuple(logits), torch.cat([torch.zeros_like(peers), peers], dim=1))


def check_labels(
    distribution: str, prior: Tensor | None, small_loss: float, class_weight: Tensor | None
) -> None:
    """Refuse an unknown distribution, and what needs rows of one class.

    Raises:
        UserError: which option, and what to do.
    """
    check_distribution(distribution)
    for name, given in (
        ("prior", prior is not None),
        ("small_loss", small_loss != 0),
        ("class_weight", class_weight is not None),
    ):
        if given and distribution == "bernoulli":
            raise UserError(
                f"{name} is for rows of one class, and with distribution='bernoulli' a row may "
                "have several: leave it out"
            )


@dataclass(frozen=True)
class MutualTerm:
    """Options of the mutual loss, as `dml_fast.engine.Engine` takes them.

    Attributes:
        method: ``dml``, ``dml_e``, ``independent`` or ``distill``.
        temperature: T.
        label_smoothing: of the cross-entropy.
        peer_reduction: ``mean`` or ``sum``.
        prior: (C,) added to all logits, or None.
        class_weight: (C,) of the cross-entropy, or None.
        small_loss: whether rows with a large joint loss are left out.
        class_dim: the dimension of the logits that has the classes.
        distribution: ``categorical`` or ``bernoulli``.
    """

    method: str
    temperature: float
    label_smoothing: float
    peer_reduction: str
    prior: Tensor | None
    class_weight: Tensor | None
    small_loss: bool
    class_dim: int
    distribution: str = "categorical"

    def __call__(
        self,
        logits: Mapping[int, Tensor],
        lesson: Lesson,
        taught: Taught | None,
        here: Sequence[int],
        cohort: Cohort,
    ) -> Mutual:
        """Return the mutual loss of those learners that this process updates next.

        Args:
            logits: (N, C), detached, of every learner that the loss compares, by number.
            lesson: of the step.
            taught: by fixed teachers, if there are any.
            here: the numbers of H of the learners.
            cohort: the students.
        """
        networks = [self._adjusted(z) for z in logits.values()]
        target = lesson.target
        if target.dim() == networks[0].dim():  # probabilities
            target = target.movedim(self.class_dim, -1)
        rows = [list(logits).index(k) for k in here]
        teachers = [] if taught is None else [self._adjusted(z) for z in taught.logits]
        peer_weight = None if taught is None else taught.weight
        scales = {k: cohort.student(k).grad_scale for k in here}
        if len(here) < len(logits):  # the others' gradients are not used
            one = next(iter(scales.values())).new_ones(())
            scales = {k: scales.get(k, one) for k in logits}
        options: dict[str, Any] = {
            "kl_weight": lesson.kl_weight,
            "temperature": self.temperature,
            "label_smoothing": self.label_smoothing,
            "class_weight": self.class_weight,
            "peer_reduction": self.peer_reduction,
            "peer_weight": peer_weight,
            "teacher_logits": teachers or None,
            "distribution": self.distribution,
            "class_dim": None if self.class_dim == -1 else -1,  # 1, say, leaves nothing to doubt
        }
        row_weight, *counts = self._kept(networks, target, lesson, options, cohort)
        losses, grads, stats = mutual_loss_and_grad(
            networks,
            target,
            **options,
            row_weight=row_weight,
            whole=denominators(lesson, networks[0].shape[-1], self.class_weight, cohort.world),
            grad_scale=torch.stack([scales[k] for k in logits]),
        )
        ce, kl, correct = stats.ce, stats.kl, stats.correct
        if self.method == "dml_e":
            heard = [*networks, *(teachers if peer_weight is None else ())]
            peers = len(heard) - 1 if self.peer_reduction == "sum" else 1
            if self.distribution == "bernoulli":
                heard = [two_classes(z) for z in heard]
            apart = peer_divergence(heard, self.temperature)[: len(networks)]
            spread = peers * self.temperature**2 * apart / lesson.parts
            losses, kl = losses - lesson.kl_weight * spread, kl - spread
        if len(here) < len(logits):  # a list of places would be copied to the device
            losses, ce, kl, correct = (
                torch.stack([part[r] for r in rows]) for part in (losses, ce, kl, correct)
            )
        mine = [
            grads[r].movedim(-1, self.class_dim).to(logits[k].dtype)
            for k, r in zip(here, rows, strict=True)
        ]
        labelled, kept = (count.expand(len(here)) for count in counts)
        return Mutual(losses, ce, kl, correct, labelled, kept, mine)

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Return logits (..., C), with the prior in at least single precision."""
        if not -logits.dim() <= self.class_dim < logits.dim():
            raise UserError(
                f"class_dim is {self.class_dim} and the logits have shape {tuple(logits.shape)}: "
                "name one of these"
            )
        logits = logits.movedim(self.class_dim, -1)
        if self.prior is None:
            return logits
        if self.prior.shape != logits.shape[-1:]:
            raise UserError(
                f"prior has {len(self.prior)} classes and the logits {logits.shape[-1]}: give a "
                "number for each"
            )
        return logits + self.prior.to(torch.promote_types(logits.dtype, torch.float32))

    def _kept(
        self,
        networks: list[Tensor],
        target: Tensor,
        lesson: Lesson,
        options: dict[str, Any],
        cohort: Cohort,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return weights (N,) where rows are left out; how many have a label; how many are kept."""
        if target.is_floating_point():
            every = target.new_full((), target.numel() // target.shape[-1], dtype=torch.float32)
            return None, every, every
        labelled = target != UNLABELLED_TARGET
        count = labelled.sum()
        if not self.small_loss:
            return None, count, count
        losses = mutual_loss(networks, target, **options, reduction="none")
        assert isinstance(losses, Tensor)
        joint = cohort.world.gather_rows(joint_loss(losses, labelled))
        start = cohort.world.column * len(target)
        weight = row_weights(joint, lesson.left_out)[start : start + len(target)]
        return weight, count, (labelled & (weight > 0)).sum()
