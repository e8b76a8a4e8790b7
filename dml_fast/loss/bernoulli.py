"""The mutual loss of labels that do not exclude each other: each class is a coin of its own.

With p_l = sigmoid(z_l / T) and targets y in [0, 1], for one row and one class,

    CE_k = softplus(z_k) - y z_k
    KL_k = T² Σ_l w_kl [p_l log(p_l / p_k) + (1 - p_l) log((1 - p_l) / (1 - p_k))]

and a row has their means over its C classes. So the cross-entropy is torch's
``BCEWithLogitsLoss``. As in `dml_fast.loss.closed_form`, nothing grows with pairs of students: with
V = Σ_l w_kl p_l, U = Σ_l w_kl (1 - p_l) and W = V + U,

    KL_k = T² (W g_k + |t_k| (U where t_k >= 0, else V) - Σ_l w_kl H_l),  t = z / T
    g = log1p(exp(-|t|)),  H = g + |t| sigmoid(-|t|)
    dKL_k/dz_k = T (W p_k - V)

All terms are positive, and small where students agree that a label is there, or is not.

A row with a logit that is NaN or infinite is unusable: as in the closed form.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dml_fast.loss.autograd import tied
from dml_fast.loss.closed_form import finished, total
from dml_fast.loss.disagreement import add_disagreement
from dml_fast.loss.factors import Factor, column, inverse
from dml_fast.loss.problem import Losses, MutualStats, Problem, Solution
from dml_fast.loss.values import may_look

SCRATCH, IN_PLACE = 8, False  # see `dml_fast.loss.problem.Backend`


class _Coins(NamedTuple):
    """Bernoulli distributions by their logits t, (L, N, C)."""

    size: Tensor  # |t|
    positive: Tensor  # whether t >= 0
    log_sum: Tensor  # g
    p: Tensor
    less: Tensor  # 1 - p, without cancellation
    entropy: Tensor  # (L, N) summed over the classes


class _Peers(NamedTuple):
    """The sums over a student's peers; `share` multiplies them."""

    mix: Tensor  # V: (N, C) for all students, or (K, N, C)
    less: Tensor  # U
    mass: Factor  # W: a number, (N,), or (K, N)
    entropy: Tensor  # (N,) or (K, N)
    share: Factor


def solve(problem: Problem, with_grad: bool, stats: str) -> Solution:
    """As `dml_fast.loss.problem.Backend.solve`."""
    with torch.no_grad():
        return finished(problem, *compute(problem, with_grad, stats))


def differentiable(
    problem: Problem, logits: tuple[Tensor, ...], stats: str, separate: bool = False
) -> tuple[Losses, MutualStats | None]:
    """As `dml_fast.loss.problem.Backend.differentiable`, with gradients from the forward pass."""
    with torch.no_grad():
        computed = compute(problem, True, stats)
    return tied(*computed, logits, separate)


def two_classes(logits: Tensor) -> Tensor:
    """Return (..., 2) logits whose softmax is (p, 1 - p) with p = sigmoid(logits)."""
    return torch.stack([logits, torch.zeros_like(logits)], -1)


def compute(
    problem: Problem, with_grad: bool, stats: str
) -> tuple[Tensor, Tensor | None, MutualStats | None]:
    """Return losses, gradients (K, N, C) in ``problem.dtype`` before `grad_scale`, statistics."""
    students, rows, classes = problem.shape
    hot, target = problem.temperature != 1.0, problem.soft
    assert target is not None
    z = torch.stack([one.to(problem.dtype) for one in problem.students + problem.teachers])
    usable = None
    if not (may_look(z.device) and math.isfinite(z.sum().item())):
        usable = z.isfinite().all(-1)  # (L, N)
        z = z.masked_fill(~usable.unsqueeze(-1), 0.0)
    coins = _toss(z / problem.temperature if hot else z)
    own = _toss(z[:students]) if hot else _first(coins, students)
    teaching = len(z) > 1
    peers = _listen(problem, coins, usable) if teaching else None

    away = torch.where(own.positive, 1 - target, target)  # what |z| multiplies
    ce_rows = (own.log_sum + own.size * away).sum(-1) / classes
    kl_rows = torch.zeros_like(ce_rows)
    if peers is not None:
        kl_rows = _divergence(problem, peers, _first(coins, students))
    if usable is not None:
        ce_rows = ce_rows.masked_fill(~usable[:students], math.nan)
        if teaching:
            kl_rows = kl_rows.masked_fill(~usable[:students], math.nan)
    if problem.row_weight is not None:
        ce_rows, kl_rows = ce_rows * problem.row_weight, kl_rows * problem.row_weight
    ce, kl = ce_rows.sum(1), kl_rows.sum(1)
    whole = (rows, rows) if problem.whole is None else problem.whole
    per_label, per_row = inverse(whole[0]), inverse(whole[1])
    mean_ce, mean_kl = ce * per_label, kl * per_row
    if problem.reduction == "mean":
        losses = total(problem, mean_ce, mean_kl)
    else:
        per_label = per_row = 1.0
        losses = total(problem, *((ce, kl) if problem.reduction == "sum" else (ce_rows, kl_rows)))

    grads = None
    if with_grad:
        weight: Factor = 1.0 if problem.row_weight is None else problem.row_weight
        pull = problem.ce_weight / classes * per_label * weight
        grads = (own.p - target) * column(pull)
        if peers is not None:
            strength = peers.share * weight * problem.kl_weight
            strength = strength * (problem.temperature / classes * per_row)
            apart = _first(coins, students).p * column(peers.mass) - peers.mix
            grads = grads + apart * column(strength)
        if usable is not None:
            grads = grads.masked_fill(~usable[:students].unsqueeze(-1), math.nan)
    if stats == "none":
        return losses, grads, None
    correct = ((z[:students] > 0) == (target > 0.5)).all(-1)
    finite = torch.ones(students, dtype=torch.bool, device=z.device)
    if usable is not None:
        correct, finite = correct & usable[:students], usable[:students].all(1)
    measured = MutualStats(mean_ce, mean_kl, correct.sum(1), finite)
    if stats == "all":
        measured = add_labels_disagreement(problem, measured)
    return losses, grads, measured


