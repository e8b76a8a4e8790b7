"""Kernel E: the divergences besides the paper's, for rows too long for the registers.

The first sweep over a row gives each distribution's maximum m_l and sum d_l, as in `two_sweep.py`:
each thread keeps those of its own columns and rescales them when a maximum moves. For "reverse"
with uniform weights it also keeps

    G_k = Σ_c e_k (L t_k - Σ_l t_l),     e_k = 2^t_k,  t_l = (z_l - m_l) log2(e) / T

which becomes a (G_k + (L δ_k - Σ_l δ_l) d_k) when maxima move by δ, a = 2^δ_k. At the row's end

    ⟨p_k, h_k⟩ = G_k / d_k - L log2 (d_k / C) + Σ_l log2 (d_l / C)

The other divergences, and rows in which a class is masked or a student unusable, take a second
sweep, with guards, now that all maxima and sums are known. The last sweep computes the gradients.
`divergence_terms.py` has the mathematics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dml_fast.kernels.divergence_terms import (
    JSD,
    REVERSE,
    SYMMETRIC,
    factors_of,
    level_of,
    peers_of_all,
    push,
    share_of,
    student,
)
from dml_fast.kernels.finish import add_divergence, finish, steps
from dml_fast.kernels.rows import (
    LEAST,
    LN2,
    LOG2E,
    dense_target,
    gradient_tile,
    label_share,
    read_labels,
    read_scalar,
    row_share,
)
from dml_fast.kernels.two_sweep import LOWEST, joined, rounded


@triton.jit(do_not_specialize=["N"])
def divergence_long(
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
    THREADS: tl.constexpr,
    EACH: tl.constexpr,  # adjacent columns per thread
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
    """Compute losses, statistics, and gradients or what they need later. Grid: (N,)."""
    zs = (z0, z1, z2, z3, z4, z5, z6, z7)
    gs = (g0, g1, g2, g3, g4, g5, g6, g7)
    DENSE: tl.constexpr = SOFT or SMOOTH
    STEP: tl.constexpr = THREADS * EACH
    AT_FIRST: tl.constexpr = KIND == REVERSE and not PEER_WEIGHT
    pid = tl.program_id(0)
    row = pid
    far = row.to(tl.int64)
    stride = N.to(tl.int64)
    rate = LOG2E / temperature
    lane = tl.arange(0, THREADS)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    nothing = tl.zeros((THREADS, 1), tl.float32)

    # Sweep 1. Each is (THREADS, 1): maxima, sums at T and at T = 1, the first column with the
    # maximum, ⟨target, z - max⟩, G.
    tops = ()
    sums = ()
    sums_1 = ()
    bests = ()
    dots = ()
    apart = ()
    for i in tl.static_range(L):
        tops = tops + (nothing + LOWEST,)
        sums = sums + (nothing,)
        if i < K:
            sums_1 = sums_1 + (nothing,)
            bests = bests + (tl.full((THREADS, 1), C, tl.int32),)
            dots = dots + (nothing,)
            apart = apart + (nothing,)
    mass_here = nothing
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
        new_sums = ()
        new_sums_1 = ()
        new_bests = ()
        new_dots = ()
        new_apart = ()
        total = tl.zeros((THREADS, EACH), tl.float32)
        total_move = nothing
        for i in tl.static_range(L):
            if i < K:
                at = far * Z_ROW + col * Z_COL
            else:
                at = far * T_ROW + col * T_COL
            z = tl.load(zs[i] + at, mask=inside, other=float("-inf")).to(tl.float32)
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
            total += u * rate
            total_move += shift * rate
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
                    dot = dots[i] + shift * mass_here
                    new_dots = new_dots + (dot + tl.sum(products, axis=1, keep_dims=True),)
                else:
                    new_dots = new_dots + (dots[i],)
        for i in tl.static_range(L):
            e = tl.exp2(ts[i])
            shrink = tl.exp2(moves[i])
            new_sums = new_sums + (sums[i] * shrink + tl.sum(e, axis=1, keep_dims=True),)
            if i < K:
                if AT_FIRST:
                    held = apart[i] + (L * moves[i] - total_move) * sums[i]
                    more_apart = tl.sum(e * (L * ts[i] - total), axis=1, keep_dims=True)
                    new_apart = new_apart + (held * shrink + more_apart,)
                else:
                    new_apart = new_apart + (apart[i],)
        tops = new_tops
        sums = new_sums
        sums_1 = new_sums_1
        bests = new_bests
        dots = new_dots
        apart = new_apart
        if DENSE:
            mass_here += tl.sum(dense, axis=1, keep_dims=True)

    # The threads' sums become those of the row, which are scalars.
    row_tops = ()
    row_sums = ()
    moves = ()
    usables = ()
    logs = ()
    excesses = ()  # log2 (d / C)
    logs_1 = ()  # log2 d at T = 1, students only
    entropies = ()  # the dense part of their cross-entropies
    row_bests = ()
    dense_mass = tl.sum(mass_here)
    count = 0.0
    total_move = nothing
    total_excess = 0.0
    for i in tl.static_range(L):
        top = tl.max(tops[i])
        move = tl.maximum(tops[i] - top, LEAST) * rate
        d = tl.sum(rounded(sums[i], tl.exp2(move)))
        usable = d > 0.0
        excess = tl.where(usable, tl.log2(d * (1.0 / C)), 0.0)
        row_tops = row_tops + (top,)
        row_sums = row_sums + (tl.where(usable, d, 1.0),)
        moves = moves + (move,)
        usables = usables + (usable,)
        logs = logs + (tl.where(usable, tl.log2(d), 0.0),)
        excesses = excesses + (excess,)
        count += tl.where(usable, 1.0, 0.0)
        total_move += move
        total_excess += excess
        if i < K:  # here, so that sweep 2 need not hold what the threads have
            log_d_1 = logs[i]
            if TEMPERED:
                gap = tl.maximum(tops[i] - top, LEAST) * LOG2E
                d_1 = tl.sum(rounded(sums_1[i], tl.exp2(gap)))
                log_d_1 = tl.where(usable, tl.log2(d_1), 0.0)
            logs_1 = logs_1 + (log_d_1,)
            ce = 0.0
            if DENSE:
                shift = tl.maximum(tops[i] - top, LEAST)
                ce = dense_mass * log_d_1 * LN2 - tl.sum(dots[i] + shift * mass_here)
            entropies = entropies + (ce,)
            best = -1
            if STATS > 0:
                best = tl.min(tl.where(tops[i] == top, bests[i], C))
            row_bests = row_bests + (best,)
    mean_hs = ()
    kls = ()
    finite_probe = 0.0
    for k in tl.static_range(K):
        mean_h = 0.0
        if AT_FIRST:
            far_apart = L * moves[k] - total_move
            mean_h = joined(apart[k], sums[k], far_apart, moves[k], row_sums[k])
            mean_h += total_excess - L * excesses[k]
        mean_hs = mean_hs + (mean_h,)
        kls = kls + (mean_h,)
        finite_probe += mean_h

    # Sweep 2, with guards. x - x is 0 for a finite x, and NaN otherwise.
    if (AT_FIRST == 0) | ((finite_probe - finite_probe) != 0.0) | (count < L):
        careful = ()
        for k in tl.static_range(2 * K):
            careful = careful + (nothing,)
        for start in range(0, C, STEP):
            col = start + lane
            us = _read(
                zs, row_tops, usables, rate, far, col, K, L, C, Z_ROW, Z_COL, T_ROW, T_COL, TEMPERED
            )
            mass, log_sum, mix, peaks, ps = peers_of_all(
                us, logs, excesses, usables, peer_weight, rate, L, TEMPERED, PEER_WEIGHT, KIND
            )
            new = ()
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
                new = new + (careful[2 * k] + tl.sum(p * h, axis=1, keep_dims=True),)
                if KIND == SYMMETRIC:
                    v += peaks
                new = new + (careful[2 * k + 1] + tl.sum(v, axis=1, keep_dims=True),)
            careful = new
        new_mean_hs = ()
        new_kls = ()
        for k in tl.static_range(K):
            new_mean_hs = new_mean_hs + (tl.sum(careful[2 * k]),)
            new_kls = new_kls + (tl.sum(careful[2 * k + 1]),)
        mean_hs = new_mean_hs
        kls = new_kls

    # The label.
    valid = True
    sparse = 0.0
    mass_of_target = dense_mass
    y = -1
    if not SOFT:
        y, valid, own = read_labels(
            index, class_weight, ignore_index, row, row < N, C, IGNORE, CLASS_WEIGHT
        )
        sparse = own
        if SMOOTH:
            sparse = own * (1.0 - smoothing)
        mass_of_target = sparse + tl.where(valid, dense_mass, 0.0)
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
    of_peers = of_row * (temperature * LN2)
    if MEAN:
        of_label = of_row * per_label
        of_peers = of_row * (temperature * LN2 * per_kl)
    kl_weight = read_scalar(kl_weight, KL_ON_DEVICE)

    # Losses.
    by_program, by_quantity = steps(QUANTITIES, AT_ONCE)
    here = partials + pid * by_program
    for k in tl.static_range(K):
        mass = factors_of(peer_weight, usables, k, L, PEER_WEIGHT, KIND)[1]
        kl = kls[k]
        if KIND == JSD or not PEER_WEIGHT:
            kl = tl.maximum(kl, 0.0)  # never negative, except by rounding
        share = share_of(count, mass, PEER_WEIGHT, PEER_MEAN, KIND)
        kl = kl * (LN2 * temperature * temperature) * share * of_row
        kl = tl.where(usables[k], kl, float("nan"))
        if LABELLED:
            kl = tl.where(valid, kl, 0.0)
        ce = entropies[k]
        if not SOFT:
            own_logit = tl.load(zs[k] + far * Z_ROW + y * Z_COL).to(tl.float32)
            ce += sparse * (logs_1[k] * LN2 - (own_logit - row_tops[k]))
        ce = tl.where(valid, tl.where(usables[k], ce, float("nan")) * of_row, 0.0)
        if BY_ROW:
            tl.store(losses + k * stride + far, add_divergence(ce, kl, kl_weight))
        if not BY_ROW or STATS > 0:
            tl.store(here + k * by_quantity, ce)
            tl.store(here + (K + k) * by_quantity, kl)
            if STATS > 0:
                right = valid & usables[k] & (row_bests[k] == y)
                if not SOFT:
                    right = right & (sparse == sparse)
                tl.store(here + (2 * K + k) * by_quantity, tl.where(right, 1.0, 0.0))
                tl.store(here + (3 * K + k) * by_quantity, tl.where(usables[k], 0.0, 1.0))
        if SAVE:
            tl.store(saved + (2 * L + k) * stride + far, logs_1[k])
            tl.store(saved + (2 * L + K + 1 + k) * stride + far, mean_hs[k])
    if SAVE:
        for i in tl.static_range(L):
            tl.store(saved + i * stride + far, row_tops[i])
            mark = tl.where(usables[i], logs[i], float("nan"))
            tl.store(saved + (L + i) * stride + far, mark)
        tl.store(saved + (2 * L + K) * stride + far, mass_of_target)

    # Sweep 3: the gradients, from the end of the row.
    if GRAD:
        tl.debug_barrier()  # all threads have read the label's logit, which may be overwritten now
        for back in range(0, C, STEP):
            col = (tl.cdiv(C, STEP) * STEP - STEP - back) + lane
            inside = col < C
            us = _read(
                zs, row_tops, usables, rate, far, col, K, L, C, Z_ROW, Z_COL, T_ROW, T_COL, TEMPERED
            )
            dense = us[0]
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
            mass, log_sum, mix, peaks, ps = peers_of_all(
                us, logs, excesses, usables, peer_weight, rate, L, TEMPERED, PEER_WEIGHT, KIND
            )
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
                scale = read_scalar(grad_scale + k * SCALE_STEP, SCALE_ON_DEVICE)
                of_label_k = of_label * scale
                q = p
                if TEMPERED:
                    q = tl.exp2(us[k] * LOG2E - logs_1[k])
                g = gradient_tile(
                    q,
                    q,
                    dense,
                    dense,
                    col == y,
                    0.0,
                    tl.where(usables[k], mass_of_target * of_label_k, float("nan")),
                    0.0,
                    tl.where(valid, of_label_k, 0.0),
                    sparse * of_label_k,
                    False,
                    False,
                    DENSE,
                    not SOFT,
                )
                share = share_of(count, mass, PEER_WEIGHT, PEER_MEAN, KIND)
                level = level_of(mean_hs[k], mass, kl_weight, KIND)
                pushed = push(p, h, level, mix, kl_weight, KIND)
                g += pushed * (share * of_peers * (kl_weight * scale))
                if LABELLED:
                    g = tl.where(valid, g, 0.0)  # even where the logits are NaN
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


@triton.jit
def _read(
    zs,
    row_tops,
    usables,
    rate,
    far,
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
