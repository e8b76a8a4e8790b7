"""What the divergences besides the paper's have in each class: shared by their three kernels.

As in `dml_fast.loss.divergences`, with logarithms of base 2. For a student with p = p_k, peers'
weights w_l, W = Σ_l w_l, and a_l = log2 (C p_l), a row has the divergence Σ_c v, and its gradient
for the logits is T p (h - ⟨p, h⟩):

    reverse      h = W a_k - Σ_l w_l a_l        v = p h
    symmetric    h as above                     v = p h + Σ_l w_l p_l a_l - V a_k,  V = Σ_l w_l p_l
    jsd          h = (1 - β) log2 (p / m)       v = p h + β p̄ log2 (p̄ / m)

The symmetric one is twice too large, and its gradient has also the paper's half, T (W p - V). Peers
that are unusable have the factor 0, and numbers that are finite. So nothing is computed pair by
pair, except that the mean p̄ adds up the other students: without a difference, and with at most six
additions a class.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dml_fast.kernels.rows import LN2, LOG2E, gradient_tile, log_softmax, peer_share

REVERSE = tl.constexpr(0)
SYMMETRIC = tl.constexpr(1)
JSD = tl.constexpr(2)

TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal fp32 number
HALF_STEP = tl.constexpr(0x400000)  # half of a power of two, in the bits of fp32


@triton.jit
def factors_of(
    peer_weight,
    usables,
    k: tl.constexpr,
    L: tl.constexpr,
    PEER_WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
):
    """Return w_l of each distribution, 0 where it is unusable, and their sum W.

    Uniform weights are 1, student k's own included: only "jsd" leaves it out.
    """
    factors = ()
    mass = tl.where(usables[0], 0.0, 0.0)
    for i in tl.static_range(L):
        factor = tl.where(usables[i], 1.0, 0.0)
        if PEER_WEIGHT:
            factor = factor * tl.load(peer_weight + k * L + i)
        elif KIND == JSD and i == k:
            factor = tl.where(usables[i], 0.0, 0.0)
        factors = factors + (factor,)
        mass += factor
    return factors, mass


@triton.jit
def peer_sums(
    us,  # z - max, scaled already if T = 1; 0 where unusable
    logs,  # log2 d, 0 where unusable
    excesses,  # log2 (d / C), 0 where unusable
    factors,
    rate,
    L: tl.constexpr,
    TEMPERED: tl.constexpr,
    PEER_WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
):
    """Return Σ_l w_l a_l, Σ_l w_l p_l and Σ_l w_l p_l a_l; what is not needed is 0."""
    log_sum = tl.zeros_like(us[0])
    mix = tl.zeros_like(us[0])
    peaks = tl.zeros_like(us[0])
    for i in tl.static_range(L):
        a = log_softmax(us[i], excesses[i], rate, TEMPERED)
        if PEER_WEIGHT:
            log_sum += tl.where(factors[i] != 0.0, factors[i] * a, 0.0)  # not 0 x -inf
        else:
            log_sum += factors[i] * a
        if KIND == SYMMETRIC:
            share = factors[i] * tl.exp2(log_softmax(us[i], logs[i], rate, TEMPERED))
            mix += share
            peaks += tl.where(share != 0.0, share * a, 0.0)
    return log_sum, mix, peaks


@triton.jit
def peers_of_all(
    us,
    logs,
    excesses,
    usables,
    peer_weight,
    rate,
    L: tl.constexpr,
    TEMPERED: tl.constexpr,
    PEER_WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
):
    """Return what students share: W and the `peer_sums` of uniform weights; all p for "jsd"."""
    ps = (us[0],)
    log_sum = us[0]
    mix = us[0]
    peaks = us[0]
    factors, mass = factors_of(peer_weight, usables, 0, L, PEER_WEIGHT, KIND)
    if KIND == JSD:
        ps = ()
        for i in tl.static_range(L):
            ps = ps + (tl.exp2(log_softmax(us[i], logs[i], rate, TEMPERED)),)
    elif not PEER_WEIGHT:
        log_sum, mix, peaks = peer_sums(
            us, logs, excesses, factors, rate, L, TEMPERED, PEER_WEIGHT, KIND
        )
    return mass, log_sum, mix, peaks, ps


@triton.jit
def student(
    k: tl.constexpr,
    us,
    logs,
    excesses,
    usables,
    peer_weight,
    mass,  # these as of `peers_of_all`
    log_sum,
    mix,
    peaks,
    ps,
    rate,
    beta,
    L: tl.constexpr,
    TEMPERED: tl.constexpr,
    PEER_WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
):
    """Return student k's p, h, v without the peaks, the peaks, W, and V (p̄ for "jsd").

    The peaks are Σ_l w_l p_l a_l for "symmetric", and otherwise nothing.
    """
    if KIND == JSD or PEER_WEIGHT:
        factors, mass = factors_of(peer_weight, usables, k, L, PEER_WEIGHT, KIND)
    if KIND == JSD:
        mix = peer_mean(ps, factors, mass, L)
        p = ps[k]
        a = p
    else:
        if PEER_WEIGHT:
            log_sum, mix, peaks = peer_sums(
                us, logs, excesses, factors, rate, L, TEMPERED, PEER_WEIGHT, KIND
            )
        p = tl.exp2(log_softmax(us[k], logs[k], rate, TEMPERED))
        a = log_softmax(us[k], excesses[k], rate, TEMPERED)
    h, v = terms(p, a, mass, log_sum, mix, beta, KIND)
    return p, h, v, peaks, mass, mix


@triton.jit
def peer_mean(ps, factors, mass, L: tl.constexpr):
    """Return p̄ = Σ_l w_l p_l / W, or 0 if there is no usable peer."""
    mean = tl.zeros_like(ps[0])
    for i in tl.static_range(L):
        mean += factors[i] * ps[i]
    return mean * tl.where(mass == 0.0, 0.0, 1.0 / tl.where(mass == 0.0, 1.0, mass))


@triton.jit
def terms(p, a, mass, log_sum, mix, beta, KIND: tl.constexpr):
    """Return h, and v without the peaks; ``mix`` is V, or p̄ for "jsd"."""
    if KIND == JSD:
        m = p * (1.0 - beta) + mix * beta
        h = log_ratio(m, p, (mix - p) * beta) * (beta - 1.0)
        # In a class the two terms' first orders cancel: so small differences keep their digits.
        v = p * h - beta * mix * log_ratio(m, mix, (p - mix) * (1.0 - beta))
    else:
        h = tl.where(p > 0.0, a * mass - log_sum, 0.0)  # not 0 x inf, nor inf - inf
        v = p * h
        if KIND == SYMMETRIC:
            v -= tl.where(mix != 0.0, mix * a, 0.0)
    return h, v


@triton.jit
def log_ratio(m, p, difference):
    """Return log2 (m / p) of numbers of 0 or more, with ``difference`` = m - p.

    Close to m = p it has all digits of the difference. It is finite everywhere, and of no meaning
    where p is 0. With 2^n the power of two for which m / 2^n is within a factor 1.5 of p, it is
    n + log2 ((1 + s) / (1 - s)), s = (m / 2^n - p) / (m / 2^n + p), |s| <= 1/5.
    """
    least = tl.maximum(p, TINY)
    bits = tl.maximum(m, TINY).to(tl.int32, bitcast=True)
    n = (bits - least.to(tl.int32, bitcast=True) + HALF_STEP) >> 23
    scaled = (bits - (n << 23)).to(tl.float32, bitcast=True)
    s = tl.where(n == 0, difference, scaled - least) / (scaled + least)
    square = s * s
    series = square * (2.0 / 9.0 * LOG2E) + 2.0 / 7.0 * LOG2E
    series = square * series + 2.0 / 5.0 * LOG2E
    series = square * series + 2.0 / 3.0 * LOG2E
    series = square * series + 2.0 * LOG2E
    return n.to(tl.float32) + s * series


@triton.jit
def level_of(mean_h, mass, kl_weight, KIND: tl.constexpr):
    """Return the row's constant in `push`: ⟨p, h⟩, and what the paper's half adds.

    Where the divergence is infinite it has no gradient: NaN.
    """
    level = tl.where(tl.abs(mean_h) == float("inf"), float("nan"), mean_h)
    if KIND == SYMMETRIC:
        level -= mass * LOG2E
    return tl.where(kl_weight == 0.0, 0.0, level)


@triton.jit
def push(p, h, level, mix, kl_weight, KIND: tl.constexpr):
    """Return the gradient of the divergence, in units of log2: times T ln2 and the row's factor."""
    g = p * (h - level)
    if KIND == SYMMETRIC:
        g -= mix * LOG2E
    return tl.where(kl_weight == 0.0, 0.0, g)  # not even an infinite divergence counts


