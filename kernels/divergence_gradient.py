"""Kernel F: the gradients alone with a divergence besides the paper's, for the backward pass.

As `gradient.py`: one read of the logits, one write of the gradients, from the numbers that were
saved for each row; with them is ⟨p, h⟩ of `divergence_terms.py`, a sum over all classes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dml_fast.kernels.divergence_terms import (
    peers_of_all,
    share_of,
    student,
    student_gradient,
)
from dml_fast.kernels.rows import (
    LN2,
    LOG2E,
    dense_target,
    read_labels,
    read_scalar,
    row_factors,
)


@triton.jit(do_not_specialize=["N", "first", "outer_student", "outer_row"])
def divergence_gradient(
    z0,  # students, then teachers: L pointers to (N, WIDTH)
    z1,
    z2,
    z3,
    z4,
    z5,
    z6,
    z7,
    g0,  # gradients, K pointers to (N, WIDTH), which may be the logits
    g1,
    g2,
    g3,
    g4,
    g5,
    g6,
    g7,
    index,  # (N,) integers
    soft,  # (N, C) fp32, in place of `index`
    class_weight,  # (C,) fp32
    row_weight,  # (N,) fp32
    peer_weight,  # (K, L) fp32
    label_count,  # () or unused
    row_count,  # () or unused
    kl_weight,  # a number or () tensor
    saved,  # (2 L + 2 K + 1, N) fp32 of the forward pass
    outer,  # (K,) or (K, N): the gradient of the losses
    N,
    ignore_index,
    temperature,
    smoothing,
    beta,
    log_classes,  # log2 C
    given_labels,
    per_row,
    outer_student,  # strides of `outer`
    outer_row,
    first,  # the first class of the logits, if these are not of all classes
    K: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,  # how many classes the logits are of
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    Z_ROW: tl.constexpr,
    Z_COL: tl.constexpr,
    T_ROW: tl.constexpr,
    T_COL: tl.constexpr,
    SOFT_ROW: tl.constexpr,
    SOFT_COL: tl.constexpr,
    KIND: tl.constexpr,
    LEARNERS: tl.constexpr,  # bit k: student k has a gradient
    LABELS: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    IGNORE: tl.constexpr,
    LABELLED: tl.constexpr,  # rows without a label have no divergence
    ROWS: tl.constexpr,  # how the rows with a divergence are counted, see rows.row_share
    CLASS_WEIGHT: tl.constexpr,
    ROW_WEIGHT: tl.constexpr,
    PEER_WEIGHT: tl.constexpr,
    PEER_MEAN: tl.constexpr,
    TEMPERED: tl.constexpr,
    KL_ON_DEVICE: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Write a tile (R, BLOCK) of each student's gradient. Grid: (⌈N / R⌉, ⌈WIDTH / BLOCK⌉)."""
    zs = (z0, z1, z2, z3, z4, z5, z6, z7)
    gs = (g0, g1, g2, g3, g4, g5, g6, g7)
    DENSE: tl.constexpr = SOFT or SMOOTH
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    ok = row < N
    far = row.to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = ok & (col < WIDTH)
    label = col
    if WIDTH < C:
        label = col + first
    rate = LOG2E / temperature
    stride = N.to(tl.int64)

    us = ()
    usables = ()
    logs = ()
    excesses = ()
    count = tl.zeros((R, 1), tl.float32)
    for i in tl.static_range(L):
        if i < K:
            at = far * Z_ROW + col * Z_COL
        else:
            at = far * T_ROW + col * T_COL
        z = tl.load(zs[i] + at, mask=inside, other=float("-inf")).to(tl.float32)
        top = tl.load(saved + i * stride + far, mask=ok, other=0.0)
        log_d = tl.load(saved + (L + i) * stride + far, mask=ok, other=0.0)
        usable = log_d == log_d
        log_d = tl.where(usable, log_d, 0.0)
        kept = tl.where(usable, z - top, 0.0)
        if not TEMPERED:
            kept = kept * rate
        count += tl.where(usable, 1.0, 0.0)
        us = us + (kept,)
        usables = usables + (usable,)
        logs = logs + (log_d,)
        excesses = excesses + (tl.where(usable, log_d - log_classes, 0.0),)

    valid = ok
    y = tl.full((R, 1), -1, tl.int32)
    sparse = tl.zeros((R, 1), tl.float32)
    dense = tl.zeros((R, BLOCK), tl.float32)
    if DENSE:
        _, dense = dense_target(
            soft,
            class_weight,
            far,
            label,
            inside,
            smoothing,
            C,
            SOFT,
            SMOOTH,
            CLASS_WEIGHT,
            SOFT_ROW,
            SOFT_COL,
        )
    if not SOFT:
        y, valid, own = read_labels(
            index, class_weight, ignore_index, row, ok, C, IGNORE, CLASS_WEIGHT
        )
        sparse = own
        if SMOOTH:
            sparse = own * (1.0 - smoothing)
    mass_of_target = tl.load(saved + (2 * L + K) * stride + far, mask=ok, other=0.0)
    of_row = tl.full((R, 1), 1.0, tl.float32)
    if ROW_WEIGHT:
        of_row = tl.load(row_weight + row, mask=ok, other=0.0)
    _, _, of_label, of_peers = row_factors(
        index, class_weight, label_count, row_count, given_labels, per_row, ignore_index, of_row,
        temperature * LN2, N, C, LABELS, IGNORE, CLASS_WEIGHT, ROWS, MEAN, False,
    )  # fmt: skip
    kl_weight = read_scalar(kl_weight, KL_ON_DEVICE)

    mass, log_sum, mix, peaks, ps = peers_of_all(
        us, logs, excesses, usables, peer_weight, rate, L, TEMPERED, PEER_WEIGHT, KIND
    )
    for k in tl.static_range(K):
        if (LEARNERS >> k) & 1:
            p, h, _, peaks, mass, mix = student(
                k,
                us,
                logs,
                excesses,
                usables,
                peer_weight,
                mass,
                log_sum,
                mix,
                peaks,
                ps,
                rate,
                beta,
                L,
                TEMPERED,
                PEER_WEIGHT,
                KIND,
            )
            mean_h = tl.load(saved + (2 * L + K + 1 + k) * stride + far, mask=ok, other=0.0)
            share = share_of(count, mass, PEER_WEIGHT, PEER_MEAN, KIND)
            log_d_1 = mean_h
            if TEMPERED:
                log_d_1 = tl.load(saved + (2 * L + k) * stride + far, mask=ok, other=0.0)
            wanted = tl.load(outer + k * outer_student + far * outer_row, mask=ok, other=0.0)
            g = student_gradient(
                us[k], p, h, mix, log_d_1, mean_h, mass, share, usables[k], dense, label == y,
                valid, sparse, mass_of_target, of_label, of_peers, kl_weight, wanted.to(tl.float32),
                TEMPERED, DENSE, not SOFT, LABELLED, KIND,
            )  # fmt: skip
            tl.store(gs[k] + far * WIDTH + col, g.to(gs[k].dtype.element_ty), mask=inside)
