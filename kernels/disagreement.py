"""The statistics that compare the students, for ``return_stats=True``.

They are each student's entropy, the divergence of each pair, and the mutual information
H(mean p) - mean H(p), which is the mean divergence from p to mean p.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dml_fast.kernels.rows import LN2, columns


@triton.jit
def disagree_here(
    log_ps,
    logs,
    excesses,
    usables,
    here,
    step,
    information,
    row,
    ok,
    K: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the statistics of rows whose log2 (C p) are in registers.

    ``logs`` and ``excesses`` are log2 d and log2 (d / C). The first quantity goes to ``here``, and
    ``step`` numbers on is the next (finish.py).
    """
    count = tl.zeros((R, 1), tl.float32)
    for k in tl.static_range(K):
        count += tl.where(usables[k], 1.0, 0.0)
    mean = tl.zeros((R, BLOCK), tl.float32)
    gaps = tl.zeros((R, BLOCK), tl.float32)
    for k in tl.static_range(K):
        p = tl.where(usables[k], tl.exp2(log_ps[k]), 0.0)
        products = tl.where(p > 0.0, p * log_ps[k], 0.0)
        mean += p / count
        gaps += products / count
        peak = tl.sum(products, axis=1, keep_dims=True) / C
        entropy = tl.where(usables[k], LN2 * ((logs[k] - excesses[k]) - peak), float("nan"))
        tl.store(here + (4 * K + k) * step, tl.sum(tl.where(ok, entropy, 0.0)))
        for j in tl.static_range(K):
            terms = pair_divergence(log_ps[k], log_ps[j])
            pair = tl.sum(terms, axis=1, keep_dims=True) / C
            pair = tl.where(usables[k] & usables[j], tl.maximum(pair, 0.0), float("nan"))
            tl.store(here + (5 * K + 1 + k * K + j) * step, tl.sum(tl.where(ok, pair, 0.0)))
    gaps -= mean * tl.log2(tl.maximum(mean, 1e-37))
    gap = tl.sum(gaps, axis=1, keep_dims=True) * (LN2 / C)
    gap = tl.where(count > 0.0, tl.maximum(gap, 0.0), float("nan"))
    tl.store(information + row, gap, mask=ok)
    tl.store(here + 5 * K * step, tl.sum(tl.where(ok, gap, 0.0)))


@triton.jit
def disagree_again(
    zs,
    usables,
    tops,
    logs,
    rate,
    here,
    step,
    information,
    far,
    K: tl.constexpr,
    C: tl.constexpr,
    THREADS: tl.constexpr,
    EACH: tl.constexpr,
    SPREAD: tl.constexpr,
    Z_ROW: tl.constexpr,
    Z_COL: tl.constexpr,
):
    """Store the statistics of a row, from one more sweep over it; ``here`` as above."""
    STEP: tl.constexpr = THREADS * EACH
    lane = columns(THREADS, EACH, SPREAD)
    nothing = tl.zeros((THREADS, 1), tl.float32)
    count = 0.0
    for k in tl.static_range(K):
        count += tl.where(usables[k], 1.0, 0.0)
    pairs = ()
    for _ in tl.static_range(K * K):
        pairs = pairs + (nothing,)
    entropies = ()
    for _ in tl.static_range(K):
        entropies = entropies + (nothing,)
    total = nothing
    for start in range(0, C, STEP):
        col = start + lane
        log_ps = ()
        mean = tl.zeros((THREADS, EACH), tl.float32)
        new_entropies = ()
        for k in tl.static_range(K):
            z = tl.load(zs[k] + far * Z_ROW + col * Z_COL, mask=col < C, other=float("-inf"))
            log_p = (z.to(tl.float32) - tops[k]) * rate - logs[k]
            p = tl.where(usables[k], tl.exp2(log_p), 0.0)
            products = tl.where(p > 0.0, p * log_p, 0.0)
            mean += p / count
            terms = tl.sum(products, axis=1, keep_dims=True)
            new_entropies = new_entropies + (entropies[k] - terms,)
            log_ps = log_ps + (log_p,)
        entropies = new_entropies
        new_pairs = ()
        for k in tl.static_range(K):
            for j in tl.static_range(K):
                terms = tl.sum(pair_divergence(log_ps[k], log_ps[j]), axis=1, keep_dims=True)
                new_pairs = new_pairs + (pairs[k * K + j] + terms,)
        pairs = new_pairs
        log_mean = tl.log2(tl.maximum(mean, 1e-37))
        for k in tl.static_range(K):
            terms = tl.sum(pair_divergence(log_ps[k], log_mean), axis=1, keep_dims=True)
            total += tl.where(usables[k], terms / count, 0.0)
    for k in tl.static_range(K):
        entropy = tl.where(usables[k], LN2 * tl.sum(entropies[k]), float("nan"))
        tl.store(here + (4 * K + k) * step, entropy)
        for j in tl.static_range(K):
            pair = tl.maximum(tl.sum(pairs[k * K + j]), 0.0)
            pair = tl.where(usables[k] & usables[j], pair, float("nan"))
            tl.store(here + (5 * K + 1 + k * K + j) * step, pair)
    gap = tl.sum(total)
    gap = tl.where(count > 0.0, tl.maximum(gap, 0.0), float("nan"))
    tl.store(information + far, gap)
    tl.store(here + 5 * K * step, gap)


@triton.jit
def pair_divergence(log_p, log_r):
    """Return terms, never negative, whose sum over the classes is KL(p || r).

    Takes base-2 logarithms. The terms are p (δ + e^-δ - 1) with δ = log p - log r (the Bregman
    form): in fp32, for students that differ by 1e-4, their sum is right to four digits, while that
    of p δ is right to less than two.
    """
    p = tl.exp2(log_p)
    delta = (log_p - log_r) * LN2
    series = 1.0 / 362880.0
    series = 1.0 / 40320.0 - delta * series
    series = 1.0 / 5040.0 - delta * series
    series = 1.0 / 720.0 - delta * series
    series = 1.0 / 120.0 - delta * series
    series = 1.0 / 24.0 - delta * series
    series = 1.0 / 6.0 - delta * series
    series = 0.5 - delta * series
    near = p * delta * delta * series
    far = tl.where(p == 0.0, 0.0, p * delta) - p + tl.exp2(log_r)
    return tl.where(tl.abs(delta) < 0.5, near, far)
