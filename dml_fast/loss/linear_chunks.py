"""The mutual loss of linear heads, some rows at a time: all logits never exist at once.

For each chunk of n rows, compute the logits z_k = h_k W_kᵀ + b_k of all students, let a backend
compute losses and gradients g_k (n, C), and use these at once:

    dh_k = g_k W_k,    dW_k += g_kᵀ h_k,    db_k += Σ_rows g_k.

Dtypes. Logits, their gradients and the operands of the products have the dtype in which
`torch.nn.functional.linear` would compute here. Losses and gradients of the heads are summed in
fp32 (fp64 for fp64) whatever that dtype is: a bf16 sum loses every term below 1/512 of itself, and
most rows add less than that to most classes. So a half-precision weight with a gradient costs 4
bytes during the call instead of 2. No memory grows with N C.

Range. If they included the mean's 1/N, most gradients of logits would be below the smallest fp16
number. So 1/N is left out until the sum, which is fp32. The scales used for this are powers of two
and cause no rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dml_fast.loss.autograd import once, saved_once
from dml_fast.loss.linear_heads import Head
from dml_fast.loss.problem import Backend, Losses, MutualStats, Problem
from dml_fast.loss.products import add_product

LIFT = 16.0  # scales g_k, so that fp16 has full precision from 4e-6 and overflows at 4,000
LEAST_BYTES = 2**26  # a chunk may take this much, however small the heads are


class Grads(NamedTuple):
    """Gradients of one head; None where not wanted."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (C, D)
    bias: Tensor | None  # (C,)


