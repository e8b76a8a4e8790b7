"""The second sweep of kernel B: the gradients, from the end of the row to its start.

The last columns may still be in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dml_fast.kernels.rows import LOG2E, columns, dense_target, gradient_tile, read_scalar


@triton.jit
def last_sweep(
    zs,  # pointers to the logits of students, then teachers
    gs,  # and to the gradients of students, which may be the same
    row_tops,  # of the row: maxima
    usables,
    logs,  # log2 d at T
    logs_1,  # and at T = 1
    masses,  # the sums of peers' weights
    row_mass,  # of the target
    y,
    valid,  # whether there is a label
    sparse,  # its weight
    of_label,  # the weight of the cross-entropy's gradient
    strength,  # and of the divergence's
    grad_scale,
    peer_weight,
    soft,
    class_weight,
    far,
    rate,
    smoothing,
    K: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    THREADS: tl.constexpr,
    EACH: tl.constexpr,
    SPREAD: tl.constexpr,
    Z_ROW: tl.constexpr,
    Z_COL: tl.constexpr,
    T_ROW: tl.constexpr,
    T_COL: tl.constexpr,
    SOFT_ROW: tl.constexpr,
    SOFT_COL: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    LABELLED: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr,
    PEER_WEIGHT: tl.constexpr,
    TEMPERED: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
    SCALE_STEP: tl.constexpr,
    DROP: tl.constexpr,  # the eviction policy of loads and stores
):
    """Store a row's gradients."""
    DENSE: tl.constexpr = SOFT or SMOOTH
    STEP: tl.constexpr = THREADS * EACH
    lane = columns(THREADS, EACH, SPREAD)
    pushes_p = ()
    pushes_q = ()
    scales = ()
    for k in tl.static_range(K):
        scale = read_scalar(grad_scale + k * SCALE_STEP, SCALE_ON_DEVICE)
        push = tl.where(usables[k], masses[k] * strength * scale, float("nan"))
        pushes_p = pushes_p + (push,)
        push = tl.where(usables[k], row_mass * of_label * scale, float("nan"))
        pushes_q = pushes_q + (push,)
        scales = scales + (scale,)
    for back in range(0, C, STEP):
        col = (tl.cdiv(C, STEP) * STEP - STEP - back) + lane
        inside = col < C
        us = ()
        ps = ()
        mix = tl.zeros((THREADS, EACH), tl.float32)
        for i in tl.static_range(L):
            if i < K:
                at = far * Z_ROW + col * Z_COL
            else:
                at = far * T_ROW + col * T_COL
            z = tl.load(zs[i] + at, mask=inside, other=float("-inf"), eviction_policy=DROP).to(
                tl.float32
            )
            u = z - row_tops[i]
            p = tl.where(usables[i], tl.exp2(u * rate - logs[i]), 0.0)
            if L > 1 and not PEER_WEIGHT:
                mix += p
            us = us + (u,)
            ps = ps + (p,)
        dense = mix
        if DENSE:
            _, dense = dense_target(
                soft,
                class_weight,
                far,
                col,
                inside,
                smoothing,
                C,
                SOFT,
                SMOOTH,
                CLASS_WEIGHT,
                SOFT_ROW,
                SOFT_COL,
            )
        for k in tl.static_range(K):
            if PEER_WEIGHT:
                mix = tl.zeros((THREADS, EACH), tl.float32)
                for i in tl.static_range(L):
                    mix += tl.load(peer_weight + k * L + i) * ps[i]
            q = ps[k]
            if TEMPERED:
                q = tl.exp2(us[k] * LOG2E - logs_1[k])
            g = gradient_tile(
                ps[k],
                q,
                mix,
                dense,
                col == y,
                pushes_p[k],
                pushes_q[k],
                strength * scales[k],
                tl.where(valid, of_label * scales[k], 0.0),
                sparse * of_label * scales[k],
                L > 1,
                TEMPERED,
                DENSE,
                not SOFT,
            )
            if LABELLED:
                g = tl.where(valid, g, 0.0)  # even where the logits are NaN
            tl.store(
                gs[k] + far * C + col,
                g.to(gs[k].dtype.element_ty),
                mask=inside,
                eviction_policy=DROP,
            )
