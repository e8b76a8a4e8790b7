"""The mutual loss in plain torch: O(K) passes over the logits, on any device.

Let p_l = softmax(z_l / T) for the L distributions (students, then teachers), w_kl the peers'
weights and H_l the entropy of p_l. For one row, a student's divergence and its gradient are

    KL_k = T² (Σ_l w_kl (-H_l) - ⟨V_k, log p_k⟩),   V_k = Σ_l w_kl p_l
    dKL_k/dz_k = T (W_k p_k - V_k),                  W_k = Σ_l w_kl

With uniform weights the sum may include l = k, which adds KL(p_k || p_k) = 0. Then V, W and the
sum of the entropies are the same for all students, and no pair of students is ever formed. The
cross-entropy of a target t is -⟨t, log q⟩, and its gradient |t| q - t. So the gradients of all
students are one multiply-add, A p_k - U with shared A and U, and one scatter for the label.

This is the paper's divergence; `dml_fast.loss.divergences` has the others.

Where students agree, all entropies are close to log C, and their rounding errors would be most of
the divergence, times T². So log C - H_l is computed instead, from logits whose largest is 0: only
numbers as small as the logits' spread are subtracted.

A row that contains NaN or +inf, or only -inf, is unusable: the other students ignore it, and the
student's own loss is NaN. On a CPU, one sum of the entropies shows whether any row is unusable or
any class masked (-inf); if not, the guards against them are skipped. On other devices reading that
sum would wait for the device, so the guards always run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dml_fast.loss.autograd import tied
from dml_fast.loss.disagreement import add_disagreement
from dml_fast.loss.divergences import Apart, measure
from dml_fast.loss.factors import Factor, column, inverse
from dml_fast.loss.problem import Losses, MutualStats, Problem, Solution
from dml_fast.loss.values import may_look

SCRATCH, IN_PLACE = 5, False  # see `dml_fast.loss.problem.Backend`


class _Views(NamedTuple):
    """The softmax of every distribution, and its parts.

    In each row the logarithm of p is ``t - log_d``, and that of q is ``u - log_e``.
    """

    t: Tensor  # (L, N, C) at temperature T, largest 0
    log_d: Tensor  # (L, N)
    excess: Tensor  # (L, N) log_d - log C
    p: Tensor  # (L, N, C)
    u: Tensor  # (K, N, C) at temperature 1; the students of `t` if T = 1
    log_e: Tensor  # (K, N)
    q: Tensor  # (K, N, C)
    peak: Tensor  # (L, N) log C minus the entropy of p, 0 where unusable
    usable: Tensor | None  # (L, N) bool; None: all are usable and no class is masked
    best: Tensor | None  # (L, N, 1) the class with the largest logit, if wanted


class _Peers(NamedTuple):
    """The sums over a student's peers; `share` multiplies the other three."""

    mix: Tensor  # V: (N, C) for all students, or (K, N, C)
    mass: Factor  # W
    peak: Tensor  # Σ_l w_kl (log C - H_l): (N,) for all students, or (K, N)
    share: Factor  # the uniform weight, or 1 with `peer_weight`


class _Labels(NamedTuple):
    """The target t of the cross-entropy, times the class weights: a sparse and a dense part."""

    at: Tensor | None  # (K, N, 1) int64, the class of the sparse part
    sparse: Factor  # t of that class
    dense: Tensor | None  # (1, C) from label smoothing, (N, C) from probabilities
    labelled: Factor  # 1 or 0, multiplies the dense part
    valid: Tensor | None  # `labelled` as (N,) bool; None: every row has a label
    mass: Factor  # |t|, the sum of t over the classes
    denominator: Factor  # of the mean over rows


def solve(problem: Problem, with_grad: bool, stats: str) -> Solution:
    """As `dml_fast.loss.problem.Backend.solve`."""
    with torch.no_grad():
        return finished(problem, *compute(problem, with_grad, stats))


def finished(
    problem: Problem, losses: Tensor, grads: Tensor | None, measured: MutualStats | None
) -> Solution:
    """Return what `compute` gave, with the gradients as the students take them."""
    if grads is None:
        return Solution(losses, None, measured)
    if problem.grad_scale is not None:
        scale = problem.grad_scale
        grads.mul_(scale.reshape(-1, 1, 1) if isinstance(scale, Tensor) else scale)
    parts = zip(grads, problem.students, strict=True)
    return Solution(losses, tuple(g.to(z.dtype) for g, z in parts), measured)


