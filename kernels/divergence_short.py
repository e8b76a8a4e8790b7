"""Kernel D: the divergences besides the paper's, for rows that the registers hold.

As `one_pass.py`: one read of the logits, one write of the gradients, sums and statistics in the
same launch. It is a kernel of its own, so that the paper's divergence pays nothing for the others.
`divergence_terms.py` has the mathematics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dml_fast.kernels.divergence_terms import (
    REVERSE,
    SYMMETRIC,
    peers_of_all,
    row_divergence,
    share_of,
    student,
    student_gradient,
)
from dml_fast.kernels.finish import add_divergence, finish, steps
from dml_fast.kernels.rows import (
    LEAST,
    LN2,
    LOG2E,
    dense_target,
    read_labels,
    read_scalar,
    row_factors,
)


@triton.jit(do_not_specialize=["N"])
def divergence_short(
    z0,  # students, then teachers: L pointers to (N, C)
    z1,
    z2,
    z3,
    z4,
    z5,
    z6,
    z7,
    g0,  # gradients, K pointers to (N, C)
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
    grad_scale,  # a number, () or (K,) tensor
    losses,  # (K,) or (K, N) fp32
    stats,  # (2, K) fp32
    correct,  # (K,) int64
    finite,  # (K,) uint8
    more,  # unused: all statistics take another launch
    saved,  # (2 L + 2 K + 1, N) fp32: max, log2 d, log2 d at T = 1, the target's mass, ⟨p, h⟩
    partials,
    groups,
    totals,
    counters,
    N,
    ignore_index,
    temperature,
    smoothing,
    beta,
    given_labels,  # 1 / labelled rows, if known
    per_row,  # 1 / rows
    K: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    Z_ROW: tl.constexpr,
    Z_COL: tl.constexpr,
    T_ROW: tl.constexpr,
    T_COL: tl.constexpr,
    SOFT_ROW: tl.constexpr,
    SOFT_COL: tl.constexpr,
    KIND: tl.constexpr,
    GRAD: tl.constexpr,
    SAVE: tl.constexpr,
    STATS: tl.constexpr,  # 0: none, 1: cheap
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
    SCALE_ON_DEVICE: tl.constexpr,
    SCALE_STEP: tl.constexpr,
    MEAN: tl.constexpr,
    BY_ROW: tl.constexpr,
    QUANTITIES: tl.constexpr,
    AT_ONCE: tl.constexpr,  # how sums over programs are made, see finish.py
):
    """Compute losses, statistics, and gradients or what they need later. Grid: (⌈N / R⌉,)."""
    zs = (z0, z1, z2, z3, z4, z5, z6, z7)
    gs = (g0, g1, g2, g3, g4, g5, g6, g7)
    DENSE: tl.constexpr = SOFT or SMOOTH
    pid = tl.program_id(0)
    row = pid * R + tl.arange(0, R)[:, None]
    ok = row < N
    far = row.to(tl.int64)
    stride = N.to(tl.int64)
    col = tl.arange(0, BLOCK)[None, :]
    inside = ok & (col < C)
    rate = LOG2E / temperature

    raws = ()  # all loads are issued before the first reduction waits for one
    for i in tl.static_range(L):
        if i < K:
            at = far * Z_ROW + col * Z_COL
        else:
            at = far * T_ROW + col * T_COL
        raws = raws + (tl.load(zs[i] + at, mask=inside, other=float("-inf")),)

    # The label comes first: whether a row is correct depends on the columns before it.
    valid = ok
    sparse = tl.zeros((R, 1), tl.float32)
    dense_mass = tl.zeros((R, 1), tl.float32)
    y = tl.full((R, 1), -1, tl.int32)
    dense = tl.zeros((R, BLOCK), tl.float32)
    if DENSE:
        raw, dense = dense_target(
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
        dense_mass = tl.sum(dense, axis=1, keep_dims=True)
        if SOFT and STATS > 0:
            most = tl.max(raw, axis=1, keep_dims=True)
            y = tl.min(tl.where((raw == most) & inside, col, C), axis=1, keep_dims=True)
    mass_of_target = dense_mass
    if not SOFT:
        y, valid, own = read_labels(
            index, class_weight, ignore_index, row, ok, C, IGNORE, CLASS_WEIGHT
        )
        sparse = own
        if SMOOTH:
            sparse = own * (1.0 - smoothing)
        mass_of_target = sparse + tl.where(valid, dense_mass, 0.0)
    if SAVE:
        tl.store(saved + (2 * L + K) * stride + far, mass_of_target, mask=ok)

    # Each distribution, its part of the cross-entropy, and whether it is right.
    us = ()  # z - max, scaled if T = 1, 0 where unusable
    usables = ()
    logs = ()  # log2 d at T
    excesses = ()  # log2 (d / C)
    logs_1 = ()  # log2 d at T = 1, students only
    entropies = ()  # cross-entropies, rather, before the weights of rows
    rights = ()
    count = tl.zeros((R, 1), tl.float32)
    for i in tl.static_range(L):
        z = raws[i].to(tl.float32)
        top = tl.max(z, axis=1, keep_dims=True)
        u = z - top
        if C < BLOCK:
            u = tl.where(col < C, u, LEAST)  # adds nothing, unlike -inf
        d = tl.sum(tl.exp2(u * rate), axis=1, keep_dims=True)
        usable = d > 0.0
        log_d = tl.where(usable, tl.log2(d), 0.0)
        count += tl.where(usable, 1.0, 0.0)
        log_d_1 = log_d
        if i < K:
            if TEMPERED:
                d_1 = tl.sum(tl.exp2(u * LOG2E), axis=1, keep_dims=True)
                log_d_1 = tl.where(usable, tl.log2(d_1), 0.0)
            ce = tl.zeros((R, 1), tl.float32)
            if not SOFT:
                own_logit = tl.load(zs[i] + far * Z_ROW + y * Z_COL, mask=ok, other=0.0)
                own_u = own_logit.to(tl.float32) - top
                ce = sparse * (log_d_1 * LN2 - own_u)
            if DENSE:
                products = tl.where(dense != 0.0, dense * u, 0.0)
                ce += dense_mass * log_d_1 * LN2 - tl.sum(products, axis=1, keep_dims=True)
            entropies = entropies + (tl.where(usable, ce, float("nan")),)
            logs_1 = logs_1 + (log_d_1,)
            if STATS > 0:
                # The label is the first maximum: all columns before it are smaller.
                before = tl.max(tl.where(col < y, z, float("-inf")), axis=1, keep_dims=True)
                if SOFT:
                    highest = tl.max(tl.where(col == y, z, float("-inf")), axis=1, keep_dims=True)
                    right = (highest == top) & (before < top)
                else:
                    right = (own_u == 0.0) & (before < top)
                rights = rights + (right & usable & valid & (sparse == sparse),)
        if SAVE:
            tl.store(saved + i * stride + far, top, mask=ok)
            mark = tl.where(usable, log_d, float("nan"))
            tl.store(saved + (L + i) * stride + far, mark, mask=ok)
            if i < K:
                tl.store(saved + (2 * L + i) * stride + far, log_d_1, mask=ok)
        usables = usables + (usable,)
        logs = logs + (log_d,)
        excesses = excesses + (tl.where(usable, tl.log2(d * (1.0 / C)), 0.0),)
        kept = u
        if not TEMPERED:
            kept = u * rate
        us = us + (tl.where(usable, kept, 0.0),)

    # The shares of the rows.
    of_row = tl.full((R, 1), 1.0, tl.float32)
    if ROW_WEIGHT:
        of_row = tl.load(row_weight + row, mask=ok, other=0.0)
    per_label, per_kl, of_label, of_peers = row_factors(
        index, class_weight, label_count, row_count, given_labels, per_row, ignore_index, of_row,
        temperature * LN2, N, C, LABELS, IGNORE, CLASS_WEIGHT, ROWS, MEAN, STATS > 0,
    )  # fmt: skip
    kl_weight = read_scalar(kl_weight, KL_ON_DEVICE)

    mass, log_sum, mix, peaks, ps = peers_of_all(
        us, logs, excesses, usables, peer_weight, rate, L, TEMPERED, PEER_WEIGHT, KIND
    )

    peak = tl.zeros((R, 1), tl.float32)
    if KIND == SYMMETRIC and not PEER_WEIGHT:
        peak = tl.sum(peaks, axis=1, keep_dims=True)

    # Each student's divergence, loss and gradient.
    by_program, by_quantity = steps(QUANTITIES, AT_ONCE)
    here = partials + pid * by_program
    for k in tl.static_range(K):
        p, h, v, peaks, mass, mix = student(
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
        mean_h = tl.sum(p * h, axis=1, keep_dims=True)
        kl = mean_h
        if KIND != REVERSE:
            kl = tl.sum(v, axis=1, keep_dims=True)
        if KIND == SYMMETRIC:
            if PEER_WEIGHT:
                peak = tl.sum(peaks, axis=1, keep_dims=True)
            kl += peak
        share = share_of(count, mass, PEER_WEIGHT, PEER_MEAN, KIND)
        kl = row_divergence(
            kl, usables[k], valid, share, of_row, temperature, LABELLED, PEER_WEIGHT, KIND
        )
        ce = tl.where(valid, entropies[k] * of_row, 0.0)

        if SAVE:
            tl.store(saved + (2 * L + K + 1 + k) * stride + far, mean_h, mask=ok)
        if BY_ROW:
            tl.store(losses + k * stride + far, add_divergence(ce, kl, kl_weight), mask=ok)
        if not BY_ROW or STATS > 0:
            tl.store(here + k * by_quantity, tl.sum(tl.where(ok, ce, 0.0)))
            tl.store(here + (K + k) * by_quantity, tl.sum(tl.where(ok, kl, 0.0)))
            if STATS > 0:
                tl.store(here + (2 * K + k) * by_quantity, tl.sum(tl.where(rights[k], 1.0, 0.0)))
                wrong = ok & (usables[k] == 0)
                tl.store(here + (3 * K + k) * by_quantity, tl.sum(tl.where(wrong, 1.0, 0.0)))
        if GRAD:
            scale = read_scalar(grad_scale + k * SCALE_STEP, SCALE_ON_DEVICE)
            g = student_gradient(
                us[k], p, h, mix, logs_1[k], mean_h, mass, share, usables[k], dense, col == y,
                valid, sparse, mass_of_target, of_label, of_peers, kl_weight, scale,
                TEMPERED, DENSE, not SOFT, LABELLED, KIND,
            )  # fmt: skip
            tl.store(gs[k] + far * C + col, g.to(gs[k].dtype.element_ty), mask=inside)

    if not BY_ROW or STATS > 0:
        finish(
            partials,
            groups,
            totals,
            counters,
            losses,
            stats,
            correct,
            finite,
            more,
            kl_weight,
            per_label,
            per_kl,
            per_row,
            K,
            QUANTITIES,
            MEAN,
            BY_ROW,
            STATS,
            AT_ONCE,
        )