def _toss(t: Tensor) -> _Coins:
    size, positive = t.abs(), t >= 0
    e = torch.exp(-size)
    larger = (1 + e).reciprocal()
    smaller, log_sum = e * larger, torch.log1p(e)
    return _Coins(
        size=size,
        positive=positive,
        log_sum=log_sum,
        p=torch.where(positive, larger, smaller),
        less=torch.where(positive, smaller, larger),
        entropy=(log_sum + size * smaller).sum(-1),
    )


def _first(coins: _Coins, students: int) -> _Coins:
    """Return the students' part."""
    if len(coins.p) == students:
        return coins
    return _Coins(*(part[:students] for part in coins))


def _listen(problem: Problem, coins: _Coins, usable: Tensor | None) -> _Peers:
    p, less, entropy = coins.p, coins.less, coins.entropy
    present = None if usable is None else usable.to(p.dtype)
    if present is not None:
        p, less = p * present.unsqueeze(-1), less * present.unsqueeze(-1)
        entropy = entropy * present
    if problem.peer_weight is not None:
        weight = problem.peer_weight.unsqueeze(-1)  # (K, L, 1)
        mix = torch.zeros(problem.shape, dtype=p.dtype, device=p.device)
        rest = torch.zeros_like(mix)
        for each, p_l, less_l in zip(weight.unbind(1), p, less, strict=True):
            # Not a matrix product: autocast would round it to bf16, CUDA perhaps to TF32.
            mix.addcmul_(each.unsqueeze(-1), p_l)
            rest.addcmul_(each.unsqueeze(-1), less_l)
        there = torch.ones_like(entropy) if present is None else present
        return _Peers(mix, rest, (weight * there).sum(1), (weight * entropy).sum(1), 1.0)
    mean = problem.peer_reduction == "mean"
    mix, rest, entropy = p.sum(0), less.sum(0), entropy.sum(0)
    if present is None:
        return _Peers(mix, rest, float(len(p)), entropy, 1.0 / (len(p) - 1) if mean else 1.0)
    count = present.sum(0)  # (N,)
    share = (count - 1).reciprocal() if mean else torch.ones_like(count)
    return _Peers(mix, rest, count, entropy, share.masked_fill(count < 2, 0.0))


def _divergence(problem: Problem, peers: _Peers, mine: _Coins) -> Tensor:
    """Return T² times the weighted mean over classes of the sum of KL(p_l || p_k), (K, N)."""
    crossed = mine.size * torch.where(mine.positive, peers.less, peers.mix)
    crossed = (crossed + mine.log_sum * column(peers.mass)).sum(-1)
    rows = crossed - peers.entropy
    if problem.peer_weight is None:
        rows = rows.clamp(min=0.0)  # a divergence is never negative, but its rounding error may be
    return rows * (peers.share * (problem.temperature**2 / problem.shape[2]))


def add_labels_disagreement(problem: Problem, measured: MutualStats) -> MutualStats:
    """Add the statistics that compare students, means over the classes of those of each class."""
    students, rows, classes = problem.shape
    z = torch.stack([one.to(problem.dtype) for one in problem.students]) / problem.temperature
    wrong = ~z.isfinite().all(-1, keepdim=True)
    pairs = two_classes(z.masked_fill(wrong, math.nan)).log_softmax(-1)
    each = torch.Size((rows * classes,))
    found = add_disagreement(measured, pairs.reshape(students, rows * classes, 2), each)
    assert found.row_mutual_information is not None
    by_row = found.row_mutual_information.reshape(rows, classes).mean(-1)
    return found._replace(row_mutual_information=by_row.reshape(problem.batch_shape))
