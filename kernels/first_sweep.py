"""The first sweep of kernel B: a row's logits are read once, and sums for everything are kept.

Each thread keeps, for its own columns and without synchronisation, the running maximum m_l,
d_l = Σ e_l and the K L sums

    D_lk = Σ_c e_l t_k,     e_l = 2^t_l,  t_l = (z_l - m_l) log2(e) / T

When a maximum moves by δ, it rescales them: d <- a d, D_lk <- a_l (D_lk + δ_k d_l), with
a = 2^δ. `row_sums.py` joins the threads' sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dml_fast.kernels.rows import LEAST, LOG2E, columns, dense_target

LOWEST = tl.constexpr(
    -3.4028234663852886e38
)  # the lowest fp32 number: the maximum before the first logit


@triton.jit
def first_sweep(
    zs,  # pointers to the logits of students, then teachers
    soft,  # and what else dense_target takes
    class_weight,
    far,  # the row
    rate,  # log2(e) / temperature
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
    STATS: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr,
    TEMPERED: tl.constexpr,
    KEEP: tl.constexpr,  # the eviction policy of the loads
):
    """Return what each thread found, (THREADS, 1) each.

    Tuples of the maxima, the sums at T, those at T = 1, the first columns with the maximum,
    ⟨target, z - max⟩, D_lk, and D_ll of the teachers; then the target's mass, its maximum and the
    first column with that.
    """
    DENSE: tl.constexpr = SOFT or SMOOTH
    STEP: tl.constexpr = THREADS * EACH
    lane = columns(THREADS, EACH, SPREAD)
    nothing = tl.zeros((THREADS, 1), tl.float32)

    tops = ()
    sums = ()
    sums_1 = ()
    bests = ()
    dots = ()
    cross = ()
    for i in tl.static_range(L):
        tops = tops + (nothing + LOWEST,)
        sums = sums + (nothing,)
        for k in tl.static_range(K):
            cross = cross + (nothing,)
        if i < K:
            sums_1 = sums_1 + (nothing,)
            bests = bests + (tl.full((THREADS, 1), C, tl.int32),)
            dots = dots + (nothing,)
    own_cross = ()  # D_ll of the teachers
    for i in tl.static_range(L - K):
        own_cross = own_cross + (nothing,)
    mass = nothing
    most = nothing - 1.0
    most_at = tl.full((THREADS, 1), C, tl.int32)
    for start in range(0, C, STEP):
        col = start + lane
        inside = col < C
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
            if SOFT and STATS > 0:
                raw = tl.where(inside, raw, -1.0)
                high = tl.max(raw, axis=1, keep_dims=True)
                where = tl.min(tl.where(raw == high, col, C), axis=1, keep_dims=True)
                most_at = tl.where(high > most, where, most_at)
                most = tl.maximum(most, high)
        ts = ()
        moves = ()  # δ
        new_tops = ()
        new_bests = ()
        new_dots = ()
        new_sums = ()
        new_sums_1 = ()
        new_cross = ()
        new_own_cross = ()
        for i in tl.static_range(L):
            if i < K:
                at = far * Z_ROW + col * Z_COL
            else:
                at = far * T_ROW + col * T_COL
            z = tl.load(zs[i] + at, mask=inside, other=float("-inf"), eviction_policy=KEEP).to(
                tl.float32
            )
            high = tl.max(z, axis=1, keep_dims=True)
            top = tl.maximum(tops[i], high)
            # At most one of the two is the lowest number. The bound prevents 0 x -inf.
            shift = tl.maximum(tops[i] - top, LEAST)
            u = z - top
            if C % STEP != 0:
                u = tl.where(inside, u, LEAST)  # adds nothing, unlike -inf
            ts = ts + (u * rate,)
            moves = moves + (shift * rate,)
            new_tops = new_tops + (top,)
            if i < K:
                if STATS > 0:
                    where = tl.min(tl.where(z == high, col, C), axis=1, keep_dims=True)
                    new_bests = new_bests + (tl.where(high > tops[i], where, bests[i]),)
                else:
                    new_bests = new_bests + (bests[i],)
                if TEMPERED:
                    e = tl.sum(tl.exp2(u * LOG2E), axis=1, keep_dims=True)
                    new_sums_1 = new_sums_1 + (sums_1[i] * tl.exp2(shift * LOG2E) + e,)
                else:
                    new_sums_1 = new_sums_1 + (sums_1[i],)
                if DENSE:
                    products = tl.where(dense != 0.0, dense * u, 0.0)
                    dot = dots[i] + shift * mass
                    new_dots = new_dots + (dot + tl.sum(products, axis=1, keep_dims=True),)
                else:
                    new_dots = new_dots + (dots[i],)
        for i in tl.static_range(L):
            e = tl.exp2(ts[i])
            shrink = tl.exp2(moves[i])
            new_sums = new_sums + (sums[i] * shrink + tl.sum(e, axis=1, keep_dims=True),)
            for k in tl.static_range(K):
                terms = tl.sum(e * ts[k], axis=1, keep_dims=True)
                held = cross[i * K + k] + moves[k] * sums[i]
                new_cross = new_cross + (held * shrink + terms,)
            if i >= K:
                terms = tl.sum(e * ts[i], axis=1, keep_dims=True)
                held = own_cross[i - K] + moves[i] * sums[i]
                new_own_cross = new_own_cross + (held * shrink + terms,)
        tops = new_tops
        sums = new_sums
        sums_1 = new_sums_1
        bests = new_bests
        dots = new_dots
        cross = new_cross
        own_cross = new_own_cross
        if DENSE:
            mass += tl.sum(dense, axis=1, keep_dims=True)
    return tops, sums, sums_1, bests, dots, cross, own_cross, mass, most, most_at