def differentiable(
    problem: Problem, logits: tuple[Tensor, ...], stats: str, separate: bool = False
) -> tuple[Losses, MutualStats | None]:
    """As `dml_fast.loss.problem.Backend.differentiable`, with gradients from the forward pass."""
    with torch.no_grad():
        computed = compute(problem, True, stats)
    return tied(*computed, logits, separate)


def compute(
    problem: Problem, with_grad: bool, stats: str
) -> tuple[Tensor, Tensor | None, MutualStats | None]:
    """Return losses, gradients (K, N, C) in ``problem.dtype`` before `grad_scale`, statistics."""
    students = len(problem.students)
    views = _look(problem, best=stats != "none")
    peers, apart = None, None
    if len(views.p) > 1:
        if problem.divergence in ("forward", "symmetric"):
            peers = _listen(problem, views)
        if peers is not None and problem.divergence == "symmetric":
            peers = peers._replace(share=peers.share * 0.5)
        if problem.divergence != "forward":
            log_p = views.t - column(views.excess)  # plus log C: as small as the logits' spread
            apart = measure(problem, views.p, log_p, views.usable, with_grad)
    labels = _read_labels(problem)

    ce_rows = _cross_entropy(problem, labels, views)
    kl_rows = torch.zeros_like(ce_rows) if peers is None else _divergence(problem, peers, views)
    if apart is not None:
        kl_rows = kl_rows + apart.rows
    if problem.kl_rows == "labelled" and labels.valid is not None:
        kl_rows = kl_rows.masked_fill(~labels.valid, 0.0)
    if problem.row_weight is not None:
        ce_rows = ce_rows * problem.row_weight
        kl_rows = kl_rows * problem.row_weight
    ce, kl = ce_rows.sum(1), kl_rows.sum(1)
    whole = (labels.denominator, problem.count_rows()) if problem.whole is None else problem.whole
    per_label, per_row = inverse(whole[0]), inverse(whole[1])
    mean_ce, mean_kl = ce * per_label, kl * per_row
    if problem.reduction == "mean":
        losses = total(problem, mean_ce, mean_kl)
    else:
        per_label = per_row = 1.0
        parts = (ce, kl) if problem.reduction == "sum" else (ce_rows, kl_rows)
        losses = total(problem, *parts)

    measured = None
    if stats != "none":
        measured = _measure(problem, views, labels, mean_ce, mean_kl)
        if stats == "all":
            log_p = _first(views.t, students) - column(_first(views.log_d, students))
            measured = add_disagreement(measured, log_p, problem.batch_shape)
    grads = None
    if with_grad:
        grads = _gradient(problem, views, peers, apart, labels, per_label, per_row)
    return losses, grads, measured


def _look(problem: Problem, best: bool) -> _Views:
    students = len(problem.students)
    everyone = problem.students + problem.teachers
    z = torch.stack([one.to(problem.dtype) for one in everyone])
    largest, at = _largest(z, best)
    # First of all: the rounding of a large common offset would end up in the result.
    z.sub_(largest)
    t = z if problem.temperature == 1.0 else z / problem.temperature
    p, d = _softmax(t)
    log_d, excess = d.log(), d.div(z.shape[-1]).log_()
    u, log_e, q = _first(t, students), _first(log_d, students), _first(p, students)
    if problem.temperature != 1.0:
        u = _first(z, students)
        q, e = _softmax(u)
        log_e = e.log_()
    peak = _row_dots(p, t, guard=False).sub_(excess)
    usable = None
    if not (may_look(z.device) and math.isfinite(peak.sum().item())):
        usable = ~log_d.isnan()
        peak = _row_dots(p, t, guard=True).sub_(excess).masked_fill_(~usable, 0.0)
    return _Views(t, log_d, excess, p, u, log_e, q, peak, usable, at)


def _first(views: Tensor, students: int) -> Tensor:
    """Return the students' part; with rows as short as CIFAR's, even a slice takes time."""
    return views if len(views) == students else views[:students]


