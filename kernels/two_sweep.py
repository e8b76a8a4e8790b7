"""Kernel B: rows too long for the registers.

The first sweep reads each logit once and computes everything but the gradients. Each thread keeps,
for its own columns and without synchronisation, the running maximum m_l, d_l = Σ e_l and the K L
sums

    D_lk = Σ_c e_l t_k,     e_l = 2^t_l,  t_l = (z_l - m_l) log2(e) / T

When a maximum moves by δ, it rescales them: d <- a d, D_lk <- a_l (D_lk + δ_k d_l), with
a = 2^δ. At the end of the row the threads' sums are joined in the same way, and

    Σ_c p_l log2 (C p_k) = D_lk / d_l - log2 (d_k / C)

gives the entropies and all pairs. So autograd's forward pass reads the logits once, and its
backward pass once more (gradient.py). The engine's path computes the gradients in a second sweep,
from the end of the row to its start, since the last columns may still be in the cache.

A class masked with -inf or an unusable row makes these sums NaN. Only a row with such sums is swept
again, with guards, now that its maxima are known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dml_fast.kernels.disagreement import disagree_again
from dml_fast.kernels.finish import add_divergence, finish, steps
from dml_fast.kernels.rows import (
    LEAST,
    LN2,
    LOG2E,
    dense_target,
    gradient_tile,
    label_share,
    peer_share,
    read_labels,
    read_scalar,
    row_share,
)

LOWEST = tl.constexpr(
    -3.4028234663852886e38
)  # the lowest fp32 number: the maximum before the first logit


@triton.jit(do_not_specialize=["N"])
def two_sweep(
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
    more,  # (K + 1 + K K,) fp32, see finish.py
    information,  # (N,) fp32
    saved,  # (2 L + K + 1, N) fp32: max, log2 d, log2 d at T = 1, the target's mass
    partials,
    groups,
    totals,
    counters,
    N,
    ignore_index,
    temperature,
    smoothing,
    given_labels,  # 1 / labelled rows, if known
    per_row,  # 1 / rows
    K: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    THREADS: tl.constexpr,
    EACH: tl.constexpr,  # adjacent columns per thread
    Z_ROW: tl.constexpr,
    Z_COL: tl.constexpr,
    T_ROW: tl.constexpr,
    T_COL: tl.constexpr,
    SOFT_ROW: tl.constexpr,
    SOFT_COL: tl.constexpr,
    GRAD: tl.constexpr,
    SAVE: tl.constexpr,
    STATS: tl.constexpr,  # 0: none, 1: cheap, 2: all
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
    HINTS: tl.constexpr,  # keep the logits in the L2 cache until the second sweep
):
    """Compute losses, statistics, and gradients or what they need later. Grid: (N,)."""
    zs = (z0, z1, z2, z3, z4, z5, z6, z7)
    gs = (g0, g1, g2, g3, g4, g5, g6, g7)
    DENSE: tl.constexpr = SOFT or SMOOTH
    STEP: tl.constexpr = THREADS * EACH
    KEEP: tl.constexpr = "evict_last" if HINTS else ""
    DROP: tl.constexpr = "evict_first" if HINTS else ""
    pid = tl.program_id(0)
    row = pid
    far = row.to(tl.int64)
    rate = LOG2E / temperature
    lane = tl.arange(0, THREADS)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    nothing = tl.zeros((THREADS, 1), tl.float32)

    # Sweep 1. Each is (THREADS, 1): maxima, sums at T and at T = 1, the first column with the
    # maximum, ⟨target, z - max⟩, D.
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

    # The threads' sums become those of the row, which are scalars.
    row_tops = ()
    row_sums = ()
    moves = ()
    usables = ()
    logs = ()
    excesses = ()  # log2 (d / C)
    peaks = ()  # Σ p log2 (C p)
    count = 0.0
    for i in tl.static_range(L):
        top = tl.max(tops[i])
        move = tl.maximum(tops[i] - top, LEAST) * rate
        d = tl.sum(rounded(sums[i], tl.exp2(move)))
        usable = d > 0.0
        log_d = tl.where(usable, tl.log2(d), 0.0)
        row_tops = row_tops + (top,)
        row_sums = row_sums + (tl.where(usable, d, 1.0),)
        moves = moves + (move,)
        usables = usables + (usable,)
        logs = logs + (log_d,)
        excesses = excesses + (tl.where(usable, tl.log2(d * (1.0 / C)), 0.0),)
    peer_dots = ()  # Σ_l w_kl Σ_c p_l log2 (C p_k)
    peer_peaks = ()  # Σ_l w_kl Σ_c p_l log2 (C p_l)
    masses = ()  # Σ_l w_kl
    finite_probe = 0.0
    for i in tl.static_range(L):
        if i < K:
            at_home = cross[i * K + i]
        else:
            at_home = own_cross[i - K]
        peak = joined(at_home, sums[i], moves[i], moves[i], row_sums[i]) - excesses[i]
        peaks = peaks + (peak,)
        finite_probe += peak
        count += tl.where(usables[i], 1.0, 0.0)
    for k in tl.static_range(K):
        peer_dot = 0.0
        peer_peak = 0.0
        mass_k = 0.0
        for i in tl.static_range(L):
            weight = 1.0
            if PEER_WEIGHT:
                weight = tl.load(peer_weight + k * L + i)
            seen = joined(cross[i * K + k], sums[i], moves[k], moves[i], row_sums[i]) - excesses[k]
            peer_dot += weight * seen
            peer_peak += weight * peaks[i]
            mass_k += tl.where(usables[i], weight, 0.0)
        peer_dots = peer_dots + (peer_dot,)
        peer_peaks = peer_peaks + (peer_peak,)
        masses = masses + (mass_k,)
        finite_probe += peer_dot

    # x - x is 0 for a finite x, and NaN otherwise.
    if ((finite_probe - finite_probe) != 0.0) & (L > 1):
        careful = ()
        for i in tl.static_range(L + K):
            careful = careful + (nothing,)
        for start in range(0, C, STEP):
            col = start + lane
            inside = col < C
            new = ()
            ps = ()
            ts = ()
            for i in tl.static_range(L):
                if i < K:
                    at = far * Z_ROW + col * Z_COL
                else:
                    at = far * T_ROW + col * T_COL
                z = tl.load(zs[i] + at, mask=inside, other=float("-inf")).to(tl.float32)
                t = (z - row_tops[i]) * rate
                p = tl.where(usables[i], tl.exp2(t - logs[i]), 0.0)
                products = tl.where(p > 0.0, p * t, 0.0)
                new = new + (careful[i] + tl.sum(products, axis=1, keep_dims=True),)
                ps = ps + (p,)
                ts = ts + (t,)
            for k in tl.static_range(K):
                mix = tl.zeros((THREADS, EACH), tl.float32)
                for i in tl.static_range(L):
                    if PEER_WEIGHT:
                        mix += tl.load(peer_weight + k * L + i) * ps[i]
                    else:
                        mix += ps[i]
                products = tl.where(mix != 0.0, mix * ts[k], 0.0)
                new = new + (careful[L + k] + tl.sum(products, axis=1, keep_dims=True),)
            careful = new
        new_peaks = ()
        new_peer_dots = ()
        new_peer_peaks = ()
        for i in tl.static_range(L):
            new_peaks = new_peaks + (tl.sum(careful[i]) - excesses[i],)
        for k in tl.static_range(K):
            peer_peak = 0.0
            for i in tl.static_range(L):
                if PEER_WEIGHT:
                    peer_peak += tl.load(peer_weight + k * L + i) * new_peaks[i]
                else:
                    peer_peak += new_peaks[i]
            new_peer_dots = new_peer_dots + (tl.sum(careful[L + k]) - masses[k] * excesses[k],)
            new_peer_peaks = new_peer_peaks + (peer_peak,)
        peer_dots = new_peer_dots
        peer_peaks = new_peer_peaks

    # The label.
    valid = True
    sparse = 0.0
    row_mass = tl.sum(mass)
    y = -1
    if not SOFT:
        y, valid, own = read_labels(
            index, class_weight, ignore_index, row, row < N, C, IGNORE, CLASS_WEIGHT
        )
        sparse = own
        if SMOOTH:
            sparse = own * (1.0 - smoothing)
        row_mass = sparse + tl.where(valid, row_mass, 0.0)
    elif STATS > 0:
        y = tl.min(tl.where(most == tl.max(most), most_at, C))
    of_row = 1.0
    if ROW_WEIGHT:
        of_row = tl.load(row_weight + row)
    per_label = given_labels
    if MEAN or STATS > 0:
        per_label = label_share(
            index,
            class_weight,
            label_count,
            given_labels,
            ignore_index,
            N,
            C,
            LABELS,
            IGNORE,
            CLASS_WEIGHT,
        )
    per_kl = per_row
    if ROWS != 0 and (MEAN or STATS > 0):
        per_kl = row_share(index, row_count, per_row, per_label, ignore_index, N, C, ROWS)
    of_label = of_row
    of_peers = of_row * temperature
    if MEAN:
        of_label = of_row * per_label
        of_peers = of_row * (temperature * per_kl)
    kl_weight = read_scalar(kl_weight, KL_ON_DEVICE)
    share = 1.0
    if not PEER_WEIGHT:
        share = peer_share(count, PEER_MEAN)
    strength = share * of_peers * kl_weight

    # Losses.
    by_program, by_quantity = steps(QUANTITIES, AT_ONCE)
    here = partials + pid * by_program
    stride = N.to(tl.int64)
    logs_1 = ()
    for k in tl.static_range(K):
        log_d_1 = logs[k]
        if TEMPERED:
            gap = tl.maximum(tops[k] - row_tops[k], LEAST) * LOG2E
            d_1 = tl.sum(rounded(sums_1[k], tl.exp2(gap)))
            log_d_1 = tl.where(usables[k], tl.log2(d_1), 0.0)
        logs_1 = logs_1 + (log_d_1,)
        kl = 0.0
        if L > 1:
            kl = peer_peaks[k] - peer_dots[k]
            if not PEER_WEIGHT:
                kl = tl.maximum(kl, 0.0)  # never negative, except by rounding
            kl = kl * (LN2 * temperature * temperature) * share * of_row
            kl = tl.where(usables[k], kl, float("nan"))
            if LABELLED:
                kl = tl.where(valid, kl, 0.0)
        ce = 0.0
        if not SOFT:
            own_logit = tl.load(zs[k] + far * Z_ROW + y * Z_COL).to(tl.float32)
            ce = sparse * (log_d_1 * LN2 - (own_logit - row_tops[k]))
        if DENSE:
            shift = tl.maximum(tops[k] - row_tops[k], LEAST)
            dot = tl.sum(dots[k] + shift * mass)
            ce += tl.sum(mass) * log_d_1 * LN2 - dot
        ce = tl.where(valid, tl.where(usables[k], ce, float("nan")) * of_row, 0.0)
        if BY_ROW:
            tl.store(losses + k * stride + far, add_divergence(ce, kl, kl_weight))
        if not BY_ROW or STATS > 0:
            tl.store(here + k * by_quantity, ce)
            tl.store(here + (K + k) * by_quantity, kl)
            if STATS > 0:
                best = tl.min(tl.where(tops[k] == row_tops[k], bests[k], C))
                right = valid & usables[k] & (best == y)
                if not SOFT:
                    right = right & (sparse == sparse)
                tl.store(here + (2 * K + k) * by_quantity, tl.where(right, 1.0, 0.0))
                tl.store(here + (3 * K + k) * by_quantity, tl.where(usables[k], 0.0, 1.0))
        if SAVE:
            tl.store(saved + (2 * L + k) * stride + far, log_d_1)
    if SAVE:
        for i in tl.static_range(L):
            tl.store(saved + i * stride + far, row_tops[i])
            mark = tl.where(usables[i], logs[i], float("nan"))
            tl.store(saved + (L + i) * stride + far, mark)
        tl.store(saved + (2 * L + K) * stride + far, row_mass)

    # Sweep 2: the gradients, from the end of the row.
    if GRAD:
        tl.debug_barrier()  # all threads have read the label's logit, which may be overwritten now
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

    if STATS > 1:
        disagree_again(
            zs,
            usables,
            row_tops,
            logs,
            rate,
            here,
            by_quantity,
            information,
            far,
            K,
            C,
            THREADS,
            EACH,
            Z_ROW,
            Z_COL,
        )
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


@triton.jit
def joined(cross, sums, move_k, move_l, row_sum):
    """Return Σ_c p_l (log2 p_k + log2 d_k) from each thread's D_lk and d_l."""
    return tl.sum(rounded(cross + move_k * sums, tl.exp2(move_l))) / row_sum


@triton.jit
def rounded(a, b):
    """Return a b, rounded to fp32 before anything is added to it.

    If it were fused with the first addition of a sum over threads, lane i would add its exact
    product to lane j's rounded one, and lane j the reverse. Their sums would differ in the last
    bit, and either could be the result.
    """
    return tl.fma(a, b, tl.zeros_like(a))
