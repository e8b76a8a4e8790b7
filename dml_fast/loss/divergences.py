"""Divergences besides the paper's KL(p_l || p_k), in plain torch: O(K), peers constant.

As in `dml_fast.loss.closed_form`, p_l = softmax(z_l / T), w_kl are the peers' weights and
W_k = Σ_l w_kl. For one row of student k, with x y and log taken class by class,

    reverse    T² Σ_l w_kl KL(p_k || p_l) = T² ⟨p_k, g⟩,   g = W_k log p_k - Σ_l w_kl log p_l
    symmetric  half of the paper's and half of the reverse one
    jsd        T² W_k (β KL(p̄ || m) + (1 - β) KL(p_k || m)),   p̄ = Σ_l w_kl p_l / W_k,
               m = β p̄ + (1 - β) p_k,   g = (1 - β) W_k log(p_k / m)

The gradients of the first and the last with respect to z_k are both T p_k (g - ⟨p_k, g⟩): those
of g itself, through log p_k and through m, sum to zero. With uniform weights Σ_l log p_l may
include l = k and is shared by all students, as KL(p_k || p_k) = 0. The peers' mean p̄ leaves the
student out: sums from both ends give it without a difference, whose rounding error log(p̄ / m)
would show.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dml_fast.loss.factors import Factor, column, inverse
from dml_fast.loss.problem import Problem
from dml_fast.loss.values import choice, fail, number

DIVERGENCES = ("forward", "reverse", "symmetric", "jsd")
_BETA = 0.5


class Apart(NamedTuple):
    """How far each student is from its peers, with T² and the peers' weights."""

    rows: Tensor  # (K, N), NaN where the student is unusable
    grads: Tensor | None  # (K, N, C) of the rows with respect to z_k


def check(
    divergence: str, beta: Any, kl_rows: str = "all", distribution: str = "categorical"
) -> float:
    """Return beta; refuse an unknown divergence, and what does not go with it."""
    choice(divergence, "divergence", DIVERGENCES)
    choice(kl_rows, "kl_rows", ("all", "labelled"))
    share = number(beta, "beta")
    if not 0 < share < 1:
        fail(f"beta is {share}", "it is the peers' share of the mixture, above 0 and below 1")
    if share != _BETA and divergence != "jsd":
        fail(f"beta is {share} and divergence {divergence!r}", "beta is for divergence='jsd'")
    if divergence != "forward" and distribution != "categorical":
        fail(
            f"divergence is {divergence!r} and distribution {distribution!r}",
            "labels that do not exclude each other have divergence='forward' only",
        )
    if kl_rows != "all" and distribution != "categorical":
        fail(
            f"kl_rows is {kl_rows!r} and distribution {distribution!r}",
            "every row of labels that do not exclude each other has its labels",
        )
    return share


def measure(
    problem: Problem, p: Tensor, log_p: Tensor, usable: Tensor | None, with_grad: bool
) -> Apart:
    """Return what is no KL(p_l || p_k): all of the divergence, or half of the symmetric one.

    Args:
        problem: the arguments of the call.
        p: (L, N, C) probabilities of students and teachers.
        log_p: their logarithms; a number that is the same everywhere may be added.
        usable: (L, N) bool; None: all rows are usable and no class is masked.
        with_grad: whether the gradients are wanted.

    Raises:
        UserError: if a weight of a peer is negative where their mean is needed; a CPU sees it.
    """
    if not isinstance(problem.kl_weight, Tensor) and problem.kl_weight == 0:
        with_grad = False  # with a weight of 0, not even an infinite divergence counts
    if problem.divergence == "jsd":
        return _jsd(problem, p, usable, with_grad)
    apart = _reverse(problem, p, log_p, usable, with_grad)
    if problem.divergence == "reverse":
        return apart
    return Apart(apart.rows * 0.5, None if apart.grads is None else apart.grads.mul_(0.5))


def _reverse(
    problem: Problem, p: Tensor, log_p: Tensor, usable: Tensor | None, with_grad: bool
) -> Apart:
    """Return the weighted sum over the peers l of KL(p_k || p_l).

    It is +inf where p_k > 0 = p_l, and the row's gradient, which does not exist there, NaN.
    """
    students = len(problem.students)
    own, own_log = p[:students], log_p[:students]
    if usable is not None:
        log_p = log_p.masked_fill(~usable.unsqueeze(-1), 0.0)
    weight: Tensor | None = None
    share: Factor = 1.0
    mass: Factor
    if problem.peer_weight is not None:
        weight = _weights(problem.peer_weight, usable)
        mass = weight.sum(1).unsqueeze(-1)
        mix = _weighted(weight, log_p, guard=usable is not None)
    else:
        mix, mass = log_p.sum(0), float(len(p))
        peers: Factor = mass - 1
        if usable is not None:
            count = usable.sum(0).to(p.dtype)
            mass, peers = count.unsqueeze(-1), count - 1
        share = inverse(peers) if problem.peer_reduction == "mean" else 1.0
    g = (own_log * mass).sub_(mix)
    if usable is not None:
        g.masked_fill_(own == 0, 0.0)  # 0 x inf, and inf - inf
    rows = (own * g).sum(-1)
    grads = None
    if with_grad:
        grads = (own * (g - rows.unsqueeze(-1))).mul_(column(share * problem.temperature))
        if usable is not None:
            grads.masked_fill_(rows.isinf().unsqueeze(-1), math.nan)
    if weight is None:
        rows = rows.clamp(min=0.0)  # a divergence is never negative, but its rounding error may be
    return Apart(_marked(rows * (share * problem.temperature**2), usable), grads)