def _largest(x: Tensor, place: bool) -> tuple[Tensor, Tensor | None]:
    """Return the maximum of each row, (..., 1), and where it first is if `place`."""
    if not place:
        return x.amax(-1, keepdim=True), None
    if not torch.compiler.is_compiling():
        largest, at = x.max(-1, keepdim=True)  # faster than argmax
        return largest, at
    largest = x.amax(-1, keepdim=True)
    # Inductor makes a scalar loop of argmax on the CPU, slower than all the rest of the loss.
    classes = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    return largest, torch.where(x == largest, classes, x.shape[-1]).amin(-1, keepdim=True)


def _softmax(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax, and the sum of the exponentials (L, N); the largest t is 0.

    torch's own function is slow with rows as short as CIFAR's.
    """
    p = t.exp()
    d = p.sum(-1, keepdim=True)
    return p.mul_(d.reciprocal()), d.squeeze(-1)


def _row_dots(weights: Tensor, values: Tensor, guard: bool) -> Tensor:
    """Return ⟨weights, values⟩ over the classes, (L, N); `guard` takes 0 x -inf as 0."""
    products = weights * values
    if guard:
        products.masked_fill_(weights == 0, 0.0)
    return products.sum(-1)


def _listen(problem: Problem, views: _Views) -> _Peers:
    p, usable = views.p, views.usable
    if usable is not None:
        p = p.masked_fill(~usable.unsqueeze(-1), 0.0)
    if problem.peer_weight is not None:
        weight = problem.peer_weight.unsqueeze(-1)  # (K, L, 1)
        mix = torch.zeros(problem.shape, dtype=p.dtype, device=p.device)
        for column, p_l in zip(weight.unbind(1), p, strict=True):
            # Not a matrix product: autocast would round it to bf16, CUDA perhaps to TF32.
            mix.addcmul_(column.unsqueeze(-1), p_l)
        present = torch.ones_like(views.peak) if usable is None else usable.to(p.dtype)
        return _Peers(mix, (weight * present).sum(1), (weight * views.peak).sum(1), 1.0)

    mean = problem.peer_reduction == "mean"
    mix, peak = p.sum(0), views.peak.sum(0)
    if usable is None:
        return _Peers(mix, float(len(p)), peak, 1.0 / (len(p) - 1) if mean else 1.0)
    count = usable.sum(0).to(p.dtype)  # (N,)
    share = (count - 1).reciprocal_() if mean else torch.ones_like(count)
    share.masked_fill_(count < 2, 0.0)  # there is no usable peer
    return _Peers(mix, count, peak, share)


def _divergence(problem: Problem, peers: _Peers, views: _Views) -> Tensor:
    """Return T² times the weighted sum over the peers l of KL(p_l || p_k), (K, N)."""
    students = len(problem.students)
    guard = views.usable is not None
    rows = peers.peak - _row_dots(peers.mix, _first(views.t, students), guard)
    excess = _first(views.excess, students)
    if isinstance(peers.mass, Tensor):
        rows.addcmul_(excess, peers.mass)
    else:
        rows.add_(excess, alpha=peers.mass)
    if problem.peer_weight is None:
        rows.clamp_(min=0.0)  # a divergence is never negative, but its rounding error may be
    if views.usable is not None:
        rows.masked_fill_(~views.usable[:students], math.nan)
    return rows.mul_(peers.share * problem.temperature**2)


def _read_labels(problem: Problem) -> _Labels:
    students, rows, classes = problem.shape
    smoothing, weight = problem.label_smoothing, problem.class_weight
    if problem.index is None:
        assert problem.soft is not None
        dense = problem.soft
        if smoothing:
            dense = dense * (1 - smoothing) + smoothing / classes
        if weight is not None:
            dense = dense * weight
        return _Labels(None, 0.0, dense, 1.0, None, dense.sum(-1), rows)

    index = problem.index.long()
    valid: Tensor | None = None
    labelled: Factor = 1.0
    if problem.ignore_index is not None:
        valid = index != problem.ignore_index
        index = index.masked_fill(~valid, 0)
        labelled = valid.to(problem.dtype)
    at = index.expand(students, rows).unsqueeze(-1)
    own = labelled if weight is None else weight[index] * labelled
    denominator = own.sum() if isinstance(own, Tensor) else rows
    if not smoothing:
        return _Labels(at, own, None, labelled, valid, own, denominator)
    dense = problem.students[0].new_full((1, classes), smoothing / classes, dtype=problem.dtype)
    if weight is not None:
        dense = dense * weight
    sparse = own * (1 - smoothing)
    mass = sparse + labelled * dense.sum()
    return _Labels(at, sparse, dense, labelled, valid, mass, denominator)


def _cross_entropy(problem: Problem, labels: _Labels, views: _Views) -> Tensor:
    """Return the result of ``F.cross_entropy(reduction="none")``, (K, N)."""
    rows = None
    if labels.at is not None:
        rows = views.log_e - views.u.gather(-1, labels.at).squeeze(-1)
        if isinstance(labels.sparse, Tensor) or labels.sparse != 1.0:
            rows = rows.mul_(labels.sparse)
    if labels.dense is not None:
        dots = _row_dots(
            labels.dense, views.u - column(views.log_e), guard=views.usable is not None
        )
        smooth = dots * (labels.labelled * -1)
        rows = smooth if rows is None else rows + smooth
    assert rows is not None
    if labels.valid is not None:
        rows = rows.masked_fill_(~labels.valid, 0.0)  # which may be 0 x inf
    return rows


def _gradient(
    problem: Problem,
    views: _Views,
    peers: _Peers | None,
    apart: Apart | None,
    labels: _Labels,
    per_label: Factor,
    per_row: Factor,
) -> Tensor:
    """Return the gradients (K, N, C), in the buffer of `views.q`, which is not read again."""
    row_weight: Factor = 1.0 if problem.row_weight is None else problem.row_weight
    ce_scale = per_label * row_weight
    if problem.ce_weight != 1.0:
        ce_scale = ce_scale * problem.ce_weight
    push = labels.mass * ce_scale  # A, of q
    pull = None  # -U
    if labels.dense is not None:
        pull = labels.dense * column(labels.labelled * ce_scale * -1)
    if peers is not None:
        strength = peers.share * row_weight * problem.kl_weight * (problem.temperature * per_row)
        drag = peers.mix * column(strength * -1)
        pull = drag if pull is None else drag + pull
        if problem.temperature == 1.0:
            push = push + peers.mass * strength  # p is q
        else:
            pull = _multiply_add(pull, _first(views.p, len(views.q)), peers.mass * strength)
    if apart is not None and apart.grads is not None:
        drag = apart.grads * column(row_weight * problem.kl_weight * per_row)
        pull = drag if pull is None else drag + pull
    grads = _multiply_add(pull, views.q, push)
    if labels.at is not None:
        value = labels.sparse * ce_scale * -1
        if torch.compiler.is_compiling() and not isinstance(value, Tensor):
            value = grads.new_full((), value)  # scatter_ does not take a symbolic number
        if isinstance(value, Tensor):
            grads.scatter_add_(-1, labels.at, column(value).expand(labels.at.shape))
        else:
            grads.scatter_(-1, labels.at, value, reduce="add")
    if problem.kl_rows == "labelled" and labels.valid is not None:
        grads.masked_fill_(~labels.valid.unsqueeze(-1), 0.0)
    return grads


def _multiply_add(base: Tensor | None, p: Tensor, factor: Factor) -> Tensor:
    """Return base + p * factor, in the buffer of `p`, in one pass."""
    if base is None:
        return p.mul_(column(factor))
    if isinstance(factor, Tensor):
        return torch.addcmul(base, p, column(factor), out=p)
    return torch.add(base, p, alpha=factor, out=p)


def _measure(
    problem: Problem, views: _Views, labels: _Labels, ce: Tensor, kl: Tensor
) -> MutualStats:
    students = len(problem.students)
    true = labels.at
    if true is None:
        assert problem.soft is not None
        _, true = _largest(problem.soft, place=True)
    assert views.best is not None and true is not None
    correct = (_first(views.best, students) == true).squeeze(-1)
    if labels.valid is not None:
        correct &= labels.valid
    if views.usable is None:
        finite = torch.ones(students, dtype=torch.bool, device=problem.device)
    else:
        correct &= views.usable[:students]
        finite = views.usable[:students].all(1)
    return MutualStats(ce, kl, correct.sum(1), finite)


def total(problem: Problem, ce: Tensor, kl: Tensor) -> Tensor:
    """Return the weighted sum of both terms."""
    kl_weight = problem.kl_weight
    if problem.ce_weight != 1.0:
        ce = ce * problem.ce_weight
    if isinstance(kl_weight, Tensor):
        return ce + kl * kl_weight
    if kl_weight:
        return torch.add(ce, kl, alpha=kl_weight)
    return ce.clone()  # with a weight of 0, not even an infinite divergence counts