@triton.jit
def share_of(count, mass, PEER_WEIGHT: tl.constexpr, MEAN: tl.constexpr, KIND: tl.constexpr):
    """Return the factor of the row's divergence for ``count`` usable distributions."""
    if KIND == JSD:
        share = mass  # p̄ is divided by it
        if not PEER_WEIGHT and MEAN:
            share = tl.where(mass > 0.0, 1.0, 0.0)
    elif PEER_WEIGHT:
        share = tl.where(count > 0.0, 1.0, 1.0)
    else:
        share = peer_share(count, MEAN)
    if KIND == SYMMETRIC:
        share = share * 0.5
    return share


@triton.jit
def row_divergence(
    kl,  # in units of log2, before the clamp
    usable,
    valid,
    share,
    of_row,
    temperature,
    LABELLED: tl.constexpr,
    PEER_WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
):
    """Return a student's divergence of a row in nats, with all its factors but `kl_weight`."""
    if KIND == JSD or not PEER_WEIGHT:
        kl = tl.maximum(kl, 0.0)  # never negative, except by rounding
    kl = kl * (LN2 * temperature * temperature) * share * of_row
    kl = tl.where(usable, kl, float("nan"))
    if LABELLED:
        kl = tl.where(valid, kl, 0.0)
    return kl


