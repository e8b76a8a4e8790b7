"""Kernel B's sums over a row: those that the threads have from the first sweep, joined.

    Σ_c p_l log2 (C p_k) = D_lk / d_l - log2 (d_k / C)

gives the entropies and all pairs. A class masked with -inf or an unusable row makes these sums NaN.
Only a row with such sums is swept again, with guards, now that its maxima are known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dml_fast.kernels.rows import LEAST


@triton.jit
def row_sums(
    tops,  # of each thread, as first_sweep returns them
    sums,
    cross,
    own_cross,
    rate,
    peer_weight,
    K: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    PEER_WEIGHT: tl.constexpr,
):
    """Return a row's sums, which are scalars.

    Tuples of the L distributions: maxima, whether they are usable, log2 d, log2 (d / C); the number
    of those that are usable; and tuples of the K students: Σ_l w_kl Σ_c p_l log2 (C p_k),
    Σ_l w_kl Σ_c p_l log2 (C p_l), Σ_l w_kl. Then a number that is finite if all of these are.
    """
    row_tops = ()
    ds = ()
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
        ds = ds + (tl.where(usable, d, 1.0),)
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
        peak = joined(at_home, sums[i], moves[i], moves[i], ds[i]) - excesses[i]
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
            seen = joined(cross[i * K + k], sums[i], moves[k], moves[i], ds[i]) - excesses[k]
            peer_dot += weight * seen
            peer_peak += weight * peaks[i]
            mass_k += tl.where(usables[i], weight, 0.0)
        peer_dots = peer_dots + (peer_dot,)
        peer_peaks = peer_peaks + (peer_peak,)
        masses = masses + (mass_k,)
        finite_probe += peer_dot

    return row_tops, usables, logs, excesses, count, peer_dots, peer_peaks, masses, finite_probe


@triton.jit
def guarded_sums(
    zs,
    row_tops,
    usables,
    logs,
    excesses,
    masses,
    peer_weight,
    far,
    rate,
    K: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    THREADS: tl.constexpr,
    EACH: tl.constexpr,
    Z_ROW: tl.constexpr,
    Z_COL: tl.constexpr,
    T_ROW: tl.constexpr,
    T_COL: tl.constexpr,
    PEER_WEIGHT: tl.constexpr,
):
    """Return the first two tuples of K that row_sums returns, from one more sweep with guards."""
    STEP: tl.constexpr = THREADS * EACH
    lane = tl.arange(0, THREADS)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    nothing = tl.zeros((THREADS, 1), tl.float32)
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
    return new_peer_dots, new_peer_peaks


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
