"""The mutual loss in plain torch: O(K) passes over the logits, on any device.

With p_l = softmax(z_l / T) for all L distributions (students, then teachers), weights w_kl and
H_l the entropy of p_l, a student's divergence and its gradient for one row are

    KL_k = T² (Σ_l w_kl (-H_l) - ⟨V_k, log p_k⟩),   V_k = Σ_l w_kl p_l
    dKL_k/dz_k = T (W_k p_k - V_k),                  W_k = Σ_l w_kl

With uniform weights the sum may run over l = k too, as it adds KL(p_k || p_k) = 0. Then V, W and
the sum of the entropies are the same for every student, and the K x K pairs never appear. With
the cross-entropy of a target t, whose gradient is |t| q - t, all students' gradients are one
multiply-add: A p_k - U, with A and U shared, and one scatter for the label.

Rows that hold NaN or +inf, or nothing but -inf, are unusable: the others do not see them, and
their own loss is NaN. On a CPU one look at the entropies tells whether there are such rows or
masked classes (-inf) at all, which spares the guards; elsewhere asking would stall, so they stay.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dml_fast.disagreement import add_disagreement
from dml_fast.loss_problem import MutualStats, Problem, Solution

Factor = float | Tensor  # a number, or one per row: (N,) or (K, N)


class _Views(NamedTuple):
    """All L distributions at one temperature."""

    log_p: Tensor  # (L, N, C)
    p: Tensor  # (L, N, C)
    neg_entropy: Tensor  # (L, N), 0 where unusable
    usable: Tensor | None  # (L, N) bool; None: all usable and no class masked, guards not needed


class _Peers(NamedTuple):
    """What the students see of each other."""

    mix: Tensor  # V: (N, C) shared, or (K, N, C)
    mass: Factor  # W
    neg_entropy: Tensor  # Σ_l w_kl (-H_l): (N,) shared, or (K, N)


class _Labels(NamedTuple):
    """The target t of the cross-entropy -⟨t, log q⟩, as a sparse and a dense part."""

    sparse: Factor | None  # t at Problem.index
    dense: Tensor | None  # (1, C) for smoothing, (N, C) for probabilities
    dense_scale: Factor  # what multiplies each row of `dense`
    mass: Factor  # the sum of t over the classes
    denominator: Factor  # of the mean


def solve(problem: Problem, with_grad: bool, stats: str) -> Solution:
    """The closed form as a `dml_fast.loss_problem.Backend`."""
    students, rows, _ = problem.shape
    views = _look(problem)
    peers = _listen(problem, views) if len(problem.students) + len(problem.teachers) > 1 else None
    labels = _read_labels(problem)
    log_q = views.log_p[:students]
    if problem.temperature != 1.0:
        log_q = _log_softmax(problem.students, problem.dtype, 1.0)

    ce_rows, true_log_q = _cross_entropy(problem, labels, log_q, views.usable)
    if peers is None:
        kl_rows = torch.zeros_like(ce_rows)
    else:
        kl_rows = _divergence(problem, peers, views)
    if problem.row_weight is not None:
        ce_rows = ce_rows * problem.row_weight
        kl_rows = kl_rows * problem.row_weight

    per_label = _inverse(labels.denominator)
    per_row = 1.0 / max(rows, 1)
    ce, kl = ce_rows.sum(1), kl_rows.sum(1)
    if problem.reduction == "mean":
        ce, kl = ce * per_label, kl * per_row
        losses = _total(ce, kl, problem.kl_weight)
    elif problem.reduction == "sum":
        losses = _total(ce, kl, problem.kl_weight)
    else:
        losses = _total(ce_rows, kl_rows, problem.kl_weight)
    if problem.reduction != "mean":
        ce, kl = ce * per_label, kl * per_row

    measured = None
    if stats != "none":
        measured = _measure(problem, views, log_q, ce, kl)
        if stats == "all":
            measured = add_disagreement(measured, views.log_p[:students], problem.batch_shape)
    grads = None
    if with_grad:
        if problem.reduction != "mean":
            per_label = per_row = 1.0
        grads = _gradient(problem, views, peers, labels, log_q, per_label, per_row)
    return Solution(losses, grads, measured)


def _log_softmax(tensors: tuple[Tensor, ...], dtype: torch.dtype, temperature: float) -> Tensor:
    """(len(tensors), N, C): log softmax(z / temperature) of each, computed in `dtype`."""
    out = torch.empty(
        (len(tensors), *tensors[0].shape), dtype=dtype, device=tensors[0].device
    )
    for slot, z in zip(out, tensors, strict=True):
        torch.log_softmax(z, -1, dtype=dtype, out=slot)
    if temperature != 1.0:
        # Divided only now: z / T would first round a large common offset of z into the result.
        out = torch.log_softmax(out.div_(temperature), -1)
    return out


def _look(problem: Problem) -> _Views:
    log_p = _log_softmax(problem.students + problem.teachers, problem.dtype, problem.temperature)
    p = log_p.exp()
    products = p * log_p
    neg_entropy = products.sum(-1)
    if problem.device.type == "cpu" and math.isfinite(neg_entropy.sum().item()):
        return _Views(log_p, p, neg_entropy, None)
    # log_softmax makes all of an unusable row NaN, so that its first class tells.
    usable = log_p[..., 0].isnan().logical_not_()
    neg_entropy = products.masked_fill_(p == 0, 0.0).sum(-1).masked_fill_(~usable, 0.0)
    return _Views(log_p, p, neg_entropy, usable)


def _listen(problem: Problem, views: _Views) -> _Peers:
    p, usable = views.p, views.usable
    if usable is not None:
        p = p.masked_fill(~usable.unsqueeze(-1), 0.0)
    if problem.peer_weight is not None:
        weight = problem.peer_weight[..., None]  # (K, L, 1)
        mix = torch.zeros((problem.shape), dtype=p.dtype, device=p.device)
        for column, p_l in zip(weight.unbind(1), p, strict=True):
            # Not a matmul: that would be rounded to bf16 under autocast, or to TF32.
            mix.addcmul_(column.unsqueeze(-1), p_l)
        present = torch.ones_like(views.neg_entropy) if usable is None else usable.to(p.dtype)
        return _Peers(mix, (weight * present).sum(1), (weight * views.neg_entropy).sum(1))

    mix, neg_entropy = p.sum(0), views.neg_entropy.sum(0)
    if usable is None:
        count, share = float(len(p)), 1.0 / (len(p) - 1)
        if problem.peer_reduction == "sum":
            return _Peers(mix, count, neg_entropy)
        return _Peers(mix.mul_(share), count * share, neg_entropy.mul_(share))
    counts = usable.sum(0).to(p.dtype)  # (N,)
    share = torch.ones_like(counts)
    if problem.peer_reduction == "mean":
        share = (counts - 1).clamp_(min=1).reciprocal_()
    share = share.masked_fill_(counts < 2, 0.0)  # nobody else to listen to
    return _Peers(mix.mul_(share.unsqueeze(-1)), counts * share, neg_entropy.mul_(share))


def _divergence(problem: Problem, peers: _Peers, views: _Views) -> Tensor:
    """(K, N): T² times the weighted sum over the peers l of KL(p_l || p_k)."""
    students = len(problem.students)
    products = peers.mix * views.log_p[:students]
    if views.usable is not None:
        products.masked_fill_(peers.mix == 0, 0.0)  # 0 log 0 = 0
    rows = peers.neg_entropy - products.sum(-1)
    if problem.peer_weight is None:
        rows.clamp_(min=0.0)  # a divergence: what is below 0 is rounding
    if views.usable is not None:
        rows.masked_fill_(~views.usable[:students], math.nan)
    return rows if problem.temperature == 1.0 else rows.mul_(problem.temperature**2)


def _read_labels(problem: Problem) -> _Labels:
    _, rows, classes = problem.shape
    smoothing, weight = problem.label_smoothing, problem.class_weight
    if problem.soft is not None:
        dense = problem.soft
        if smoothing:
            dense = dense * (1 - smoothing) + smoothing / classes
        if weight is not None:
            dense = dense * weight
        return _Labels(None, dense, 1.0, dense.sum(-1), float(rows))

    own: Factor = 1.0  # the weight of the row's class, 0 without a label
    present: Factor = 1.0
    denominator: Factor = float(rows)
    if problem.labelled is not None:
        own = present = problem.labelled.to(problem.dtype)
    if weight is not None:
        assert problem.index is not None
        own = weight[problem.index] * present
    if isinstance(own, Tensor):
        denominator = own.sum()
    if not smoothing:
        return _Labels(own, None, 1.0, own, denominator)
    dense = torch.full((1, classes), smoothing / classes, dtype=problem.dtype, device=problem.device)
    if weight is not None:
        dense = dense * weight
    mass = own * (1 - smoothing) + present * dense.sum()
    return _Labels(own * (1 - smoothing), dense, present, mass, denominator)


def _cross_entropy(
    problem: Problem, labels: _Labels, log_q: Tensor, usable: Tensor | None
) -> tuple[Tensor, None]:
    """(K, N): -⟨t, log q_k⟩, as F.cross_entropy(reduction="none") has it."""
    rows: Tensor | float = 0.0
    if labels.sparse is not None:
        assert problem.index is not None
        index = problem.index.expand(len(log_q), -1).unsqueeze(-1)
        rows = log_q.gather(-1, index).squeeze(-1) * -labels.sparse
    if labels.dense is not None:
        products = log_q * labels.dense
        if usable is not None:
            products.masked_fill_(labels.dense == 0, 0.0)
        rows = rows - products.sum(-1) * labels.dense_scale
    assert isinstance(rows, Tensor)
    if problem.labelled is not None:
        rows = rows.masked_fill_(~problem.labelled, 0.0)  # 0 * inf
    return rows, None


def _gradient(
    problem: Problem,
    views: _Views,
    peers: _Peers | None,
    labels: _Labels,
    log_q: Tensor,
    per_label: Factor,
    per_row: float,
) -> Tensor:
    """(K, N, C), made in the buffer of p: nothing reads that afterwards."""
    students = len(problem.students)
    p = views.p[:students]
    weight: Factor = 1.0 if problem.row_weight is None else problem.row_weight
    scale = weight * per_label  # of the cross-entropy's rows
    push = labels.mass * scale  # A
    pull = None  # -U
    if labels.dense is not None:
        pull = labels.dense * _column(labels.dense_scale * scale * -1.0)
    if problem.temperature != 1.0:
        q = log_q.exp()
        base = q.mul_(_column(push)) if pull is None else torch.addcmul(pull, q, _column(push))
        push, pull = 0.0, base
    if peers is not None:
        strength = weight * problem.kl_weight * (problem.temperature * per_row)
        push = push + peers.mass * strength
        drag = peers.mix * _column(strength * -1.0)
        pull = drag if pull is None else drag + pull
    if pull is None:
        grads = p.mul_(_column(push))
    elif isinstance(push, Tensor):
        grads = torch.addcmul(pull, p, _column(push), out=p if p.dim() else p)
    else:
        grads = torch.add(pull, p, alpha=push, out=p)
    if labels.sparse is not None:
        assert problem.index is not None
        index = problem.index.expand(students, -1).unsqueeze(-1)
        value = -(labels.sparse * scale)
        if isinstance(value, Tensor):
            value = value.expand(index.shape[:2]).unsqueeze(-1)
            grads.scatter_add_(-1, index, value)
        else:
            grads.scatter_(-1, index, value, reduce="add")
    return grads


def _measure(
    problem: Problem, views: _Views, log_q: Tensor, ce: Tensor, kl: Tensor
) -> MutualStats:
    best = log_q.argmax(-1)
    true = problem.index if problem.soft is None else problem.soft.argmax(-1)
    hits = best == true
    if problem.labelled is not None:
        hits &= problem.labelled
    students = len(problem.students)
    if views.usable is None:
        finite = torch.ones(students, dtype=torch.bool, device=problem.device)
    else:
        finite = views.usable[:students].all(1)
    return MutualStats(ce, kl, hits.sum(1), finite)


def _column(factor: Factor) -> Factor:
    """A factor per row, shaped to multiply (..., N, C)."""
    return factor.unsqueeze(-1) if isinstance(factor, Tensor) and factor.dim() else factor


def _inverse(denominator: Factor) -> Factor:
    """1 / denominator, and 0 for 0: the mean over no rows is 0."""
    if isinstance(denominator, Tensor):
        return denominator.reciprocal().masked_fill_(denominator == 0, 0.0)
    return 1.0 / denominator if denominator else 0.0


def _total(ce: Tensor, kl: Tensor, kl_weight: float | Tensor) -> Tensor:
    if isinstance(kl_weight, Tensor) or kl_weight:
        return ce + kl * kl_weight
    return ce.clone()  # off: not even an infinite divergence counts
