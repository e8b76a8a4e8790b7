"""The mutual loss of students that end in a linear layer, without ever having all their logits.

For language models and other large heads. K students' logits over N tokens and C classes are K N C
numbers, and so are their gradients: they fill the memory first. Here they exist for some rows at a
time. `dml_fast.loss.linear_chunks` has the derivation, docs/loss.md the user's page.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dml_fast.errors import UserError, check_number, check_whole
from dml_fast.loss import backends, linear_chunks, linear_lean, linear_memory
from dml_fast.loss.checks import Array, prepare
from dml_fast.loss.linear_chunks import Plan, Wanted, default_rows, sweep
from dml_fast.loss.linear_heads import Biases, Tensors, read
from dml_fast.loss.mutual import LossOptions
from dml_fast.loss.problem import Losses, MutualStats
from dml_fast.loss.values import fail, integer

__all__ = ["FusedLinearMutualLoss", "linear_mutual_loss"]


def linear_mutual_loss(
    hidden: Tensors,
    weight: Tensors,
    target: Array,
    bias: Biases = None,
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
    teacher_hidden: Tensors | None = None,
    teacher_weight: Tensors | None = None,
    teacher_bias: Biases = None,
    chunk_rows: int | None = None,
    return_stats: bool = False,
    separate: bool = False,
    ce_weight: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    kl_rows: str = "all",
    softcap: float | None = None,
    memory: str = "auto",
) -> Losses | tuple[Losses, MutualStats]:
    """Return `mutual_loss` of the logits ``F.linear(hidden[k], weight[k], bias[k])``.

    All logits never exist at once. The forward pass computes the gradients of those hidden states,
    weights and biases that require them, chunk by chunk; in addition the call needs memory for one
    chunk, however many rows there are. The gradients are summed and kept in fp32 (fp64 for fp64)
    until the backward pass has multiplied them by the incoming gradient, so that an fp16 loss
    scaler works. With ``reduction="none"`` the backward pass computes the logits again instead.

    The logits have the dtype that `torch.nn.functional.linear` would give them, under autocast
    too. The losses are those of `mutual_loss` with every option, differentiable once. Under
    `torch.compile` the call is a graph break and runs eagerly.

    Args:
        hidden: K tensors (*batch, D_k), or one (K, *batch, D); fp16, bf16, fp32 or fp64.
        weight: K tensors (C, D_k), or one (K, C, D); students may share a tensor.
        target: (*batch) integer classes, or (*batch, C) probabilities, which take as much memory
            as the logits of one student.
        bias: K tensors (C,) or Nones, or None.
        kl_weight: see `mutual_loss`, as for the options down to `row_weight`.
        temperature: see there.
        label_smoothing: see there.
        class_weight: see there.
        ignore_index: see there.
        peer_reduction: see there.
        reduction: see there.
        backend: see there; it computes each chunk.
        peer_weight: see there.
        row_weight: see there.
        teacher_hidden: M further hidden states, (*batch, D_l), which teach and do not learn.
        teacher_weight: their weights, (C, D_l).
        teacher_bias: their biases, (C,) or None.
        chunk_rows: rows per chunk. By default as many as take a quarter of the memory of the fp32
            gradients of all weights, on a GPU half, and at least 64 MiB.
        return_stats: also return the first four fields of `MutualStats`; the others are None.
        separate: see `mutual_loss`; not with ``reduction="none"``.
        ce_weight: see there.
        divergence: see there.
        beta: see there.
        kl_rows: see there.
        memory: "fast" sums the gradients of the weights in fp32. "lean" computes the logits again
            in the backward pass, for some classes of all rows at a time; each class's gradient is
            then complete in one product and is stored in the weight's dtype: 4 products in place
            of 3, and no fp32 sums. It has the forward divergence only. "auto" is "fast", unless
            it is on a GPU and students learn one weight together, or too little memory is left for
            "fast", which is logged.
        softcap: all logits z become softcap tanh(z / softcap) (Gemma 2, arXiv 2408.00118), above
            0; None: they stay as they are.

    Returns:
        Losses (K,), or (K, *batch) with ``reduction="none"``, in fp32 (fp64 for fp64);
        ``(losses, stats)`` with ``return_stats``.

    Raises:
        UserError: if an argument has a wrong shape, device, dtype or value.
    """
    compute = _compute
    if torch.compiler.is_compiling():
        # Compiled, the loop over chunks would be unrolled: slow to compile, its memory unknown.
        compute = torch.compiler.disable(_compute)  # type: ignore[no-untyped-call]
    losses, stats = compute(
        (hidden, weight, bias),
        (teacher_hidden, teacher_weight, teacher_bias),
        target,
        backend,
        chunk_rows,
        "cheap" if return_stats else "none",
        separate,
        softcap,
        memory,
        kl_weight=kl_weight,
        temperature=temperature,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        ignore_index=ignore_index,
        peer_reduction=peer_reduction,
        reduction=reduction,
        peer_weight=peer_weight,
        row_weight=row_weight,
        ce_weight=ce_weight,
        divergence=divergence,
        beta=beta,
        kl_rows=kl_rows,
    )
    return losses if stats is None else (losses, stats)


def _compute(
    students: tuple[Tensors, Tensors, Biases],
    others: tuple[Tensors | None, Tensors | None, Biases],
    target: Array,
    backend: str,
    chunk_rows: int | None,
    stats: str,
    separate: bool,
    softcap: float | None,
    memory: str,
    **options: Any,
) -> tuple[Losses, MutualStats | None]:
    _check_rows(chunk_rows)
    _check_softcap(softcap)
    linear_memory.check(memory)
    if separate and options["reduction"] == "none":
        fail(
            "separate is True and reduction 'none'",
            "take reduction 'mean' or 'sum', or one of them",
        )
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
        softcap,
        chunk_rows,
    )
    with_grad = torch.is_grad_enabled()
    wanted = [
        Wanted(*(t is not None and t.requires_grad and with_grad for t in head)) for head in heads
    ]
    if any(map(any, wanted)):
        lean = linear_memory.choose(memory, plan, heads, wanted)
        way = linear_lean if lean else linear_chunks
        losses, measured = way.differentiable(plan, heads, wanted, stats, separate)
    else:
        losses, _, measured = sweep(plan, heads, wanted, stats)
        losses = losses.unbind() if separate else losses
    if isinstance(losses, Tensor) and problem.reduction == "none":
        losses = losses.reshape(len(heads), *problem.batch_shape)
    return losses, measured


def _check_rows(chunk_rows: int | None) -> None:
    if chunk_rows is not None:
        check_whole("chunk_rows", integer(chunk_rows, "chunk_rows"), 1)


def _check_softcap(softcap: float | None) -> None:
    if softcap is not None:
        check_number("softcap", softcap, "a number above 0, or None", lambda x: 0 < x < math.inf)


class FusedLinearMutualLoss(LossOptions):
    """`linear_mutual_loss` as a module: ``(hidden, weight, target, bias)`` gives (K,) losses.

    Its options are attributes, which may be changed between calls; ``class_weight`` is a buffer.
    Arguments, results and errors are those of `linear_mutual_loss`.
    """

    def __init__(
        self,
        *args: Any,
        chunk_rows: int | None = None,
        softcap: float | None = None,
        memory: str = "auto",
        **options: Any,
    ) -> None:
        """Check and keep the options: those of `FusedMutualLoss`, and those of the function."""
        super().__init__(*args, **options)
        _check_rows(chunk_rows)
        _check_softcap(softcap)
        linear_memory.check(memory)
        self.chunk_rows = chunk_rows
        self.softcap = softcap
        self.memory = memory

    def forward(
        self,
        hidden: Tensors,
        weight: Tensors,
        target: Array,
        bias: Biases = None,
        *,
        peer_weight: Array | None = None,
        row_weight: Array | None = None,
        teacher_hidden: Tensors | None = None,
        teacher_weight: Tensors | None = None,
        teacher_bias: Biases = None,
        return_stats: bool = False,
        separate: bool = False,
    ) -> Losses | tuple[Losses, MutualStats]:
        """Return (K,) losses, or (K, *batch) with ``reduction="none"``.

        See `linear_mutual_loss`.
        """
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
            softcap=self.softcap,
            memory=self.memory,
            return_stats=return_stats,
            separate=separate,
        )

    def extra_repr(self) -> str:
        """Return the options for ``print``, without the class weights."""
        capped = "" if self.softcap is None else f", softcap={self.softcap}"
        return (
            f"{super().extra_repr()}, chunk_rows={self.chunk_rows}{capped}, memory={self.memory!r}"
        )