class Wanted(NamedTuple):
    """Which gradients of a head are wanted."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything a call needs except the students' heads.

    Attributes:
        problem: the whole batch; its logits are placeholders of the right shape and dtype.
        teachers: the teachers' heads, in the dtypes to compute in.
        solver: the backend.
        chunk_rows: rows per chunk.
        softcap: logits z become softcap tanh(z / softcap); None: they stay as they are.
        asked_rows: the rows per chunk that the user has given, if any.
    """

    problem: Problem
    teachers: list[Head]
    solver: Backend
    chunk_rows: int
    softcap: float | None = None
    asked_rows: int | None = None

    def logits(self, head: Head) -> Tensor:
        """Return the logits (n, C) of a head's rows."""
        found = F.linear(*head)
        if self.softcap is None:
            return found
        exact = found if found.dtype == torch.float64 else found.float()
        return (exact / self.softcap).tanh_().mul_(self.softcap).to(found.dtype)

    def slope(self, capped: Tensor) -> Tensor | None:
        """Return the derivative of capped logits by the logits before; None without a cap."""
        if self.softcap is None:
            return None
        exact = capped if capped.dtype == torch.float64 else capped.float()
        return 1 - (exact / self.softcap).square_()

    @staticmethod
    def uncap(grads: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> None:
        """Turn gradients of capped logits into those of the logits before, in place."""
        for g, slope in zip(grads, slopes, strict=True):
            if slope is not None:
                g.mul_(slope)

    def constants(self) -> list[Tensor]:
        """Return the tensors that the losses depend on without having a gradient for them."""
        p = self.problem
        given = [p.index, p.soft, p.class_weight, p.row_weight, p.peer_weight, p.kl_weight]
        given += [tensor for head in self.teachers for tensor in head]
        return [one for one in given if isinstance(one, Tensor)]


def default_rows(heads: Sequence[Head], problem: Problem, solver: Backend) -> int:
    """Return how many rows take a quarter of the memory of the weights' gradients in fp32.

    A row takes its logits, their gradients and the backend's scratch. So a chunk adds little to
    the memory that is needed anyway. It has about D / (bytes per logit) rows, enough to make
    reading all weights worthwhile. A GPU's chunk takes half, and its gradients the place of the
    logits: that is four times as many rows, which hides the traffic of the sums of the weights'
    gradients from 930 rows on (700 TFLOP/s, 3 TB/s). Small heads get chunks of `LEAST_BYTES`.
    """
    exact = problem.dtype.itemsize
    part = 2 if solver.IN_PLACE else 4
    row = problem.shape[-1] * logit_bytes(problem, solver)
    rows = max(exact * sum(h.weight.numel() for h in heads) // part, LEAST_BYTES) // row
    return max(1, rows - rows % 16 if rows > 16 else rows)


def logit_bytes(problem: Problem, solver: Backend) -> int:
    """Return the bytes that a chunk holds for a class of a row: logits, gradients and scratch."""
    scratch = problem.dtype.itemsize * solver.SCRATCH
    tensors = 1 if solver.IN_PLACE else 2
    everyone = problem.students + problem.teachers
    return sum(tensors * z.dtype.itemsize + scratch for z in everyone)


def differentiable(
    plan: Plan, heads: Sequence[Head], wanted: Sequence[Wanted], stats: str, separate: bool
) -> tuple[Losses, MutualStats | None]:
    """Return losses, differentiable once with respect to what is wanted, and statistics.

    The forward pass computes the gradients, since it has the logits. With reduction "none" they
    depend on the incoming gradient of each row, so the backward pass computes the logits again.
    """
    if plan.problem.reduction == "none":
        losses, _, measured = sweep(plan, heads, [Wanted()] * len(heads), stats)
        flat = [tensor for head in heads for tensor in head]
        tied: Tensor = _Recomputed.apply(losses, plan, *flat)  # type: ignore[no-untyped-call]
        return tied, measured
    losses, grads, measured = sweep(plan, heads, wanted, stats)
    # One node per student: its gradients are freed before the next student's are scaled.
    nodes = [_TiedHead.apply(*each, *h) for *each, h in zip(losses, grads, heads, strict=True)]  # type: ignore[no-untyped-call]
    return tuple(nodes) if separate else torch.stack(nodes), measured


def sweep(
    plan: Plan,
    heads: Sequence[Head],
    wanted: Sequence[Wanted],
    stats: str,
    outer: Tensor | None = None,
) -> tuple[Tensor, list[Grads], MutualStats | None]:
    """Return losses (K,), or (K, N) with reduction "none", the gradients wanted and statistics.

    ``outer`` (K, N) multiplies the gradients row by row.
    """
    problem = plan.problem
    rows = problem.shape[1]
    per_row, with_grad = problem.reduction == "none", any(map(any, wanted))
    scale = LIFT * (2.0 ** rows.bit_length() if problem.reduction == "mean" else 1.0)
    losses, measured = [], []
    with torch.no_grad(), without_autocast(problem.device):
        whole = (problem.count_labels(), problem.count_rows())
        totals = [_empty(h, w, problem.dtype) for h, w in zip(heads, wanted, strict=True)]
        cast = [h.to(z.dtype) for h, z in zip(heads, problem.students, strict=True)]
        for start in range(0, max(rows, 1), plan.chunk_rows):
            span = slice(start, min(start + plan.chunk_rows, rows))
            chunk = [h._replace(hidden=h.hidden[span]) for h in cast]
            part = part_of(plan, span, chunk)
            part.whole, part.grad_scale = whole, scale
            part.in_place = plan.softcap is None
            some_losses, grads, some_stats = plan.solver.solve(part, with_grad, stats)
            if grads is not None:
                plan.uncap(grads, [plan.slope(z) for z in part.students])
            del part  # frees the logits before the products are computed
            losses.append(some_losses)
            measured.append(some_stats)
            if grads is not None:
                if outer is not None:
                    grads = _times(grads, outer[:, span])
                _add_products(totals, grads, chunk, span, scale)
            del grads  # frees them before the next logits are computed
        total = torch.cat(losses, 1) if per_row else torch.stack(losses).sum(0)
        return total, totals, merge(measured)


def part_of(plan: Plan, span: slice, chunk: Sequence[Head]) -> Problem:
    """Return some rows of the problem, with their logits."""
    whole = plan.problem
    teachers = [h._replace(hidden=h.hidden[span]) for h in plan.teachers]
    return dataclasses.replace(
        whole,
        students=tuple(map(plan.logits, chunk)),
        teachers=tuple(map(plan.logits, teachers)),
        batch_shape=chunk[0].hidden.shape[:1],
        index=None if whole.index is None else whole.index[span],
        soft=None if whole.soft is None else whole.soft[span],
        row_weight=None if whole.row_weight is None else whole.row_weight[span],
    )


def _empty(head: Head, wanted: Wanted, dtype: torch.dtype) -> Grads:
    def empty(tensor: Tensor | None, asked: bool) -> Tensor | None:
        return None if tensor is None or not asked else torch.empty_like(tensor, dtype=dtype)

    return Grads(*map(empty, head, wanted))


def _times(grads: Sequence[Tensor], outer: Tensor) -> tuple[Tensor, ...]:
    """Return each student's gradients (n, C) times its ``outer`` (n,), in place."""
    return tuple(g.mul_(o.unsqueeze(-1)) for g, o in zip(grads, outer, strict=True))


def _add_products(
    totals: Sequence[Grads],
    grads: Sequence[Tensor],
    chunk: Sequence[Head],
    span: slice,
    scale: float,
) -> None:
    """Add the heads' gradients of a chunk; those of its logits are ``scale`` times too large."""
    first = span.start == 0
    for total, g, head in zip(totals, grads, chunk, strict=True):
        if total.hidden is not None:
            add_product(total.hidden[span], g, head.weight, terms=1.0, scale=scale, fresh=True)
        if total.weight is not None:
            rows = 2.0 ** len(g).bit_length()
            add_product(total.weight, g.t(), head.hidden, terms=rows, scale=scale, fresh=first)
        if total.bias is not None:
            of_chunk = g.sum(0, dtype=total.bias.dtype).mul_(1 / scale)
            total.bias.copy_(of_chunk) if first else total.bias.add_(of_chunk)


def merge(parts: Sequence[MutualStats | None]) -> MutualStats | None:
    """Return the statistics of all chunks, each of which has the whole batch's denominators."""
    some = [part for part in parts if part is not None]
    if not some:
        return None
    ce, kl, correct, finite = (torch.stack(field) for field in list(zip(*some, strict=True))[:4])
    return MutualStats(ce.sum(0), kl.sum(0), correct.sum(0), finite.all(0))


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which the dtypes are those that are written down."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _TiedHead(torch.autograd.Function):
    """The loss of one student, (), whose gradients exist already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: Grads, *head: Tensor | None) -> Tensor:
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if t is None else t.dtype for t in head]
        return loss

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        scale = outer.detach()
        pairs = zip(saved_once(ctx), ctx.dtypes, strict=True)
        return None, None, *once([_scaled(g, scale, dtype) for g, dtype in pairs])


def _scaled(grad: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the scaled gradient in this dtype, rounded once and without a copy in between."""
    if grad is None:
        return None
    return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))


class _Recomputed(torch.autograd.Function):
    """Losses by rows, (K, N), whose gradients the backward pass computes."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, plan: Plan, *flat: Tensor | None) -> Tensor:
        ctx.plan, ctx.count = plan, len(flat)
        # The constants too, as autograd then checks that they have not been overwritten.
        ctx.save_for_backward(*flat, *plan.constants())
        return losses

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        flat = ctx.saved_tensors[: ctx.count]
        needed = ctx.needs_input_grad[2:]
        heads = [Head(*flat[i : i + 3]) for i in range(0, len(flat), 3)]
        wanted = [Wanted(*needed[i : i + 3]) for i in range(0, len(flat), 3)]
        _, grads, _ = sweep(ctx.plan, heads, wanted, "none", outer.detach())
        made = [g for each in grads for g in each]
        return (
            None,
            None,
            *once([g if g is None else g.to(t) for g, t in zip(made, flat, strict=True)]),
        )
