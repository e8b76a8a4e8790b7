"""The sums and sweeps of kernel E: a row's divergences, and its gradients.

`first_sweep.py` leaves the sums D_lk of each thread. Joined, they give for every pair

    KL(p_k || p_l) / ln2 = Σ_c p_k (a_k - a_l) = (D_kk - D_kl) / d_k - log2 (d_k / d_l)

and so "reverse" and "symmetric" of students. "jsd", teachers, and rows in which a class is masked
or a student unusable take a sweep of their own, with guards, now that maxima and sums are known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dml_fast.kernels.divergence_terms import (
    SYMMETRIC,
    peers_of_all,
    share_of,
    student,
    student_gradient,
)
from dml_fast.kernels.row_sums import rounded
from dml_fast.kernels.rows import LEAST, columns, dense_target, read_scalar


@triton.jit
def row_parts(tops, sums, rate, L: tl.constexpr, C: tl.constexpr):
    """Return tuples of a row's scalars: maxima, δ of the threads, d, usable, log2 d, log2 (d / C).

    Then the number of distributions that are usable.
    """
    row_tops = ()
    moves = ()
    ds = ()
    usables = ()
    logs = ()
    excesses = ()
    count = 0.0
    for i in tl.static_range(L):
        top = tl.max(tops[i])
        move = tl.maximum(tops[i] - top, LEAST) * rate
        d = tl.sum(rounded(sums[i], tl.exp2(move)))
        usable = d > 0.0
        row_tops = row_tops + (top,)
        moves = moves + (move,)
        ds = ds + (tl.where(usable, d, 1.0),)
        usables = usables + (usable,)
        logs = logs + (tl.where(usable, tl.log2(d), 0.0),)
        excesses = excesses + (tl.where(usable, tl.log2(d * (1.0 / C)), 0.0),)
        count += tl.where(usable, 1.0, 0.0)
    return row_tops, moves, ds, usables, logs, excesses, count


@triton.jit
def joined_pairs(
    cross,  # D_lk of each thread, as first_sweep returns them
    sums,
    moves,
    ds,
    excesses,
    peer_weight,
    K: tl.constexpr,
    L: tl.constexpr,
    PEER_WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
):
    """Return ⟨p, h⟩ and Σ_c v of each student, and a number that is finite if all of these are."""
    mean_hs = ()
    values = ()
    probe = 0.0
    for k in tl.static_range(K):
        mean_h = 0.0
        value = 0.0
        at_home = joined(cross[k * K + k], sums[k], moves[k], moves[k], ds[k]) - excesses[k]
        for i in tl.static_range(L):
            if i != k:
                weight = 1.0
                if PEER_WEIGHT:
                    weight = tl.load(peer_weight + k * L + i)
                away = joined(cross[k * K + i], sums[k], moves[i], moves[k], ds[k]) - excesses[i]
                mean_h += weight * (at_home - away)
                if KIND == SYMMETRIC:
                    own = joined(cross[i * K + i], sums[i], moves[i], moves[i], ds[i]) - excesses[i]
                    seen = joined(cross[i * K + k], sums[i], moves[k], moves[i], ds[i])
                    value += weight * (own - (seen - excesses[k]))
        mean_hs = mean_hs + (mean_h,)
        values = values + (mean_h + value,)
        probe += mean_h + value
    return mean_hs, values, probe


@triton.jit
def views(
    zs,
    row_tops,
    usables,
    far,
    rate,
    col,
    K: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    Z_ROW: tl.constexpr,
    Z_COL: tl.constexpr,
    T_ROW: tl.constexpr,
    T_COL: tl.constexpr,
    TEMPERED: tl.constexpr,
):
    """Return z - max of each distribution, scaled if T = 1, 0 where it is unusable."""
    us = ()
    for i in tl.static_range(L):
        if i < K:
            at = far * Z_ROW + col * Z_COL
        else:
            at = far * T_ROW + col * T_COL
        z = tl.load(zs[i] + at, mask=col < C, other=float("-inf")).to(tl.float32)
        u = tl.where(usables[i], z - row_tops[i], 0.0)
        if not TEMPERED:
            u = u * rate
        us = us + (u,)
    return us


@triton.jit
def divergence_sweep(
    zs,
    row_tops,
    usables,
    logs,
    excesses,
    peer_weight,
    far,
    rate,
    beta,
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
    PEER_WEIGHT: tl.constexpr,
    TEMPERED: tl.constexpr,
    KIND: tl.constexpr,
):
    """Return ⟨p, h⟩ and Σ_c v of each student, with guards."""
    STEP: tl.constexpr = THREADS * EACH
    lane = columns(THREADS, EACH, SPREAD)
    held = ()
    for k in tl.static_range(2 * K):
        held = held + (tl.zeros((THREADS, 1), tl.float32),)
    for start in range(0, C, STEP):
        col = start + lane
        us = views(
            zs, row_tops, usables, far, rate, col, K, L, C, Z_ROW, Z_COL, T_ROW, T_COL, TEMPERED
        )
        mass, log_sum, mix, peaks, ps = peers_of_all(
            us, logs, excesses, usables, peer_weight, rate, L, TEMPERED, PEER_WEIGHT, KIND
        )
        new = ()
        for k in tl.static_range(K):
            p, h, v, peaks, mass, mix = student(
                k, us, logs, excesses, usables, peer_weight, mass, log_sum, mix, peaks, ps,
                rate, beta, L, TEMPERED, PEER_WEIGHT, KIND,
            )  # fmt: skip
            if KIND == SYMMETRIC:
                v += peaks
            new = new + (held[2 * k] + tl.sum(p * h, axis=1, keep_dims=True),)
            new = new + (held[2 * k + 1] + tl.sum(v, axis=1, keep_dims=True),)
        held = new
    mean_hs = ()
    values = ()
    for k in tl.static_range(K):
        mean_hs = mean_hs + (tl.sum(held[2 * k]),)
        values = values + (tl.sum(held[2 * k + 1]),)
    return mean_hs, values


@triton.jit
def gradient_sweep(
    zs,  # pointers to the logits of students, then teachers
    gs,  # and to the gradients of students, which may be the same
    row_tops,
    usables,
    logs,  # log2 d at T
    logs_1,  # and at T = 1
    excesses,
    mean_hs,
    count,  # of usable distributions
    mass_of_target,
    y,
    valid,  # whether there is a label
    sparse,  # its weight
    of_label,  # the weight of the cross-entropy's gradient
    of_peers,  # and of the divergence's, without kl_weight
    kl_weight,
    grad_scale,
    peer_weight,
    soft,
    class_weight,
    far,
    rate,
    beta,
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
    PEER_MEAN: tl.constexpr,
    TEMPERED: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
    SCALE_STEP: tl.constexpr,
    KIND: tl.constexpr,
):
    """Store a row's gradients, from its end to its start."""
    DENSE: tl.constexpr = SOFT or SMOOTH
    STEP: tl.constexpr = THREADS * EACH
    lane = columns(THREADS, EACH, SPREAD)
    for back in range(0, C, STEP):
        col = (tl.cdiv(C, STEP) * STEP - STEP - back) + lane
        inside = col < C
        us = views(
            zs, row_tops, usables, far, rate, col, K, L, C, Z_ROW, Z_COL, T_ROW, T_COL, TEMPERED
        )
        dense = us[0]
        if DENSE:
            dense = dense_target(
                soft, class_weight, far, col, inside, smoothing, C, SOFT, SMOOTH, CLASS_WEIGHT,
                SOFT_ROW, SOFT_COL,
            )[1]  # fmt: skip
        mass, log_sum, mix, peaks, ps = peers_of_all(
            us, logs, excesses, usables, peer_weight, rate, L, TEMPERED, PEER_WEIGHT, KIND
        )
        for k in tl.static_range(K):
            p, h, _, peaks, mass, mix = student(
                k, us, logs, excesses, usables, peer_weight, mass, log_sum, mix, peaks, ps,
                rate, beta, L, TEMPERED, PEER_WEIGHT, KIND,
            )  # fmt: skip
            scale = read_scalar(grad_scale + k * SCALE_STEP, SCALE_ON_DEVICE)
            share = share_of(count, mass, PEER_WEIGHT, PEER_MEAN, KIND)
            g = student_gradient(
                us[k], p, h, mix, logs_1[k], mean_hs[k], mass, share, usables[k], dense, col == y,
                valid, sparse, mass_of_target, of_label, of_peers, kl_weight, scale,
                TEMPERED, DENSE, not SOFT, LABELLED, KIND,
            )  # fmt: skip
            tl.store(gs[k] + far * C + col, g.to(gs[k].dtype.element_ty), mask=inside)


@triton.jit
def joined(cross, sums, move_k, move_l, row_sum):
    """Return Σ_c p_l (log2 p_k + log2 d_k) from each thread's D_lk and d_l."""
    return tl.sum(rounded(cross + move_k * sums, tl.exp2(move_l))) / row_sum
