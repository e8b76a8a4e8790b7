"""The choice between the two ways to compute the gradients of linear heads."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from dml_fast.errors import check_choice
from dml_fast.loss import backends, linear_chunks
from dml_fast.loss.linear_chunks import LEAST_BYTES, Plan, Wanted
from dml_fast.loss.linear_heads import Head
from dml_fast.loss.values import fail

logger = logging.getLogger("dml_fast")

_NAMES = ("auto", "fast", "lean")
_said: set[str] = set()


def check(memory: str) -> None:
    """Raise a `UserError` unless it is one of the choices."""
    check_choice("memory", memory, _NAMES)


def choose(memory: str, plan: Plan, heads: Sequence[Head], wanted: Sequence[Wanted]) -> bool:
    """Return whether to compute in two passes, `dml_fast.loss.linear_lean`.

    With "auto", on a GPU where students learn a weight together, as they then have one gradient in
    place of K, and where the other way's buffers are larger than the memory that is free. On a CPU
    two passes take 1.7 times as long (docs/loss.md).

    Raises:
        UserError: if "lean" is asked for, but cannot compute the problem.
    """
    reason = backends.by_class(plan.solver).unsupported_reason(plan.problem)
    if memory == "lean" and reason:
        fail(f"memory is 'lean' and {reason}", "take memory='auto' or 'fast'")
    if memory != "auto":
        return memory == "lean"
    on_cpu = plan.problem.device.type == "cpu"
    if _shared(heads, wanted) and not reason and not on_cpu:
        return True
    needed = fast_bytes(plan, heads, wanted)
    if needed <= LEAST_BYTES or (free := free_bytes(plan.problem.device)) is None or needed <= free:
        return False
    short = f"{needed / 2**30:.3g} GiB are needed and {free / 2**30:.3g} GiB are free"
    _say(
        f"{short}, and memory='lean' has no way: {reason}"
        if reason
        else f"in two passes, as {short}"
    )
    return not reason


def _shared(heads: Sequence[Head], wanted: Sequence[Wanted]) -> bool:
    learning = [id(h.weight) for h, w in zip(heads, wanted, strict=True) if w.weight]
    return len(set(learning)) < len(learning)


def fast_bytes(plan: Plan, heads: Sequence[Head], wanted: Sequence[Wanted]) -> int:
    """Return about how much `dml_fast.loss.linear_chunks` takes at once.

    That is a chunk and the sums of the gradients, or in the backward pass these sums and one
    student's gradients in their own dtype.
    """
    problem = plan.problem
    exact = problem.dtype.itemsize
    sums, largest = 0, 0
    for head, asked in zip(heads, wanted, strict=True):
        learning = [t for t, w in zip(head, asked, strict=True) if t is not None and w]
        sums += sum(exact * t.numel() for t in learning)
        largest = max(largest, sum(t.dtype.itemsize * t.numel() for t in learning))
    rows = min(plan.chunk_rows, problem.shape[1])
    chunk = rows * problem.shape[2] * linear_chunks.logit_bytes(problem, plan.solver)
    return sums + max(largest, chunk)


def free_bytes(device: torch.device) -> int | None:
    """Return how much may be allocated on a GPU; None where this is not known or must not be asked.

    PyTorch's allocator counts as free what it holds for tensors to come.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _say(what: str) -> None:
    if not _said:  # once: the numbers differ from step to step
        _said.add(what)
        logger.warning("mutual loss of linear heads: %s", what)
