"""Kernel B: rows too long for the registers.

The first sweep (first_sweep.py) reads each logit once; the sums of its threads (row_sums.py) give
everything but the gradients. So autograd's forward pass reads the logits once, and its backward
pass once more (gradient.py). The engine's path computes the gradients in a second sweep
(last_sweep.py). A row with a class masked with -inf, or an unusable one, takes one more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dml_fast.kernels.disagreement import disagree_again
from dml_fast.kernels.finish import add_divergence, finish, steps
from dml_fast.kernels.first_sweep import first_sweep
from dml_fast.kernels.last_sweep import last_sweep
from dml_fast.kernels.row_sums import guarded_sums, over_threads, row_sums
from dml_fast.kernels.rows import (
    LN2,
    LOG2E,
    peer_share,
    read_labels,
    read_scalar,
    row_factors,
)


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
    EACH: tl.constexpr,  # columns of a thread in a step
    SPREAD: tl.constexpr,  # whether these are apart, see rows.columns
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
    BATCH: tl.constexpr,  # see row_sums.py
    HINTS: tl.constexpr,  # keep the logits in the L2 cache until the second sweep
):
    """Compute losses, statistics, and gradients or what they need later. Grid: (N,)."""
    zs = (z0, z1, z2, z3, z4, z5, z6, z7)
    gs = (g0, g1, g2, g3, g4, g5, g6, g7)
    DENSE: tl.constexpr = SOFT or SMOOTH
    KEEP: tl.constexpr = "evict_last" if HINTS else ""
    DROP: tl.constexpr = "evict_first" if HINTS else ""
    pid = tl.program_id(0)
    row = pid
    far = row.to(tl.int64)
    rate = LOG2E / temperature
    tops, sums, sums_1, bests, dots, cross, own_cross, mass, most, most_at = first_sweep(
        zs, soft, class_weight, far, rate, smoothing,
        K, L, C, THREADS, EACH, SPREAD, Z_ROW, Z_COL, T_ROW, T_COL, SOFT_ROW, SOFT_COL,
        STATS, SOFT, SMOOTH, CLASS_WEIGHT, TEMPERED, KEEP,
    )  # fmt: skip
    (
        row_tops, usables, logs, excesses, logs_1, dots, row_mass,
        count, peer_dots, peer_peaks, masses, finite_probe,
    ) = row_sums(
        tops, sums, sums_1, dots, cross, own_cross, mass, rate, peer_weight,
        K, L, C, DENSE, TEMPERED, PEER_WEIGHT, BATCH,
    )  # fmt: skip
    # x - x is 0 for a finite x, and NaN otherwise.
    if ((finite_probe - finite_probe) != 0.0) & (L > 1):
        peer_dots, peer_peaks = guarded_sums(
            zs, row_tops, usables, logs, excesses, masses, peer_weight, far, rate,
            K, L, C, THREADS, EACH, SPREAD, Z_ROW, Z_COL, T_ROW, T_COL, PEER_WEIGHT,
        )  # fmt: skip

    # The label.
    valid = True
    sparse = 0.0
    dense_mass = row_mass
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
    per_label, per_kl, of_label, of_peers = row_factors(
        index, class_weight, label_count, row_count, given_labels, per_row, ignore_index, of_row,
        temperature, N, C, LABELS, IGNORE, CLASS_WEIGHT, ROWS, MEAN, STATS > 0,
    )  # fmt: skip
    kl_weight = read_scalar(kl_weight, KL_ON_DEVICE)
    share = 1.0
    if not PEER_WEIGHT:
        share = peer_share(count, PEER_MEAN)
    strength = share * of_peers * kl_weight

    # Losses.
    by_program, by_quantity = steps(QUANTITIES, AT_ONCE)
    here = partials + pid * by_program
    stride = N.to(tl.int64)
    if STATS > 0:
        firsts = ()
        for k in tl.static_range(K):
            firsts = firsts + (tl.where(tops[k] == row_tops[k], C - bests[k], 0),)
        firsts = over_threads(firsts, K, BATCH, True)
    for k in tl.static_range(K):
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
            ce = sparse * (logs_1[k] * LN2 - (own_logit - row_tops[k]))
        if DENSE:
            ce += dense_mass * logs_1[k] * LN2 - dots[k]
        ce = tl.where(valid, tl.where(usables[k], ce, float("nan")) * of_row, 0.0)
        if BY_ROW:
            tl.store(losses + k * stride + far, add_divergence(ce, kl, kl_weight))
        if not BY_ROW or STATS > 0:
            tl.store(here + k * by_quantity, ce)
            tl.store(here + (K + k) * by_quantity, kl)
            if STATS > 0:
                right = valid & usables[k] & (C - firsts[k] == y)
                if not SOFT:
                    right = right & (sparse == sparse)
                tl.store(here + (2 * K + k) * by_quantity, tl.where(right, 1.0, 0.0))
                tl.store(here + (3 * K + k) * by_quantity, tl.where(usables[k], 0.0, 1.0))
        if SAVE:
            tl.store(saved + (2 * L + k) * stride + far, logs_1[k])
    if SAVE:
        for i in tl.static_range(L):
            tl.store(saved + i * stride + far, row_tops[i])
            mark = tl.where(usables[i], logs[i], float("nan"))
            tl.store(saved + (L + i) * stride + far, mark)
        tl.store(saved + (2 * L + K) * stride + far, row_mass)

    if GRAD:
        tl.debug_barrier()  # all threads have read the label's logit, which may be overwritten now
        last_sweep(
            zs, gs, row_tops, usables, logs, logs_1, masses, row_mass, y, valid, sparse,
            of_label, strength, grad_scale, peer_weight, soft, class_weight, far, rate, smoothing,
            K, L, C, THREADS, EACH, SPREAD, Z_ROW, Z_COL, T_ROW, T_COL, SOFT_ROW, SOFT_COL,
            SOFT, SMOOTH, LABELLED, CLASS_WEIGHT, PEER_WEIGHT, TEMPERED,
            SCALE_ON_DEVICE, SCALE_STEP, DROP,
        )  # fmt: skip
    if STATS > 1:
        disagree_again(
            zs, usables, row_tops, logs, rate, here, by_quantity, information, far, K, C,
            THREADS, EACH, SPREAD, Z_ROW, Z_COL,
        )  # fmt: skip
    if not BY_ROW or STATS > 0:
        finish(
            partials, groups, totals, counters, losses, stats, correct, finite, more,
            kl_weight, per_label, per_kl, per_row, K, QUANTITIES, MEAN, BY_ROW, STATS, AT_ONCE,
        )  # fmt: skip