def _jsd(problem: Problem, p: Tensor, usable: Tensor | None, with_grad: bool) -> Apart:
    """Return the Jensen-Shannon divergence of p_k and its peers' mean."""
    students = len(problem.students)
    own, beta = p[:students], problem.beta
    if usable is not None:
        p = p.masked_fill(~usable.unsqueeze(-1), 0.0)
    mass: Factor
    total: Factor
    if problem.peer_weight is not None:
        _not_negative(problem.peer_weight)
        weight = _weights(problem.peer_weight, usable)
        total = mass = weight.sum(1)
        mean = _weighted(weight, p, guard=False)
    else:
        mean, total = _others(p, students), float(len(p) - 1)
        if usable is not None:
            there = usable.to(p.dtype)
            total = there.sum(0) - there[:students]
        # A student without a usable peer learns from the label alone.
        mass = total * inverse(total) if problem.peer_reduction == "mean" else total
    mean = mean * column(inverse(total))
    # In a class the two terms' first orders cancel: so small differences keep their digits.
    log_own = _log_of_mixture(own, mean, beta)  # log(m / p_k)
    log_mean = _log_of_mixture(mean, own, 1 - beta)
    rows = (mean * log_mean).sum(-1) * -beta - (own * log_own).sum(-1) * (1 - beta)
    grads = None
    if with_grad:
        middle = (own * log_own).sum(-1, keepdim=True)
        grads = own * (middle - log_own)
        grads = grads * column(mass * ((1 - beta) * problem.temperature))
    rows = rows.clamp(min=0.0) * (mass * problem.temperature**2)
    return Apart(_marked(rows, usable), grads)


def _weights(peer_weight: Tensor, usable: Tensor | None) -> Tensor:
    """Return the weights (K, L, N), or (K, L, 1) where they are those of every row."""
    weight = peer_weight.unsqueeze(-1)
    return weight if usable is None else weight * usable.to(weight.dtype)


def _weighted(weight: Tensor, values: Tensor, guard: bool) -> Tensor:
    """Return Σ_l w_kl x_l, (K, N, C); `guard` takes 0 x -inf as 0."""
    mix = torch.zeros(len(weight), *values.shape[1:], dtype=values.dtype, device=values.device)
    for each, one in zip(weight.unbind(1), values, strict=True):
        factor = each.unsqueeze(-1)
        # Not a matrix product: autocast would round it to bf16, CUDA perhaps to TF32.
        mix += (one * factor).masked_fill_(factor == 0, 0.0) if guard else one * factor
    return mix


def _others(p: Tensor, students: int) -> Tensor:
    """Return for each student the sum of all other distributions, (K, N, C)."""
    before, after = [torch.zeros_like(p[0])], [torch.zeros_like(p[0])]
    for left, right in zip(p[:-1], p.flip(0)[:-1], strict=True):
        before.append(before[-1] + left)
        after.append(after[-1] + right)
    after.reverse()
    return torch.stack([b + a for b, a in zip(before[:students], after, strict=False)])


def _log_of_mixture(p: Tensor, other: Tensor, share: float) -> Tensor:
    """Return log(m / p) with m = p + share (other - p); finite, and of no meaning where p is 0."""
    tiny = torch.finfo(p.dtype).tiny
    least = p.clamp_min(tiny)
    near = ((other - p) * share) / least
    far = (p * (1 - share) + other * share) / least
    return torch.where(near.abs() < 0.5, near.log1p(), far.clamp_min(tiny).log())


def _not_negative(weight: Tensor) -> None:
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return  # reading it would wait for the device, or break the graph
    if (weight < 0).any():
        fail(
            f"peer_weight has {weight[weight < 0][0].item():g}",
            "with divergence='jsd' the peers' mean needs weights of 0 or more",
        )


def _marked(rows: Tensor, usable: Tensor | None) -> Tensor:
    """Return the rows, NaN where the student is unusable."""
    return rows if usable is None else rows.masked_fill(~usable[: len(rows)], math.nan)
