"""The exact mutual loss of Deep Mutual Learning (Zhang et al., CVPR 2018, arXiv 1706.00384).

    L_k = CE(z_k, y) + λ T² Σ_{l≠k} w_kl KL(p_l || p_k),   p = softmax(z / T),   w_kl = 1 / (K-1)

Peers are constants: the gradient of L_k with respect to z_l, l ≠ k, is exactly zero.
docs/loss.md is the user's page.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dml_fast.errors import brief
from dml_fast.loss import backends
from dml_fast.loss.checks import (
    Array,
    Logits,
    check_ce_weight,
    check_distribution,
    check_grad_scale,
    check_options,
    prepare,
)
from dml_fast.loss.disagreement import peer_divergence
from dml_fast.loss.divergences import check as check_divergence
from dml_fast.loss.problem import Losses, MutualStats, Problem
from dml_fast.loss.values import fail, integer, number, tensor

__all__ = [
    "FusedMutualLoss",
    "MutualStats",
    "mutual_loss",
    "mutual_loss_and_grad",
    "peer_divergence",
]


def mutual_loss(
    logits: Logits,
    target: Array,
    *,
    kl_weight: float | Tensor = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    class_weight: Array | None = None,
    ignore_index: int = -100,
    peer_reduction: str = "mean",
    reduction: str = "mean",
    backend: str = "auto",
    peer_weight: Array | None = None,
    row_weight: Array | None = None,
    teacher_logits: Logits | None = None,
    return_stats: bool = False,
    class_dim: int | None = None,
    separate: bool = False,
    ce_weight: float = 1.0,
    distribution: str = "categorical",
    divergence: str = "forward",
    beta: float = 0.5,
    kl_rows: str = "all",
) -> Losses | tuple[Losses, MutualStats]:
    """Return the mutual loss of each student, differentiable once.

    ``losses.sum().backward()`` gives each student the gradient of its own loss. In a loop that
    calls ``backward`` and steps student by student, take ``separate=True``.

    The cross-entropy is that of `torch.nn.functional.cross_entropy` with every option, except that
    a batch without any label has the cross-entropy 0, not NaN. Both terms are means over rows: the
    cross-entropy over the labelled rows (divided by the sum of their class weights, if given), the
    divergence over all rows. Rows are computed in fp32 (fp64 for fp64 logits).

    Where a student's logits of a row contain NaN or +inf, or are all -inf, its loss and gradient
    are NaN, and its peers ignore it in that row.

    Args:
        logits: K tensors (*batch, C), or one (K, *batch, C); fp16, bf16, fp32 or fp64.
        target: (*batch) integer classes, or (*batch, C) probabilities; a tensor, or numbers in a
            list or a numpy array, as for all weights.
        kl_weight: λ, a number or a 0-d tensor. The host does not read the tensor, so changing it
            during training does not wait for the device.
        temperature: T > 0 of the divergence; the cross-entropy has none.
        label_smoothing: of the cross-entropy, in [0, 1].
        class_weight: (C,) weights of the cross-entropy.
        ignore_index: rows with this label have no cross-entropy, but keep their divergence.
        peer_reduction: "mean" over the peers (the paper) or "sum" (the authors' code).
        reduction: "mean", "sum" or "none" over rows.
        backend: "auto", "native", "closed_form", "compiled" or "triton"; see docs/loss.md.
        peer_weight: (K, K + M) weights w_kl that replace the uniform ones; students first, then
            teachers. A peer with weight 0 is ignored, and so is the diagonal. The weights are
            used as they are: not normalised, not even where a peer's row is unusable.
        row_weight: (*batch) factors of both terms of a row; the means' denominators do not change.
        teacher_logits: M further distributions, shaped like `logits`, which teach and do not
            learn. With ``peer_reduction="mean"`` they count as peers: w = 1 / (K - 1 + M).
        return_stats: also return every field of `MutualStats`.
        class_dim: the dimension of each student's logits that has the classes. By default it is
            the last, and a target that also fits torch's order (B, C, ...) is refused.
        separate: return K losses, each with a backward pass of its own that reaches the logits of
            its student alone: in any order, with updates of weights in between, or not at all.
        ce_weight: a number that multiplies the cross-entropy. 0 leaves the divergence alone.
        distribution: "categorical", one class for each row; or "bernoulli", labels that do not
            exclude each other: the target is (*batch, C) of 0 and 1 or of probabilities, and both
            terms of a row are the means over its classes of the binary cross-entropy (as in
            `torch.nn.BCEWithLogitsLoss`) and of the KL of Bernoulli distributions. Label smoothing
            s makes targets y (1 - s) + s / 2. Not with ``class_weight``.
        divergence: "forward", KL(p_l || p_k) (the paper's); "reverse", KL(p_k || p_l); "symmetric",
            the mean of both; "jsd", the Jensen-Shannon divergence of p_k and its peers' mean.
        beta: for "jsd" alone, the peers' share of the mixture, above 0 and below 1.
        kl_rows: "all"; or "labelled": rows with ``ignore_index``, such as padding, have no
            divergence and do not count in its mean, and their gradient is 0.

    Returns:
        Losses (K,), or (K, *batch) with ``reduction="none"``, in fp32 (fp64 for fp64 logits), or
        with ``separate`` a tuple of K tensors; ``(losses, stats)`` with ``return_stats``.

    Raises:
        UserError: if an argument has a wrong shape, device, dtype or value.
    """
    class_dim = None if class_dim is None else integer(class_dim, "class_dim")
    problem = prepare(
        logits,
        target,
        kl_weight=kl_weight,
        temperature=temperature,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        ignore_index=ignore_index,
        peer_reduction=peer_reduction,
        reduction=reduction,
        peer_weight=peer_weight,
        row_weight=row_weight,
        teacher_logits=teacher_logits,
        class_dim=class_dim,
        ce_weight=ce_weight,
        distribution=distribution,
        divergence=divergence,
        beta=beta,
        kl_rows=kl_rows,
    )
    solver = backends.find(backend, problem)
    inputs = problem.students
    if separate and isinstance(logits, Tensor) and logits.requires_grad:
        fail(
            "logits are one tensor, whose gradient is one too", "for separate=True pass a list of K"
        )
    if isinstance(logits, Tensor):  # whose gradient is one tensor too
        if class_dim is not None:
            logits = logits.movedim(class_dim + (class_dim >= 0), -1)
        inputs = (logits if logits.dim() == 3 else logits.reshape(problem.shape),)
    wanted = "all" if return_stats else "none"
    if torch.is_grad_enabled() and any(z.requires_grad for z in inputs):
        losses, stats = solver.differentiable(problem, inputs, wanted, separate)
    else:
        losses, _, stats = solver.solve(problem, False, wanted)
        losses = losses.unbind() if separate else losses
    if reduction == "none":
        if isinstance(losses, Tensor):
            losses = losses.reshape(len(problem.students), *problem.batch_shape)
        else:
            losses = tuple(loss.reshape(problem.batch_shape) for loss in losses)
    return losses if stats is None else (losses, stats)


def mutual_loss_and_grad(
    logits: Logits,
    target: Array,
    *,
    kl_weight: float | Tensor = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    class_weight: Array | None = None,
    ignore_index: int = -100,
    peer_reduction: str = "mean",
    reduction: str = "mean",
    backend: str = "auto",
    peer_weight: Array | None = None,
    row_weight: Array | None = None,
    teacher_logits: Logits | None = None,
    return_stats: bool = False,
    class_dim: int | None = None,
    grad_scale: float | Tensor | None = None,
    ce_weight: float = 1.0,
    distribution: str = "categorical",
    divergence: str = "forward",
    beta: float = 0.5,
    kl_rows: str = "all",
    whole: tuple[float | Tensor, int | Tensor] | None = None,
) -> tuple[Tensor, list[Tensor], MutualStats]:
    """Return the losses and their gradients without autograd, as a training engine needs them.

    Continue with ``logits[k].backward(grads[k])``. Arguments and errors are those of
    `mutual_loss`. In addition, ``grad_scale`` multiplies the gradients before they are rounded to
    the logits' dtype, but not the losses: a number, or a () or (K,) tensor on the logits' device,
    such as a loss scaler has. ``whole`` is for rows that are a part of a larger batch: the
    denominators of that batch's means, which are its number of labelled rows (or the sum of their
    class weights), a number or a () tensor on the logits' device, and its number of rows (with
    ``kl_rows="labelled"`` of labelled rows, which may be such a tensor too). The losses, gradients
    and means of all parts then add up to those of the batch.

    Returns:
        ``(losses, grads, stats)``: losses as `mutual_loss` returns them, without a graph; K
        gradients of ``losses[k].sum()``, each with the shape and dtype of ``logits[k]``; and the
        statistics, of which all but the first four are None unless ``return_stats``.
    """
    class_dim = None if class_dim is None else integer(class_dim, "class_dim")
    problem = prepare(
        logits,
        target,
        kl_weight=kl_weight,
        temperature=temperature,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        ignore_index=ignore_index,
        peer_reduction=peer_reduction,
        reduction=reduction,
        peer_weight=peer_weight,
        row_weight=row_weight,
        teacher_logits=teacher_logits,
        class_dim=class_dim,
        ce_weight=ce_weight,
        distribution=distribution,
        divergence=divergence,
        beta=beta,
        kl_rows=kl_rows,
    )
    problem.grad_scale = check_grad_scale(grad_scale, problem)
    if whole is not None:
        problem.whole = _of_larger_batch(whole, problem, kl_rows)
    solver = backends.find(backend, problem)
    losses, grads, stats = solver.solve(problem, True, "all" if return_stats else "cheap")
    assert grads is not None and stats is not None
    parts = list(grads)
    if len(problem.batch_shape) != 1:
        parts = [g.reshape(*problem.batch_shape, g.shape[-1]) for g in parts]
    if class_dim is not None:
        parts = [g.movedim(-1, class_dim) for g in parts]
    if reduction == "none":
        losses = losses.reshape(len(problem.students), *problem.batch_shape)
    return losses, parts, stats


def _of_larger_batch(
    whole: Any, problem: Problem, kl_rows: str
) -> tuple[float | Tensor, int | Tensor]:
    """Return `Problem.whole`; refuse what cannot be the denominators of a larger batch."""
    if not isinstance(whole, tuple) or len(whole) != 2:
        fail(f"whole is {brief(whole)}", "pass the labels and the rows of the larger batch")
    labels, rows = whole
    if isinstance(labels, Tensor):
        labels = _count(labels, "labels", problem)
    else:
        labels = number(labels, "the labels of whole")
    if kl_rows == "labelled" and isinstance(rows, Tensor):
        return labels, _count(rows, "rows", problem)
    rows, mine = integer(rows, "the rows of whole"), problem.shape[1]
    if rows < mine and kl_rows == "all":
        fail(f"whole has {rows} rows and the logits {mine}", "it is the larger batch that counts")
    return labels, rows


def _count(value: Tensor, name: str, problem: Problem) -> Tensor:
    if value.dim():
        fail(f"whole has {name} of shape {tuple(value.shape)}", "pass a number or a 0-d tensor")
    return value.detach().to(problem.dtype)


class LossOptions(nn.Module):
    """The options that the loss modules have in common.

    They are attributes, which may be changed between calls; ``class_weight`` is a buffer.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        kl_weight: float | Tensor = 1.0,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
        class_weight: Array | None = None,
        ignore_index: int = -100,
        peer_reduction: str = "mean",
        reduction: str = "mean",
        backend: str = "auto",
        ce_weight: float = 1.0,
        divergence: str = "forward",
        beta: float = 0.5,
        kl_rows: str = "all",
    ) -> None:
        """Check and keep the options; see `mutual_loss`."""
        super().__init__()
        numbers = check_options(kl_weight, temperature, label_smoothing, peer_reduction, reduction)
        self.ce_weight = check_ce_weight(ce_weight)
        self.divergence, self.beta = divergence, check_divergence(divergence, beta, kl_rows)
        self.kl_rows = kl_rows
        ignore_index = integer(ignore_index, "ignore_index")
        if class_weight is not None:
            class_weight = tensor(class_weight, "class_weight", torch.get_default_device())
        backends.check(backend)
        self.kl_weight, self.temperature, self.label_smoothing = numbers
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index
        self.peer_reduction = peer_reduction
        self.reduction = reduction
        self.backend = backend

    def options(self) -> dict[str, Any]:
        """Return the options as keyword arguments of the functional form."""
        return {
            "kl_weight": self.kl_weight,
            "temperature": self.temperature,
            "label_smoothing": self.label_smoothing,
            "class_weight": self.class_weight,
            "ignore_index": self.ignore_index,
            "peer_reduction": self.peer_reduction,
            "reduction": self.reduction,
            "backend": self.backend,
            "ce_weight": self.ce_weight,
            "divergence": self.divergence,
            "beta": self.beta,
            "kl_rows": self.kl_rows,
        }

    def extra_repr(self) -> str:
        """Return the options for ``print``, without the class weights."""
        shown = self.options()
        del shown["class_weight"]
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class FusedMutualLoss(LossOptions):
    """`mutual_loss` as a module: ``FusedMutualLoss()(logits, target)`` gives (K,) losses.

    Its options are attributes, which may be changed between calls; ``class_weight`` is a buffer.
    Arguments, results and errors are those of `mutual_loss`.
    """

    def __init__(
        self,
        *args: Any,
        class_dim: int | None = None,
        distribution: str = "categorical",
        **options: Any,
    ) -> None:
        """Check and keep the options: see `mutual_loss`."""
        super().__init__(*args, **options)
        check_distribution(distribution, self.class_weight)
        check_divergence(self.divergence, self.beta, self.kl_rows, distribution)
        self.distribution = distribution
        self.class_dim = None if class_dim is None else integer(class_dim, "class_dim")

    def options(self) -> dict[str, Any]:
        """Return the options as keyword arguments of the functional form."""
        own = {"class_dim": self.class_dim, "distribution": self.distribution}
        return super().options() | own

    def forward(
        self,
        logits: Logits,
        target: Array,
        *,
        peer_weight: Array | None = None,
        row_weight: Array | None = None,
        teacher_logits: Logits | None = None,
        return_stats: bool = False,
        separate: bool = False,
    ) -> Losses | tuple[Losses, MutualStats]:
        """Return (K,) losses, or (K, *batch) with ``reduction="none"``; see `mutual_loss`."""
        return mutual_loss(
            logits,
            target,
            **self.options(),
            peer_weight=peer_weight,
            row_weight=row_weight,
            teacher_logits=teacher_logits,
            return_stats=return_stats,
            separate=separate,
        )
