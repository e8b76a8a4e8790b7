"""Kernel A: one read of the logits, one write of the gradients.

A program holds R rows of all L distributions in registers, as z - max. The peers enter as
S = Σ_l p_l, whose sum includes l = k, which adds KL(p_k || p_k) = 0:

    KL_k = T² ln2 share (Σ_l Σ_c p_l log2 (C p_l) - Σ_c S log2 (C p_k))
    g_k  = A_k p_k - B_k S - [y] c_k            A, B, c: constants of the row

So nothing is computed pair by pair, and a gradient takes two multiply-adds. One launch writes the
losses, statistics (finish.py) and gradients. For autograd, whose gradients need the outer gradient
first, it saves the O(N) numbers that gradient.py needs instead.

Instructions limit this kernel as much as bytes do (README.md), so its sums have no guards. A masked
class (as 0 x -inf) or an unusable row makes them NaN; then the program computes them again with
guards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dml_fast.kernels.disagreement import disagree_here
from dml_fast.kernels.finish import add_divergence, finish, steps
from dml_fast.kernels.rows import (
    LEAST,
    LN2,
    LOG2E,
    dense_target,
    gradient_tile,
    label_share,
    log_softmax,
    peer_share,
    read_labels,
    read_scalar,
    row_share,
)


@triton.jit(do_not_specialize=["N"])
def one_pass(
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
    R: tl.constexpr,
    BLOCK: tl.constexpr,
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
):
    """Compute losses, statistics, and gradients or what they need later. Grid: (⌈N / R⌉,)."""
    zs = (z0, z1, z2, z3, z4, z5, z6, z7)
    gs = (g0, g1, g2, g3, g4, g5, g6, g7)
    DENSE: tl.constexpr = SOFT or SMOOTH
    pid = tl.program_id(0)
    row = pid * R + tl.arange(0, R)[:, None]
    ok = row < N
    far = row.to(tl.int64)
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

    per_label = given_labels
    if AT_ONCE and STATS < 2 and (MEAN or STATS > 0):  # while the logits are on their way
        per_label = label_share(
            index, class_weight, label_count, given_labels, ignore_index, N, C, LABELS, IGNORE,
            CLASS_WEIGHT,
        )  # fmt: skip

    # The label comes first: whether a row is correct depends on the columns before it.
    valid = ok
    sparse = tl.zeros((R, 1), tl.float32)
    mass = tl.zeros((R, 1), tl.float32)
    y = tl.full((R, 1), -1, tl.int32)
    dense = tl.zeros((R, BLOCK), tl.float32)
    if DENSE:
        raw, dense = dense_target(
            soft, class_weight, far, col, inside, smoothing, C, SOFT, SMOOTH, CLASS_WEIGHT,
            SOFT_ROW, SOFT_COL,
        )  # fmt: skip
        mass = tl.sum(dense, axis=1, keep_dims=True)
        if SOFT and STATS > 0:
            most = tl.max(raw, axis=1, keep_dims=True)
            y = tl.min(tl.where((raw == most) & inside, col, C), axis=1, keep_dims=True)
    if not SOFT:
        y, valid, own = read_labels(
            index, class_weight, ignore_index, row, ok, C, IGNORE, CLASS_WEIGHT
        )
        sparse = own
        if SMOOTH:
            sparse = own * (1.0 - smoothing)
        mass = sparse + tl.where(valid, mass, 0.0)
    if SAVE:
        tl.store(saved + (2 * L + K) * N.to(tl.int64) + far, mass, mask=ok)

    # Each distribution, and their sum.
    us = ()  # log2 (p d); with a temperature other than 1, z - max
    usables = ()
    logs = ()  # log2 d at T
    excesses = ()  # log2 (d / C)
    logs_1 = ()  # and at T = 1, students only
    own_us = ()  # z - max at the label
    rights = ()
    peaks = ()  # Σ p log2 (C p)
    count = tl.zeros((R, 1), tl.float32)
    peer_peak = tl.zeros((R, 1), tl.float32)
    mix = tl.zeros((R, BLOCK), tl.float32)
    for i in tl.static_range(L):
        z = raws[i].to(tl.float32)
        top = tl.max(z, axis=1, keep_dims=True)
        u = z - top
        if C < BLOCK:
            u = tl.where(col < C, u, LEAST)  # adds nothing, unlike -inf
        t = u * rate
        e = tl.exp2(t)
        d = tl.sum(e, axis=1, keep_dims=True)
        usable = d > 0.0
        log_d = tl.where(usable, tl.log2(d), 0.0)
        scale = tl.where(usable, 1.0 / d, 0.0)
        count += tl.where(usable, 1.0, 0.0)
        if L > 1 or STATS > 1:
            excess = tl.where(usable, tl.log2(d * (1.0 / C)), 0.0)
            products = e * t
            if PEER_WEIGHT:
                products = tl.where(e > 0.0, products, 0.0)
            peak = tl.sum(products, axis=1, keep_dims=True) * scale - excess
            if PEER_WEIGHT:
                peak = tl.where(usable, peak, 0.0)
            peer_peak += peak
            excesses = excesses + (excess,)
            peaks = peaks + (peak,)
            if not PEER_WEIGHT:
                mix += e * scale
        if TEMPERED:
            us = us + (u,)
        else:
            us = us + (t,)
        usables = usables + (usable,)
        logs = logs + (log_d,)
        if i < K:
            log_d_1 = log_d
            if TEMPERED:
                d_1 = tl.sum(tl.exp2(u * LOG2E), axis=1, keep_dims=True)
                log_d_1 = tl.where(usable, tl.log2(d_1), 0.0)
            logs_1 = logs_1 + (log_d_1,)
            own_u = top
            if not SOFT:
                own_logit = tl.load(zs[i] + far * Z_ROW + y * Z_COL, mask=ok, other=0.0)
                own_u = own_logit.to(tl.float32) - top
            own_us = own_us + (own_u,)
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
            tl.store(saved + i * N.to(tl.int64) + far, top, mask=ok)
            mark = tl.where(usable, log_d, float("nan"))
            tl.store(saved + (L + i) * N.to(tl.int64) + far, mark, mask=ok)
            if i < K:
                tl.store(saved + (2 * L + i) * N.to(tl.int64) + far, log_d_1, mask=ok)

    # The dot product of each student with its peers: Σ S log2 (C p_k).
    peer_dots = ()
    for k in tl.static_range(K):
        peer_dot = tl.zeros((R, 1), tl.float32)
        if L > 1 and not PEER_WEIGHT:
            t = us[k] * rate if TEMPERED else us[k]
            peer_dot = tl.sum(mix * t, axis=1, keep_dims=True) - count * excesses[k]
        peer_dots = peer_dots + (peer_dot,)
    if L > 1:
        finite_probe = peer_peak
        for k in tl.static_range(K):
            finite_probe += peer_dots[k]
        # x - x is 0 for a finite x, and NaN otherwise.
        broken = tl.sum(tl.where(ok & ((finite_probe - finite_probe) != 0.0), 1, 0))
        if broken > 0:
            new_peaks = ()
            peer_peak = tl.zeros((R, 1), tl.float32)
            mix = tl.zeros((R, BLOCK), tl.float32)
            for i in tl.static_range(L):
                t = us[i] * rate if TEMPERED else us[i]
                # Unlike the exponential below, or the compiler would keep all of them for reuse.
                p = tl.where(usables[i], tl.exp2(tl.maximum(t, LEAST) - logs[i]), 0.0)
                products = tl.where(p > 0.0, p * t, 0.0)
                peak = tl.sum(products, axis=1, keep_dims=True) - excesses[i]
                new_peaks = new_peaks + (peak,)
                peer_peak += peak
                mix += p
            new_peer_dots = ()
            for k in tl.static_range(K):
                t = us[k] * rate if TEMPERED else us[k]
                products = tl.where(mix > 0.0, mix * t, 0.0)
                peer_dot = tl.sum(products, axis=1, keep_dims=True) - count * excesses[k]
                new_peer_dots = new_peer_dots + (peer_dot,)
            peaks = new_peaks
            peer_dots = new_peer_dots

    of_row = tl.full((R, 1), 1.0, tl.float32)
    if ROW_WEIGHT:
        of_row = tl.load(row_weight + row, mask=ok, other=0.0)

    if (AT_ONCE == 0 or STATS > 1) and (MEAN or STATS > 0):  # here it takes fewer registers
        per_label = label_share(
            index, class_weight, label_count, given_labels, ignore_index, N, C, LABELS, IGNORE,
            CLASS_WEIGHT,
        )  # fmt: skip
    per_kl = per_row
    if ROWS != 0 and (MEAN or STATS > 0):
        per_kl = row_share(index, row_count, per_row, per_label, ignore_index, N, C, ROWS)
    of_label = of_row
    of_peers = of_row * temperature
    if MEAN:
        of_label = of_row * per_label
        of_peers = of_row * (temperature * per_kl)
    kl_weight = read_scalar(kl_weight, KL_ON_DEVICE)
    share = tl.full((R, 1), 1.0, tl.float32)
    if not PEER_WEIGHT:
        share = peer_share(count, PEER_MEAN)
    strength = share * of_peers * kl_weight

    # Each student's divergence, loss and gradient.
    by_program, by_quantity = steps(QUANTITIES, AT_ONCE)
    here = partials + pid * by_program
    for k in tl.static_range(K):
        log_p = log_softmax(us[k], logs[k], rate, TEMPERED)
        log_q = us[k] * LOG2E - logs_1[k] if TEMPERED else log_p
        peer_dot = peer_dots[k]
        peer_peak_k = peer_peak
        mass_k = count
        if PEER_WEIGHT:
            mix = tl.zeros((R, BLOCK), tl.float32)
            peer_peak_k = tl.zeros((R, 1), tl.float32)
            mass_k = tl.zeros((R, 1), tl.float32)
            for i in tl.static_range(L):
                weight = tl.load(peer_weight + k * L + i)
                peer = log_softmax(us[i], logs[i], rate, TEMPERED)
                mix += tl.where(usables[i], weight * tl.exp2(peer), 0.0)
                peer_peak_k += weight * peaks[i]
                mass_k += tl.where(usables[i], weight, 0.0)
            t = us[k] * rate if TEMPERED else us[k]
            peer_dot = tl.sum(tl.where(mix != 0.0, mix * t, 0.0), axis=1, keep_dims=True)
            peer_dot -= mass_k * excesses[k]
        kl = tl.zeros((R, 1), tl.float32)
        if L > 1:
            kl = peer_peak_k - peer_dot
            if not PEER_WEIGHT:
                kl = tl.maximum(kl, 0.0)  # never negative, except by rounding
            kl = kl * (LN2 * temperature * temperature) * share * of_row
            kl = tl.where(usables[k], kl, float("nan"))
            if LABELLED:
                kl = tl.where(valid, kl, 0.0)
        ce = tl.zeros((R, 1), tl.float32)
        if not SOFT:
            ce = sparse * (logs_1[k] * LN2 - own_us[k])
        if DENSE:
            products = tl.where(dense != 0.0, dense * log_q, 0.0)
            ce -= tl.sum(products, axis=1, keep_dims=True) * LN2
        ce = tl.where(valid, tl.where(usables[k], ce, float("nan")) * of_row, 0.0)

        if BY_ROW:
            tl.store(losses + k * N.to(tl.int64) + far, add_divergence(ce, kl, kl_weight), mask=ok)
        if not BY_ROW or STATS > 0:
            tl.store(here + k * by_quantity, tl.sum(tl.where(ok, ce, 0.0)))
            tl.store(here + (K + k) * by_quantity, tl.sum(tl.where(ok, kl, 0.0)))
            if STATS > 0:
                tl.store(here + (2 * K + k) * by_quantity, tl.sum(tl.where(rights[k], 1.0, 0.0)))
                wrong = ok & (usables[k] == 0)
                tl.store(here + (3 * K + k) * by_quantity, tl.sum(tl.where(wrong, 1.0, 0.0)))
        if GRAD:
            scale = read_scalar(grad_scale + k * SCALE_STEP, SCALE_ON_DEVICE)
            strength_k = strength * scale
            of_label_k = of_label * scale
            p = tl.exp2(log_p)
            q = p
            if TEMPERED:
                q = tl.exp2(log_q)
            g = gradient_tile(
                p, q, mix, dense, col == y,
                tl.where(usables[k], mass_k * strength_k, float("nan")),
                tl.where(usables[k], mass * of_label_k, float("nan")), strength_k,
                tl.where(valid, of_label_k, 0.0), sparse * of_label_k, L > 1, TEMPERED, DENSE,
                not SOFT,
            )  # fmt: skip
            if LABELLED:
                g = tl.where(valid, g, 0.0)  # even where the logits are NaN
            at = far * C + col
            tl.store(gs[k] + at, g.to(gs[k].dtype.element_ty), mask=inside)

    if STATS > 1:
        log_ps = ()
        for k in tl.static_range(K):
            # Unlike log_p above, or the compiler would keep that for reuse.
            log_ps = log_ps + (log_softmax(us[k], excesses[k], rate, TEMPERED),)
        disagree_here(
            log_ps, logs, excesses, usables, here, by_quantity, information, row, ok, K, C, R, BLOCK
        )
    if not BY_ROW or STATS > 0:
        finish(
            partials, groups, totals, counters, losses, stats, correct, finite, more,
            kl_weight, per_label, per_kl, per_row, K, QUANTITIES, MEAN, BY_ROW, STATS, AT_ONCE,
        )  # fmt: skip
