"""The mutual loss of linear heads in two passes, without fp32 gradients of the weights.

`dml_fast.loss.linear_chunks` sums the gradients of the weights over chunks of rows, in fp32, and
keeps the sums until the backward pass. Here the forward pass only computes losses and O(N) numbers.
The backward pass computes the logits again, for *some classes* of all N rows at a time, writes
their gradients over them, and has with one product

    dW_k[classes] = g_kᵀ h_k,    dh_k += g_k W_k[classes],

the finished gradient of these classes' weights, which it stores in the weights' dtype. That is 4
products in place of 3. Students that share a weight are one product with their hidden states one
below the other, and one gradient.

Range. As in `linear_chunks`, gradients of logits are scaled so that fp16 can hold them. The
incoming gradient may be a loss scaler's factor; it is applied to the products, which are fp32.
Within a shared weight its ratio between the students is applied before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dml_fast.loss import backends
from dml_fast.loss.autograd import once, saved_once
from dml_fast.loss.linear_chunks import (
    LEAST_BYTES,
    LIFT,
    Grads,
    Plan,
    Wanted,
    merge,
    part_of,
    without_autocast,
)
from dml_fast.loss.linear_heads import Head
from dml_fast.loss.problem import Losses, MutualStats
from dml_fast.loss.products import add_product


def differentiable(
    plan: Plan, heads: Sequence[Head], wanted: Sequence[Wanted], stats: str, separate: bool
) -> tuple[Losses, MutualStats | None]:
    """As `dml_fast.loss.linear_chunks.differentiable`; the backward pass computes gradients."""
    losses, saved, measured = _look(plan, heads, stats)
    flat = [tensor for head in heads for tensor in head]
    if not separate:
        tied: Tensor = _Lean.apply(losses, None, plan, saved, *flat)  # type: ignore[no-untyped-call]
        return tied, measured
    nodes = []
    for k, loss in enumerate(losses):
        # A peer's trunk must not hear of this loss.
        own = [t if t is None or i // 3 == k else t.detach() for i, t in enumerate(flat)]
        nodes.append(_Lean.apply(loss.clone(), k, plan, saved, *own))  # type: ignore[no-untyped-call]
    return tuple(nodes), measured


def _look(
    plan: Plan, heads: Sequence[Head], stats: str
) -> tuple[Tensor, Tensor, MutualStats | None]:
    """Return losses (K,), or (K, N) with reduction "none"; the rows' numbers; and statistics."""
    problem = plan.problem
    rows = problem.shape[1]
    losses, saved, measured = [], [], []
    with torch.no_grad(), without_autocast(problem.device):
        whole = (problem.count_labels(), problem.count_rows())
        cast = [h.to(z.dtype) for h, z in zip(heads, problem.students, strict=True)]
        for start in range(0, max(rows, 1), plan.chunk_rows):
            span = slice(start, min(start + plan.chunk_rows, rows))
            part = part_of(plan, span, [h._replace(hidden=h.hidden[span]) for h in cast])
            part.whole = whole
            solution, of_rows = backends.by_class(plan.solver).summarise(plan.solver, part, stats)
            del part
            losses.append(solution.losses)
            measured.append(solution.stats)
            saved.append(of_rows)
    per_row = problem.reduction == "none"
    total = torch.cat(losses, 1) if per_row else torch.stack(losses).sum(0)
    return total, torch.cat(saved, 1), merge(measured)


class _Stack:
    """The hidden states of students that share a weight and a bias, one below the other."""

    def __init__(self, members: Sequence[int], heads: Sequence[Head], dtype: torch.dtype):
        self.members = members
        self.first = heads[members[0]]
        hidden = [heads[k].hidden.to(dtype) for k in members]
        self.hidden = hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def part(self, span: slice) -> Head:
        """Return the head of some classes."""
        return _of_classes(self.first._replace(hidden=self.hidden), span).to(self.hidden.dtype)


def _of_classes(head: Head, span: slice) -> Head:
    bias = None if head.bias is None else head.bias[span]
    return Head(head.hidden, head.weight[span], bias)


