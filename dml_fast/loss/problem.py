"""What a backend of the mutual loss takes and returns.

Letters: K students, M teachers, L = K + M distributions, N rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

UNLABELLED_TARGET = -100
"""The target of a row without a label: the `ignore_index` that the loss has by default."""

Losses: TypeAlias = Tensor | tuple[Tensor, ...]  # of K students: stacked, or separate


class MutualStats(NamedTuple):
    """Statistics of one call, on the device of the logits: reading one waits for that device.

    ``ce``, ``kl``, ``correct`` and ``finite`` are always present. The others cost extra passes
    and are None unless ``return_stats=True``; they compare softmax(z / temperature), without the
    factor T². A student with a row of unusable logits has NaN in its own statistics (its row and
    its column of ``pairwise_kl``); the mutual information of that row leaves the student out.

    Attributes:
        ce: (K,) mean cross-entropy, at temperature 1.
        kl: (K,) mean divergence from the peers, including the factor T²: with
            ``reduction="mean"`` the losses are ``ce_weight * ce + kl_weight * kl``.
        correct: (K,) int64, the number of labelled rows whose largest logit is the target's (for
            a target of probabilities: the most probable class's). With ``distribution`` bernoulli
            the number of rows whose labels are all right: a logit above 0 says that it is there.
        finite: (K,) bool, whether every row of the student was usable.
        pairwise_kl: (K, K), entry [i, j] is the mean over rows of KL(p_i || p_j), never negative.
        entropy: (K,) mean entropy of p_k, in nats.
        mutual_information: () H(mean_k p_k) - mean_k H(p_k) in nats, averaged over rows: how much
            the students disagree (BALD; Houlsby et al. 2011, arXiv 1112.5745).
        row_mutual_information: (*batch) the same for each row.
    """

    ce: Tensor
    kl: Tensor
    correct: Tensor
    finite: Tensor
    pairwise_kl: Tensor | None = None
    entropy: Tensor | None = None
    mutual_information: Tensor | None = None
    row_mutual_information: Tensor | None = None


@dataclass(slots=True)  # a frozen one takes four times as long to build
class Problem:
    """The checked arguments of a call: all tensors are on one device and have these shapes.

    Attributes:
        students: K tensors (N, C), fp16, bf16, fp32 or fp64, any strides.
        teachers: M tensors (N, C), any floating dtype.
        dtype: the dtype to compute and accumulate in: fp32, or fp64 for fp64 students.
        batch_shape: the shape whose product is N.
        index: (N,) integer classes as given; None for a target of probabilities.
        ignore_index: the class of rows without a label; None when every row is known to have one.
        soft: (N, C) target probabilities in ``dtype``; None for a target of classes.
        class_weight: (C,) in ``dtype``, or None.
        row_weight: (N,) in ``dtype``, or None.
        peer_weight: (K, L) in ``dtype`` with a zero diagonal; None for uniform weights.
        kl_weight: a number, or a 0-d tensor that is never read on the host.
        temperature: T > 0.
        label_smoothing: in [0, 1].
        peer_reduction: "mean" or "sum", of the uniform weights.
        reduction: "mean", "sum" or "none", over rows.
        whole: where these rows are part of a larger batch, the two denominators of its means:
            its labelled rows (the sum of their class weights, if given), and its rows that have a
            divergence; each is a number or a () tensor. Otherwise None.
        grad_scale: a number, or a () or (K,) tensor, that multiplies the gradients of
            `Backend.solve`; None for 1.
        ce_weight: weight of the cross-entropy in the losses, finite and at least 0.
        distribution: "categorical"; or "bernoulli", of labels that do not exclude each other: then
            ``soft`` has their probabilities, with the smoothing in them.
        divergence: "forward", "reverse", "symmetric" or "jsd".
        beta: in (0, 1), the peers' share of the mixture of "jsd".
        kl_rows: "all"; or "labelled", if rows without a label have no divergence and there may be
            such rows. The second denominator is then the number of labelled rows.
        in_place: whether `Backend.solve` may write the gradients over the students' logits, each
            of which is contiguous and nobody's else.
    """

    students: tuple[Tensor, ...]
    teachers: tuple[Tensor, ...]
    dtype: torch.dtype
    batch_shape: torch.Size
    index: Tensor | None
    ignore_index: int | None
    soft: Tensor | None
    class_weight: Tensor | None
    row_weight: Tensor | None
    peer_weight: Tensor | None
    kl_weight: float | Tensor
    temperature: float
    label_smoothing: float
    peer_reduction: str
    reduction: str
    whole: tuple[float | Tensor, int | Tensor] | None = None
    grad_scale: float | Tensor | None = None
    ce_weight: float = 1.0
    distribution: str = "categorical"
    in_place: bool = False
    divergence: str = "forward"
    beta: float = 0.5
    kl_rows: str = "all"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (K, N, C)."""
        rows, classes = self.students[0].shape
        return len(self.students), rows, classes

    @property
    def device(self) -> torch.device:
        """Return the device of all tensors, and of the solution."""
        return self.students[0].device

    def count_labels(self) -> float | Tensor:
        """Return the denominator of the mean cross-entropy.

        It is the number of labelled rows, or the sum of their class weights.
        """
        if self.index is None or (self.ignore_index is None and self.class_weight is None):
            return self.shape[1]
        index = self.index.long()
        if self.ignore_index is None:
            assert self.class_weight is not None
            return self.class_weight[index].sum()
        valid = index != self.ignore_index
        if self.class_weight is None:
            return valid.sum().to(self.dtype)
        return (self.class_weight[index.masked_fill(~valid, 0)] * valid).sum()

    def count_rows(self) -> int | Tensor:
        """Return the denominator of the mean divergence."""
        if self.kl_rows == "all" or self.index is None or self.ignore_index is None:
            return self.shape[1]
        return (self.index.long() != self.ignore_index).sum().to(self.dtype)


class Solution(NamedTuple):
    """What a backend computes.

    Attributes:
        losses: (K,), or (K, N) with reduction "none", in ``Problem.dtype``.
        grads: K tensors (N, C), which the caller may overwrite: the gradient of
            ``losses[k].sum()`` with respect to ``students[k]``, times ``grad_scale``, in the dtype
            of that student; None if not wanted.
        stats: None if not wanted.
    """

    losses: Tensor
    grads: tuple[Tensor, ...] | None
    stats: MutualStats | None


class Backend(Protocol):
    """One way to compute the loss. No backend writes to its inputs, unless `Problem.in_place`.

    ``stats`` is "none", "cheap" (the first four fields of `MutualStats`) or "all".

    Attributes:
        SCRATCH: how many numbers per logit `solve` holds at once, beside the logits and their
            gradients; `dml_fast.loss.linear_chunks` chooses the size of its chunks by it.
        IN_PLACE: whether `solve` writes gradients over logits where it may.
    """

    SCRATCH: int
    IN_PLACE: bool

    def solve(self, problem: Problem, with_grad: bool, stats: str) -> Solution:
        """Return losses, and gradients if wanted, none with a graph."""
        ...

    def differentiable(
        self, problem: Problem, logits: tuple[Tensor, ...], stats: str, separate: bool = False
    ) -> tuple[Losses, MutualStats | None]:
        """Return the losses of `solve`, differentiable once, and statistics.

        Autograd differentiates them with respect to ``logits``: K tensors (N, C), or one
        (K, N, C), with the values of ``problem.students``. With ``separate`` there are K losses,
        () or (N,), each with a backward pass of its own, which reaches ``logits[k]`` alone.
        """
        ...