@triton.jit
def student_gradient(
    u,
    p,
    h,
    mix,
    log_d_1,  # log2 d at T = 1; not read if T is 1
    mean_h,  # ⟨p, h⟩
    mass,
    share,
    usable,
    dense,
    here,  # whether the column is the label's
    valid,
    sparse,
    mass_of_target,
    of_label,
    of_peers,
    kl_weight,
    scale,  # of this student
    TEMPERED: tl.constexpr,
    DENSE: tl.constexpr,
    SPARSE: tl.constexpr,
    LABELLED: tl.constexpr,
    KIND: tl.constexpr,
):
    """Return a student's gradient: of the cross-entropy, and of the divergence."""
    of_label_k = of_label * scale
    q = p
    if TEMPERED:
        q = tl.exp2(u * LOG2E - log_d_1)
    g = gradient_tile(
        q, q, dense, dense, here, 0.0,
        tl.where(usable, mass_of_target * of_label_k, float("nan")), 0.0,
        tl.where(valid, of_label_k, 0.0), sparse * of_label_k,
        False, False, DENSE, SPARSE,
    )  # fmt: skip
    level = level_of(mean_h, mass, kl_weight, KIND)
    pushed = push(p, h, level, mix, kl_weight, KIND)
    g += pushed * (share * of_peers * (kl_weight * scale))
    if LABELLED:
        g = tl.where(valid, g, 0.0)  # even where the logits are NaN
    return g