def default_classes(plan: Plan, heads: Sequence[Head]) -> int:
    """Return how many classes of all rows take a sixteenth of the weights' gradients in fp32.

    Where the user has given the rows of a chunk, they are as many logits as those rows have.
    """
    problem = plan.problem
    _, rows, classes = problem.shape
    if plan.asked_rows is not None:
        return max(1, plan.asked_rows * classes // max(rows, 1))
    exact = problem.dtype.itemsize
    everyone = problem.students + problem.teachers
    scratch: int = exact * backends.by_class(plan.solver).scratch(len(everyone))
    column = max(rows, 1) * (sum(z.dtype.itemsize for z in everyone) + scratch)
    most = max(exact * sum(h.weight.numel() for h in heads) // 16, LEAST_BYTES) // column
    return max(1, most - most % 64 if most > 64 else most)


def _gradients(
    plan: Plan,
    heads: Sequence[Head],
    wanted: Sequence[Wanted],
    saved: Tensor,
    outer: Tensor,
    joint: bool,
) -> list[Grads]:
    """Return the gradients of ``(losses * outer).sum()`` in the heads' dtypes.

    With ``joint`` a tensor of several students has all of its gradient at the first of them.
    """
    problem, by_class = plan.problem, backends.by_class(plan.solver)
    _, rows, classes = problem.shape
    scale = LIFT * (2.0 ** rows.bit_length() if problem.reduction == "mean" else 1.0)
    learners = [any(each) for each in wanted]
    step = default_classes(plan, heads)
    with torch.no_grad(), without_autocast(problem.device):
        whole = (problem.count_labels(), problem.count_rows())
        stacks = _stacks(plan, heads, joint)
        owner = _owners([h.weight for h in heads], joint)
        size, ratio = _sizes(outer.to(problem.dtype).reshape(len(heads), -1), owner)
        sums = _Sums(heads, wanted, stacks, owner, size, scale, problem.dtype, joint)
        for start in range(0, classes, step):
            span = slice(start, min(start + step, classes))
            parts = [stack.part(span) for stack in stacks]
            made = [plan.logits(part) for part in parts]
            students = _by_student(stacks, made)
            teachers = tuple(plan.logits(_of_classes(h, span)) for h in plan.teachers)
            part = dataclasses.replace(problem, students=students, teachers=teachers, whole=whole)
            slopes = [plan.slope(logits) for logits in made]
            by_class.overwrite(part, saved, ratio * scale, start, classes, learners)
            del part, students, teachers
            plan.uncap(made, slopes)
            del slopes
            sums.add(made, parts, span)
            del made
        return sums.finished()


def _by_student(stacks: Sequence[_Stack], made: Sequence[Tensor]) -> tuple[Tensor, ...]:
    found: dict[int, Tensor] = {}
    for stack, logits in zip(stacks, made, strict=True):
        found |= zip(stack.members, logits.chunk(len(stack.members)), strict=True)
    return tuple(found[k] for k in range(len(found)))


def _stacks(plan: Plan, heads: Sequence[Head], joint: bool) -> list[_Stack]:
    """Return the students by weight and bias; each alone unless all have their gradients now."""
    groups: dict[Any, list[int]] = {}
    for k, (head, z) in enumerate(zip(heads, plan.problem.students, strict=True)):
        alike = (id(head.weight), id(head.bias), z.dtype)
        groups.setdefault(alike if joint else k, []).append(k)
    dtypes = [z.dtype for z in plan.problem.students]
    return [_Stack(members, heads, dtypes[members[0]]) for members in groups.values()]


def _owners(tensors: Sequence[Tensor | None], joint: bool) -> list[int]:
    """Return for each student the first that has the same tensor."""
    first: dict[int, int] = {}
    if not joint:
        return list(range(len(tensors)))
    return [k if t is None else first.setdefault(id(t), k) for k, t in enumerate(tensors)]


def _sizes(outer: Tensor, owner: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the largest incoming gradient among those with one weight, (K,), and all over it.

    Not signs or numbers that are not finite: these stay where they are.
    """
    if not outer.numel():
        return outer.new_ones(len(outer)), outer
    largest = outer.abs().nan_to_num_(0.0, 0.0, 0.0).amax(1)
    groups = [[j for j, o in enumerate(owner) if o == k] for k in owner]
    size = torch.stack([torch.stack([largest[j] for j in group]).amax() for group in groups])
    size = torch.where(size == 0, 1.0, size)
    return size, outer / size.unsqueeze(1)


class _Sums:
    """The gradients of all heads while they are made."""

    def __init__(
        self,
        heads: Sequence[Head],
        wanted: Sequence[Wanted],
        stacks: Sequence[_Stack],
        owner: Sequence[int],
        size: Tensor,
        scale: float,
        dtype: torch.dtype,
        joint: bool,
    ):
        self._heads, self._stacks, self._owner = heads, stacks, owner
        self._size, self._scale, self._dtype = size, scale, dtype
        self._bias_owner = _owners([h.bias for h in heads], joint)
        self._wanted = wanted
        self._weight = {
            k: torch.empty_like(heads[k].weight) for k in dict.fromkeys(owner) if wanted[k].weight
        }
        self._bias = {
            k: heads[k].weight.new_zeros(len(heads[k].weight), dtype=dtype)
            for k in dict.fromkeys(self._bias_owner)
            if wanted[k].bias
        }
        self._hidden = [
            torch.empty_like(stack.hidden, dtype=dtype)
            if any(wanted[k].hidden for k in stack.members)
            else None
            for stack in stacks
        ]

    def add(self, grads: Sequence[Tensor], parts: Sequence[Head], span: slice) -> None:
        """Add what the gradients of some classes' logits (N, c) give."""
        scale, ready = self._scale, set()
        products: dict[int, Tensor] = {}
        for i, (g, part) in enumerate(zip(grads, parts, strict=True)):
            k = self._stacks[i].members[0]
            if (hidden := self._hidden[i]) is not None:
                first = span.start == 0
                add_product(hidden, g, part.weight, terms=1.0, scale=scale, fresh=first)
            if (own := self._owner[k]) in self._weight:
                if own not in products:
                    shape = (g.shape[1], part.hidden.shape[1])
                    products[own] = g.new_empty(shape, dtype=self._dtype)
                rows, fresh = 2.0 ** len(g).bit_length(), own not in ready
                add_product(products[own], g.t(), part.hidden, terms=rows, scale=scale, fresh=fresh)
                ready.add(own)
            if (own := self._bias_owner[k]) in self._bias:
                of_classes = g.sum(0, dtype=self._dtype).mul_(1 / scale)
                self._bias[own][span].addcmul_(of_classes, self._size[k])
        for own, product in products.items():
            torch.mul(product, self._size[own], out=self._weight[own][span])

    def finished(self) -> list[Grads]:
        """Return the gradients in the dtypes of what they are of."""
        found = [
            Grads(None, self._weight.get(k), self._bias.get(k)) for k in range(len(self._heads))
        ]
        for stack, total in zip(self._stacks, self._hidden, strict=True):
            if total is None:
                continue
            for i, k in enumerate(stack.members):
                head, rows = self._heads[k].hidden, len(self._heads[k].hidden)
                if self._wanted[k].hidden:
                    own = total[i * rows : (i + 1) * rows]
                    scaled = torch.mul(own, self._size[k], out=torch.empty_like(head))
                    found[k] = found[k]._replace(hidden=scaled)
        return [
            each if each.bias is None else each._replace(bias=each.bias.to(head.bias.dtype))  # type: ignore[union-attr]
            for each, head in zip(found, self._heads, strict=True)
        ]


class _Lean(torch.autograd.Function):
    """Losses whose backward pass computes the gradients: of all students, or of student ``k``."""

    @staticmethod
    def forward(
        ctx: Any, losses: Tensor, k: int | None, plan: Plan, saved: Tensor, *flat: Tensor | None
    ) -> Tensor:
        ctx.k, ctx.plan, ctx.count = k, plan, len(flat)
        # The constants too, as autograd then checks that they have not been overwritten.
        ctx.save_for_backward(saved, *flat, *plan.constants())
        return losses

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        saved, *rest = saved_once(ctx)
        flat, needed = rest[: ctx.count], ctx.needs_input_grad[4:]
        heads = [Head(*flat[i : i + 3]) for i in range(0, len(flat), 3)]
        wanted = [Wanted(*needed[i : i + 3]) for i in range(0, len(flat), 3)]
        outer = outer.detach()
        if ctx.k is not None:
            outer = outer.expand(len(heads))
        grads = _gradients(ctx.plan, heads, wanted, saved, outer, joint=ctx.k is None)
        return (None, None, None, None, *once([g for each in grads for g in each]))
