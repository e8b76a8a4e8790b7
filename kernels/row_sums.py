"""Kernel B's sums over a row: those that the threads have from the first sweep, joined.

    Σ_c p_l log2 (C p_k) = D_lk / d_l - log2 (d_k / C)

gives the entropies and all pairs. A class masked with -inf or an unusable row makes these sums NaN.
Only a row with such sums is swept again, with guards, now that its maxima are known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dml_fast.kernels.rows import LEAST, LOG2E, columns


@triton.jit
def row_sums(
    tops,  # of each thread, as first_sweep returns them
    sums,
    sums_1,
    dots,
    cross,
    own_cross,
    mass,
    rate,
    peer_weight,
    K: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    DENSE: tl.constexpr,
    TEMPERED: tl.constexpr,
    PEER_WEIGHT: tl.constexpr,
    BATCH: tl.constexpr,  # sums over the threads that are made at a time
):
    """Return a row's sums, which are scalars.

    Tuples of the L distributions: maxima, whether they are usable, log2 d, log2 (d / C); of the K
    students: log2 d at T = 1, ⟨target, z - max⟩; the target's mass; the number of distributions
    that are usable; and of the K students: Σ_l w_kl Σ_c p_l log2 (C p_k),
    Σ_l w_kl Σ_c p_l log2 (C p_l), Σ_l w_kl. Then a number that is finite if these are.
    """
    row_tops = over_threads(tops, L, BATCH, True)
    moves = ()
    shrinks = ()
    parts = ()  # what is to be added up
    for i in tl.static_range(L):
        move = tl.maximum(tops[i] - row_tops[i], LEAST) * rate
        shrink = tl.exp2(move)
        moves = moves + (move,)
        shrinks = shrinks + (shrink,)
        parts = parts + (rounded(sums[i], shrink),)
    for i in tl.static_range(L):
        for k in tl.static_range(K):
            parts = parts + (rounded(cross[i * K + k] + moves[k] * sums[i], shrinks[i]),)
    for i in tl.static_range(K, L):
        parts = parts + (rounded(own_cross[i - K] + moves[i] * sums[i], shrinks[i]),)
    AT_1: tl.constexpr = L + L * K + L - K  # where the students' sums at T = 1 begin
    if TEMPERED:
        for k in tl.static_range(K):
            gap = tl.maximum(tops[k] - row_tops[k], LEAST) * LOG2E
            parts = parts + (rounded(sums_1[k], tl.exp2(gap)),)
    AT_DENSE: tl.constexpr = AT_1 + (K if TEMPERED else 0)  # and those of the target
    if DENSE:
        for k in tl.static_range(K):
            shift = tl.maximum(tops[k] - row_tops[k], LEAST)
            parts = parts + (dots[k] + shift * mass,)
        parts = parts + (mass,)
    totals = over_threads(parts, AT_DENSE + (K + 1 if DENSE else 0), BATCH, False)

    usables = ()
    logs = ()
    logs_1 = ()
    excesses = ()  # log2 (d / C)
    peaks = ()  # Σ p log2 (C p)
    row_dots = ()
    count = 0.0
    finite_probe = 0.0
    for i in tl.static_range(L):
        d = totals[i]
        usable = d > 0.0
        excess = tl.where(usable, tl.log2(d * (1.0 / C)), 0.0)
        at_home = totals[L + i * K + i if i < K else L + L * K + i - K]
        peak = at_home / tl.where(usable, d, 1.0) - excess
        usables = usables + (usable,)
        logs = logs + (tl.where(usable, tl.log2(d), 0.0),)
        excesses = excesses + (excess,)
        peaks = peaks + (peak,)
        finite_probe += peak
        count += tl.where(usable, 1.0, 0.0)
    peer_dots = ()  # Σ_l w_kl Σ_c p_l log2 (C p_k)
    peer_peaks = ()  # Σ_l w_kl Σ_c p_l log2 (C p_l)
    masses = ()  # Σ_l w_kl
    row_mass = 0.0
    if DENSE:
        row_mass = totals[AT_DENSE + K]
    for k in tl.static_range(K):
        peer_dot = 0.0
        peer_peak = 0.0
        mass_k = 0.0
        for i in tl.static_range(L):
            weight = 1.0
            if PEER_WEIGHT:
                weight = tl.load(peer_weight + k * L + i)
            seen = totals[L + i * K + k] / tl.where(usables[i], totals[i], 1.0) - excesses[k]
            peer_dot += weight * seen
            peer_peak += weight * peaks[i]
            mass_k += tl.where(usables[i], weight, 0.0)
        peer_dots = peer_dots + (peer_dot,)
        peer_peaks = peer_peaks + (peer_peak,)
        masses = masses + (mass_k,)
        finite_probe += peer_dot
        if TEMPERED:
            logs_1 = logs_1 + (tl.where(usables[k], tl.log2(totals[AT_1 + k]), 0.0),)
        else:
            logs_1 = logs_1 + (logs[k],)
        if DENSE:
            row_dots = row_dots + (totals[AT_DENSE + k],)
        else:
            row_dots = row_dots + (0.0,)
    return (
        row_tops, usables, logs, excesses, logs_1, row_dots, row_mass,
        count, peer_dots, peer_peaks, masses, finite_probe,
    )  # fmt: skip


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
    SPREAD: tl.constexpr,
    Z_ROW: tl.constexpr,
    Z_COL: tl.constexpr,
    T_ROW: tl.constexpr,
    T_COL: tl.constexpr,
    PEER_WEIGHT: tl.constexpr,
):
    """Return the first two tuples of K that row_sums returns, from one more sweep with guards."""
    STEP: tl.constexpr = THREADS * EACH
    lane = columns(THREADS, EACH, SPREAD)
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
def over_threads(parts, N: tl.constexpr, BATCH: tl.constexpr, MAX: tl.constexpr):
    """Return the sums of N parts over the threads, or their maxima; at most BATCH at a time.

    One reduction of several has as many barriers as a reduction of one, and fewer shuffles.
    """
    LEAST_W: tl.constexpr = 1 if N == 1 else (2 if N == 2 else (4 if N <= 4 else 8))
    W: tl.constexpr = LEAST_W if N <= 8 and LEAST_W < BATCH else BATCH
    done = ()
    for i in tl.static_range(0, N, W):
        packed = pack(parts, i, N, W)
        if MAX:
            joined = tl.max(packed, axis=0)
        else:
            joined = tl.sum(packed, axis=0)
        done = done + unpack(joined, W)
    return done


@triton.jit
def pack(parts, FIRST: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """Return W of N parts, (THREADS, 1) each, as (THREADS, W), or (THREADS,) if it is one.

    The last part fills up.
    """
    if W == 1:
        part = parts[FIRST if FIRST < N else N - 1]
        packed = tl.reshape(part, (part.shape[0],))
    else:
        a = pack(parts, FIRST, N, W // 2)
        b = pack(parts, FIRST + W // 2, N, W // 2)
        packed = tl.reshape(tl.join(a, b), (a.shape[0], W))
    return packed


@triton.jit
def unpack(values, W: tl.constexpr):
    """Return the W scalars of (W,) as `pack` had them."""
    if W == 1:
        found = (values,)
    elif W == 2:
        a, b = tl.split(values)
        found = (a, b)
    else:
        a, b = tl.split(tl.reshape(values, (W // 2, 2)))
        found = unpack(a, W // 2) + unpack(b, W // 2)
    return found


@triton.jit
def rounded(a, b):
    """Return a b, rounded to fp32 before anything is added to it.

    If it were fused with the first addition of a sum over threads, lane i would add its exact
    product to lane j's rounded one, and lane j the reverse. Their sums would differ in the last
    bit, and either could be the result.
    """
    return tl.fma(a, b, tl.zeros_like(a))
