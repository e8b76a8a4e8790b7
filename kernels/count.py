"""The number of labelled rows, or the sum of their class weights, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from dml_fast.kernels.rows import read_labels


@triton.jit(do_not_specialize=["N"])
def count(
    index,  # (N,) integers
    class_weight,  # (C,) fp32
    total,  # () fp32
    ignore_index,
    N,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    IGNORE: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr,
):
    """Store the count in ``total``. Grid: (1,), so that the order of the sum is fixed."""
    held = tl.zeros((BLOCK,), tl.float32)
    start = 0
    while start < N:
        row = start + tl.arange(0, BLOCK)
        _, _, own = read_labels(
            index, class_weight, ignore_index, row, row < N, C, IGNORE, CLASS_WEIGHT
        )
        held += tl.where(own == own, own, 1.0)
        start += BLOCK
    tl.store(total, tl.sum(held, axis=0))
