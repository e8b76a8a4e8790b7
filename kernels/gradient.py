"""Kernel C: the gradients of a loss that was computed before, for autograd's backward pass.

It reads the logits once and writes the gradients once. The softmax is restored from the maximum
and log-sum that were saved for each row; the outer gradient is read on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dml_fast.kernels.rows import (
    LOG2E,
    dense_target,
    gradient_tile,
    peer_share,
    read_labels,
    read_scalar,
    row_factors,
)


@triton.jit(do_not_specialize=["N", "first", "outer_student", "outer_row"])
def gradient(
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
    saved,  # (2 L + K + 1, N) fp32 of the forward pass
    outer,  # (K,) or (K, N): the gradient of the losses
    N,
    ignore_index,
    temperature,
    smoothing,
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
    ps = ()
    count = tl.zeros((R, 1), tl.float32)
    mix = tl.zeros((R, BLOCK), tl.float32)
    for i in tl.static_range(L):
        if i < K:
            at = far * Z_ROW + col * Z_COL
        else:
            at = far * T_ROW + col * T_COL
        z = tl.load(zs[i] + at, mask=inside, other=float("-inf")).to(tl.float32)
        top = tl.load(saved + i * stride + far, mask=ok, other=0.0)
        log_d = tl.load(saved + (L + i) * stride + far, mask=ok, other=0.0)
        usable = log_d == log_d
        u = z - top
        p = tl.where(usable, tl.exp2(u * rate - log_d), 0.0)
        count += tl.where(usable, 1.0, 0.0)
        if L > 1 and not PEER_WEIGHT:
            mix += p
        us = us + (u,)
        usables = usables + (usable,)
        ps = ps + (p,)

    valid = ok
    y = tl.full((R, 1), -1, tl.int32)
    sparse = tl.zeros((R, 1), tl.float32)
    dense = mix
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
    mass = tl.load(saved + (2 * L + K) * stride + far, mask=ok, other=0.0)
    of_row = tl.full((R, 1), 1.0, tl.float32)
    if ROW_WEIGHT:
        of_row = tl.load(row_weight + row, mask=ok, other=0.0)
    _, _, of_label, of_peers = row_factors(
        index, class_weight, label_count, row_count, given_labels, per_row, ignore_index, of_row,
        temperature, N, C, LABELS, IGNORE, CLASS_WEIGHT, ROWS, MEAN, False,
    )  # fmt: skip
    share = tl.full((R, 1), 1.0, tl.float32)
    if not PEER_WEIGHT:
        share = peer_share(count, PEER_MEAN)
    strength = share * of_peers * read_scalar(kl_weight, KL_ON_DEVICE)

    for k in tl.static_range(K):
        if (LEARNERS >> k) & 1:
            mass_k = count
            if PEER_WEIGHT:
                mix = tl.zeros((R, BLOCK), tl.float32)
                mass_k = tl.zeros((R, 1), tl.float32)
                for i in tl.static_range(L):
                    weight = tl.load(peer_weight + k * L + i)
                    mix += weight * ps[i]
                    mass_k += tl.where(usables[i], weight, 0.0)
            q = ps[k]
            if TEMPERED:
                log_d_1 = tl.load(saved + (2 * L + k) * stride + far, mask=ok, other=0.0)
                q = tl.exp2(us[k] * LOG2E - log_d_1)
            wanted = tl.load(outer + k * outer_student + far * outer_row, mask=ok, other=0.0)
            wanted = wanted.to(tl.float32)
            strength_k = strength * wanted
            of_label_k = of_label * wanted
            g = gradient_tile(
                ps[k],
                q,
                mix,
                dense,
                label == y,
                tl.where(usables[k], mass_k * strength_k, float("nan")),
                tl.where(usables[k], mass * of_label_k, float("nan")),
                strength_k,
                tl.where(valid, of_label_k, 0.0),
                sparse * of_label_k,
                L > 1,
                TEMPERED,
                DENSE,
                not SOFT,
            )
            if LABELLED:
                g = tl.where(valid, g, 0.0)  # even where the logits are NaN
            tl.store(gs[k] + far * WIDTH + col, g.to(gs[k].dtype.element_ty), mask=inside)
