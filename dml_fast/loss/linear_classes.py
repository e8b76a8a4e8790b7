"""Gradients of the mutual loss for some classes of all rows, in plain torch.

The softmax of a chunk of classes needs each row's maximum and sum over all classes. `summarise`
saves them for some rows, `overwrite` reads them; with p = softmax(z / T), q = softmax(z) and the
row's factors, a student's gradient is A p + B q - U, class by class (`dml_fast.loss.closed_form`).
The kernels have the same two functions in `dml_fast.kernels.classes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dml_fast.loss.factors import column, inverse
from dml_fast.loss.problem import Backend, Problem, Solution
from dml_fast.loss.values import may_look


def scratch(distributions: int) -> int:
    """Return how many numbers `overwrite` holds for each row and class, beside the logits."""
    return distributions + 3


def unsupported_reason(problem: Problem) -> str | None:
    """Return why the gradients cannot be computed for some classes at a time, or None."""
    if problem.divergence != "forward":
        return f"divergence {problem.divergence!r} needs further sums over all classes"
    return None


def summarise(solver: Backend, problem: Problem, stats: str) -> tuple[Solution, Tensor]:
    """Return losses and statistics of some rows, and what `overwrite` needs of each row.

    That is (2 L + K + 1, n) in ``problem.dtype``: the maxima of all distributions, the reciprocal
    sums of exp((z - maximum) / T), those of the students at T = 1, and the sum of the row's target.
    """
    count = len(problem.students)
    tops, sums, plain = [], [], []
    for k, z in enumerate(problem.students + problem.teachers):
        top = z.amax(1, keepdim=True).to(problem.dtype)
        below = z.to(problem.dtype) - top
        if problem.temperature != 1.0:
            if k < count:
                plain.append(below.exp().sum(1).reciprocal_())
            below.div_(problem.temperature)
        sums.append(below.exp_().sum(1).reciprocal_())
        tops.append(top.squeeze(1))
        del below
    solution = solver.solve(problem, False, stats)
    return solution, torch.stack([*tops, *sums, *(plain or sums[:count]), _mass(problem)])


def _mass(problem: Problem) -> Tensor:
    """Return the sum of each row's target over the classes, times their weights."""
    smoothing, weight, classes = problem.label_smoothing, problem.class_weight, problem.shape[2]
    if problem.soft is not None:
        target = problem.soft
        if smoothing:
            target = target * (1 - smoothing) + smoothing / classes
        return (target if weight is None else target * weight).sum(1)
    index, valid = _labels(problem)
    own = torch.ones_like(index, dtype=problem.dtype) if weight is None else weight[index]
    total = float(classes) if weight is None else weight.sum()
    return (own * (1 - smoothing) + total * (smoothing / classes)) * valid


