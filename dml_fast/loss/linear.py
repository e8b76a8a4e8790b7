"""The mutual loss of students that end in a linear layer, without their logits.

For language models and other large heads: K students' logits over N tokens and C classes, and
their gradients, are K N C numbers each, and what runs out of memory first. Here they exist for
some rows at a time. `dml_fast.loss.linear_chunks` has the derivation, docs/loss.md the user's page.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dml_fast.errors import UserError
from dml_fast.loss import backends
from dml_fast.loss.checks import prepare
from dml_fast.loss.linear_chunks import Plan, Wanted, default_rows, differentiable, sweep
from dml_fast.loss.linear_heads import Biases, Tensors, read
from dml_fast.loss.mutual import LossOptions
from dml_fast.loss.problem import MutualStats

__all__ = ["FusedLinearMutualLoss", "linear_mutual_loss"]


def linear_mutual_loss(
    hidden: Tensors,
    weight: Tensors,
    target: Tensor,
    bias: Biases = None,
    *,
    kl_weight: float | Tensor = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    peer_reduction: str = "mean",
    reduction: str = "mean",
    backend: str = "auto",
    peer_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    teacher_hidden: Tensors | None = None,
    teacher_weight: Tensors | None = None,
    teacher_bias: Biases = None,
    chunk_rows: int | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, MutualStats]:
    """`mutual_loss` of the logits ``F.linear(hidden[k], weight[k], bias[k])``, never made whole.

    The gradients of hidden states, weights and biases are made in the forward pass, chunk by
    chunk, for those that require them; beyond them the call needs memory for one chunk, however
    many rows there are. They are summed and kept in fp32 (fp64 for fp64) until the backward pass
    has multiplied them by the incoming gradient, so that an fp16 loss scaler has its effect.
    With ``reduction="none"`` the backward pass computes the logits a second time instead.

    The logits have the dtype that `torch.nn.functional.linear` would give them, under autocast
    too. Losses are those of `mutual_loss` in all options; differentiable once. Under
    `torch.compile` the call is a graph break and runs eagerly.

    Args:
        hidden: K tensors (*batch, D_k), or one (K, *batch, D); fp16, bf16, fp32 or fp64.
        weight: K tensors (C, D_k), or one (K, C, D); the same tensor may be given several times.
        target: (*batch) integer classes, or (*batch, C) probabilities, which are K times smaller
            than the logits, but not small.
        bias: K tensors (C,) or Nones, or None.
        kl_weight: as the options down to `row_weight`, see `mutual_loss`.
        temperature: see there.
        label_smoothing: see there.
        class_weight: see there.
        ignore_index: see there.
        peer_reduction: see there.
        reduction: see there.
        backend: see there; it computes each chunk.
        peer_weight: see there.
        row_weight: see there.
        teacher_hidden: M further hidden states, which teach and do not learn.
        teacher_weight: their weights.
        teacher_bias: their biases.
        chunk_rows: rows at a time. By default such that a chunk takes a quarter of the fp32
            gradients of all the weights, and at least 64 MiB.
        return_stats: also return the first four of `MutualStats`; the others are None.

    Returns:
        Losses (K,), or (K, *batch) with ``reduction="none"``, in fp32 (fp64 for fp64); with the
        statistics if asked for.

    Raises:
        UserError: if an argument has a wrong shape, device, dtype or value.
    """
    compute = _compute
    if torch.compiler.is_compiling():
        # Unrolled, the loop over chunks would compile for long and promise nothing about memory.
        compute = torch.compiler.disable(_compute)  # type: ignore[no-untyped-call]
    losses, stats = compute(
        (hidden, weight, bias),
        (teacher_hidden, teacher_weight, teacher_bias),
        target,
        backend,
        chunk_rows,
        "cheap" if return_stats else "none",
        kl_weight=kl_weight,
        temperature=temperature,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        ignore_index=ignore_index,
        peer_reduction=peer_reduction,
        reduction=reduction,
        peer_weight=peer_weight,
        row_weight=row_weight,
    )
    return losses if stats is None else (losses, stats)


def _compute(
    students: tuple[Tensors, Tensors, Biases],
    others: tuple[Tensors | None, Tensors | None, Biases],
    target: Tensor,
    backend: str,
    chunk_rows: int | None,
    stats: str,
    **options: Any,
) -> tuple[Tensor, MutualStats | None]:
    _check_rows(chunk_rows)
    heads, logits = read(*students)
    if not heads:
        raise UserError("hidden is empty: pass the hidden states of at least one student")
    teachers, teacher_logits = read(*others, prefix="teacher_")
    problem = prepare(logits, target, teacher_logits=teacher_logits, **options)
    solver = backends.find(backend, problem)
    plan = Plan(
        problem,
        [h.to(z.dtype) for h, z in zip(teachers, teacher_logits, strict=True)],
        solver,
        chunk_rows or default_rows(heads, problem, solver),
    )
    with_grad = torch.is_grad_enabled()
    wanted = [
        Wanted(*(t is not None and t.requires_grad and with_grad for t in head)) for head in heads
    ]
    if any(map(any, wanted)):
        losses, measured = differentiable(plan, heads, wanted, stats)
    else:
        losses, _, measured = sweep(plan, heads, wanted, stats)
    if problem.reduction == "none":
        losses = losses.reshape(len(heads), *problem.batch_shape)
    return losses, measured


def _check_rows(chunk_rows: int | None) -> None:
    if chunk_rows is not None and chunk_rows < 1:
        raise UserError(f"chunk_rows is {chunk_rows}: pass 1 or more, or None for the default")


class FusedLinearMutualLoss(LossOptions):
    """`linear_mutual_loss` as a module: ``(hidden, weight, target, bias)`` gives (K,) losses.

    The options are attributes and may be changed between calls; ``class_weight`` is a buffer.
    Arguments, results and errors are those of `linear_mutual_loss`.
    """

    def __init__(self, *args: Any, chunk_rows: int | None = None, **options: Any) -> None:
        """Check and keep the options: those of `FusedMutualLoss`, and ``chunk_rows``."""
        super().__init__(*args, **options)
        _check_rows(chunk_rows)
        self.chunk_rows = chunk_rows

    def forward(
        self,
        hidden: Tensors,
        weight: Tensors,
        target: Tensor,
        bias: Biases = None,
        *,
        peer_weight: Tensor | None = None,
        row_weight: Tensor | None = None,
        teacher_hidden: Tensors | None = None,
        teacher_weight: Tensors | None = None,
        teacher_bias: Biases = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, MutualStats]:
        """(K,) losses, or (K, *batch) with ``reduction="none"``; see `linear_mutual_loss`."""
        return linear_mutual_loss(
            hidden,
            weight,
            target,
            bias,
            **self.options(),
            peer_weight=peer_weight,
            row_weight=row_weight,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
            teacher_bias=teacher_bias,
            chunk_rows=self.chunk_rows,
            return_stats=return_stats,
        )

    def extra_repr(self) -> str:
        """The options, for print()."""
        return f"{super().extra_repr()}, chunk_rows={self.chunk_rows}"
