"""Kernel E: the divergences besides the paper's, for rows too long for the registers.

The first sweep is kernel B's (first_sweep.py). Its sums give "reverse" and "symmetric" of students;
"jsd", teachers and rows with guards take one sweep more, and the gradients the last one
(divergence_sweeps.py). `divergence_terms.py` has the mathematics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dml_fast.kernels.divergence_sweeps import (
    divergence_sweep,
    gradient_sweep,
    joined_pairs,
    row_parts,
)
from dml_fast.kernels.divergence_terms import (
    JSD,
    factors_of,
    row_divergence,
    share_of,
)
from dml_fast.kernels.finish import add_divergence, finish, steps
from dml_fast.kernels.first_sweep import first_sweep
from dml_fast.kernels.row_sums import rounded
from dml_fast.kernels.rows import (
    LEAST,
    LN2,
    LOG2E,
    read_labels,
    read_scalar,
    row_factors,
)


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
    EACH: tl.constexpr,  # columns of a thread in a step
    SPREAD: tl.constexpr,  # whether these are apart, see rows.columns
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
    pid = tl.program_id(0)
    row = pid
    far = row.to(tl.int64)
    stride = N.to(tl.int64)
    rate = LOG2E / temperature
    tops, sums, sums_1, bests, dots, cross, _, mass_here, most, most_at = first_sweep(
        zs, soft, class_weight, far, rate, smoothing,
        K, L, C, THREADS, EACH, SPREAD, Z_ROW, Z_COL, T_ROW, T_COL, SOFT_ROW, SOFT_COL,
        STATS, SOFT, SMOOTH, CLASS_WEIGHT, TEMPERED, "",
    )  # fmt: skip
    row_tops, moves, ds, usables, logs, excesses, count = row_parts(tops, sums, rate, L, C)
    dense_mass = tl.sum(mass_here)
    logs_1 = ()  # log2 d at T = 1
    entropies = ()  # the dense part of the cross-entropies
    row_bests = ()
    for k in tl.static_range(K):
        shift = tl.maximum(tops[k] - row_tops[k], LEAST)
        log_d_1 = logs[k]
        if TEMPERED:
            d_1 = tl.sum(rounded(sums_1[k], tl.exp2(shift * LOG2E)))
            log_d_1 = tl.where(usables[k], tl.log2(d_1), 0.0)
        logs_1 = logs_1 + (log_d_1,)
        ce = 0.0
        if DENSE:
            ce = dense_mass * log_d_1 * LN2 - tl.sum(dots[k] + shift * mass_here)
        entropies = entropies + (ce,)
        best = -1
        if STATS > 0:
            best = tl.min(tl.where(tops[k] == row_tops[k], bests[k], C))
        row_bests = row_bests + (best,)

    if KIND != JSD and L == K:
        mean_hs, kls, probe = joined_pairs(
            cross, sums, moves, ds, excesses, peer_weight, K, L, PEER_WEIGHT, KIND
        )
        # x - x is 0 for a finite x, and NaN otherwise.
        if ((probe - probe) != 0.0) | (count < L):
            mean_hs, kls = divergence_sweep(
                zs, row_tops, usables, logs, excesses, peer_weight, far, rate, beta,
                K, L, C, THREADS, EACH, SPREAD, Z_ROW, Z_COL, T_ROW, T_COL, PEER_WEIGHT,
                TEMPERED, KIND,
            )  # fmt: skip
    else:
        mean_hs, kls = divergence_sweep(
            zs, row_tops, usables, logs, excesses, peer_weight, far, rate, beta,
            K, L, C, THREADS, EACH, SPREAD, Z_ROW, Z_COL, T_ROW, T_COL, PEER_WEIGHT, TEMPERED, KIND,
        )  # fmt: skip

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
    per_label, per_kl, of_label, of_peers = row_factors(
        index, class_weight, label_count, row_count, given_labels, per_row, ignore_index, of_row,
        temperature * LN2, N, C, LABELS, IGNORE, CLASS_WEIGHT, ROWS, MEAN, STATS > 0,
    )  # fmt: skip
    kl_weight = read_scalar(kl_weight, KL_ON_DEVICE)

    # Losses.
    by_program, by_quantity = steps(QUANTITIES, AT_ONCE)
    here = partials + pid * by_program
    for k in tl.static_range(K):
        mass = factors_of(peer_weight, usables, k, L, PEER_WEIGHT, KIND)[1]
        share = share_of(count, mass, PEER_WEIGHT, PEER_MEAN, KIND)
        kl = row_divergence(
            kls[k], usables[k], valid, share, of_row, temperature, LABELLED, PEER_WEIGHT, KIND
        )
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

    if GRAD:
        tl.debug_barrier()  # all threads have read the label's logit, which may be overwritten now
        gradient_sweep(
            zs, gs, row_tops, usables, logs, logs_1, excesses, mean_hs, count,
            mass_of_target, y, valid, sparse, of_label, of_peers, kl_weight, grad_scale,
            peer_weight, soft, class_weight, far, rate, beta, smoothing,
            K, L, C, THREADS, EACH, SPREAD, Z_ROW, Z_COL, T_ROW, T_COL, SOFT_ROW, SOFT_COL,
            SOFT, SMOOTH, LABELLED, CLASS_WEIGHT, PEER_WEIGHT, PEER_MEAN, TEMPERED,
            SCALE_ON_DEVICE, SCALE_STEP, KIND,
        )  # fmt: skip
    if not BY_ROW or STATS > 0:
        finish(
            partials, groups, totals, counters, losses, stats, correct, finite, more,
            kl_weight, per_label, per_kl, per_row, K, QUANTITIES, MEAN, BY_ROW, STATS, AT_ONCE,
        )  # fmt: skip