def _labels(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the classes, 0 where there is none, and whether there is one."""
    assert problem.index is not None
    index = problem.index.long()
    if problem.ignore_index is None:
        return index, torch.ones_like(index, dtype=torch.bool)
    valid = index != problem.ignore_index
    return index.masked_fill(~valid, 0), valid


def overwrite(
    problem: Problem,
    saved: Tensor,
    outer: Tensor,
    start: int,
    classes: int,
    learners: Sequence[bool],
) -> None:
    """Write the gradients of ``(losses * outer).sum()`` over the logits of the students that learn.

    Args:
        problem: all rows, with the logits (N, c) of some classes, contiguous and nobody's else;
            target and weights are those of all classes, and `Problem.whole` is given.
        saved: (2 L + K + 1, N) of `summarise`.
        outer: (K,) or (K, N) in ``problem.dtype``.
        start: the first of these classes.
        classes: C.
        learners: K, whether a student's gradients are wanted.
    """
    everyone = problem.students + problem.teachers
    count, total = len(problem.students), len(everyone)
    tops, per_d, per_e = saved[:total], saved[total : 2 * total], saved[2 * total : -1]
    usable: Tensor | None = ~per_d.isnan()
    if usable is not None and may_look(saved.device) and bool(usable.all()):
        usable = None
    tempered, weighted = problem.temperature != 1.0, problem.peer_weight is not None
    p = []
    for k, z in enumerate(everyone):
        # Probabilities take the logits' place where these are not read again.
        over = not tempered and not weighted and z.dtype == problem.dtype
        below = torch.sub(z, column(tops[k]), out=z) if over else z - column(tops[k])
        if tempered:
            below.div_(problem.temperature)
        p.append(_exp(below, per_d[k], None if usable is None else usable[k]))
    factors = _factors(problem, saved[-1], outer, usable)
    mix = None
    if total > 1 and not weighted:
        mix = p[0].clone()
        for one in p[1:]:
            mix.add_(one)
    for k in (k for k in range(count) if learners[k]):
        z = problem.students[k]
        if total > 1 and problem.peer_weight is not None:
            mix = torch.zeros_like(p[0])
            for weight, one in zip(problem.peer_weight[k], p, strict=True):
                mix.addcmul_(weight, one)
        if tempered:
            g = _exp(z - column(tops[k]), per_e[k], None if usable is None else usable[k])
            g.mul_(column(factors.push_q[k])).addcmul_(p[k], column(factors.push_p[k]))
        else:
            push = column(factors.push_p[k] + factors.push_q[k])
            g = p[k] * push if weighted else p[k].mul_(push)
        if mix is not None:
            g.addcmul_(mix, column(factors.pull[k]), value=-1)
        _subtract_target(problem, g, factors.label[k], start, classes)
        if g is not z:
            z.copy_(g)


def _exp(below: Tensor, share: Tensor, usable: Tensor | None) -> Tensor:
    """Return probabilities in place, 0 in unusable rows."""
    below.exp_().mul_(column(share))
    return below if usable is None else below.masked_fill_(~column(usable), 0.0)


class _Factors(NamedTuple):
    """What multiplies a row, (K, N) each."""

    push_p: Tensor
    push_q: Tensor  # NaN where the student is unusable
    pull: Tensor  # of Σ_l w_kl p_l, or with uniform weights of Σ_l p_l
    label: Tensor  # of the target


def _factors(problem: Problem, mass: Tensor, outer: Tensor, usable: Tensor | None) -> _Factors:
    assert problem.whole is not None
    students, rows, _ = problem.shape
    total = students + len(problem.teachers)
    each = outer.reshape(students, -1).expand(students, rows)
    if problem.row_weight is not None:
        each = each * problem.row_weight
    labels, peers = map(inverse, problem.whole) if problem.reduction == "mean" else (1.0, 1.0)
    label = each * labels * problem.ce_weight
    present = torch.ones_like(mass) if usable is None else usable.to(problem.dtype)
    if problem.peer_weight is not None:
        heard = (problem.peer_weight.unsqueeze(-1) * present).sum(1)
        share = torch.ones_like(heard)
    else:
        heard = present.sum(0) if usable is not None else present * total
        share = torch.ones_like(heard)
        if problem.peer_reduction == "mean":
            share = (heard - 1).clamp_(min=1.0).reciprocal_()
        share = share.masked_fill_(heard < 2, 0.0)
    pull = each * share * problem.kl_weight * (problem.temperature * peers)
    push_p, push_q = pull * heard, label * mass
    if usable is not None:
        push_q = push_q.masked_fill(~usable[:students], math.nan)
    if problem.kl_rows == "labelled" and problem.index is not None:
        _, valid = _labels(problem)
        push_p, push_q, pull = (x.masked_fill(~valid, 0.0) for x in (push_p, push_q, pull))
    return _Factors(push_p, push_q, pull, label)


def _subtract_target(problem: Problem, g: Tensor, label: Tensor, start: int, classes: int) -> None:
    """Subtract the target of these classes, times the factor ``label`` (N,) of the rows."""
    smoothing, span = problem.label_smoothing, slice(start, start + g.shape[1])
    weight = problem.class_weight
    if problem.soft is not None:
        target = problem.soft[:, span]
        if smoothing:
            target = target * (1 - smoothing) + smoothing / classes
        g.addcmul_(target if weight is None else target * weight[span], column(label), value=-1)
        return
    index, valid = _labels(problem)
    label = label * valid
    if smoothing:
        if weight is None:
            g.sub_(column(label * (smoothing / classes)))
        else:
            g.addcmul_(weight[span], column(label * (smoothing / classes)), value=-1)
    sparse = label * -(1 - smoothing) if weight is None else label * weight[index] * (smoothing - 1)
    here = index - start
    outside = (here < 0) | (here >= g.shape[1])
    at = here.masked_fill(outside, 0).unsqueeze(-1)
    g.scatter_add_(1, at, column(sparse.masked_fill(outside, 0.0)))
