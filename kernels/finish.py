"""Sums over all rows, in the same launch as the rows: the last program to finish adds up.

Up to 256 programs are added up at once: that takes one atomic operation. More have two levels, the
programs of a group and then the groups. Each is in a fixed order, so every run gives the same bits,
in whatever order programs finish, and losses have the same bits with and without statistics. There
are no float atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(64)  # programs per group
FEW = 256  # programs that are added up at once


@triton.jit
def steps(Q: tl.constexpr, AT_ONCE: tl.constexpr):
    """Return the steps in ``partials``: from a program to the next, and from a quantity to it."""
    programs = tl.num_programs(0).to(tl.int64)
    if AT_ONCE:
        by_program = tl.full((), Q, tl.int64)
        by_quantity = tl.full((), 1, tl.int64)
    else:
        by_program = tl.full((), 1, tl.int64)
        by_quantity = programs
    return by_program, by_quantity


@triton.jit
def add_up(source, stride, count, Q: tl.constexpr, target, target_stride, at):
    """Store target[q, at] = Σ_i source[q, i] for the Q quantities, 16 at a time."""
    first = 0
    while first < Q:
        q = first + tl.arange(0, 16)
        total = tl.zeros((16,), tl.float32)
        start = 0
        while start < count:
            i = start + tl.arange(0, GROUP)
            inside = (q[:, None] < Q) & (i[None, :] < count)
            # From the L2 cache, which has the other programs' values.
            total += tl.sum(
                tl.load(
                    source + q[:, None].to(tl.int64) * stride + i[None, :],
                    mask=inside,
                    other=0.0,
                    cache_modifier=".cg",
                ),
                axis=1,
            )
            start += GROUP
        tl.store(target + q.to(tl.int64) * target_stride + at, total, mask=q < Q)
        first += 16


@triton.jit
def finish(
    partials,  # (P, Q) fp32 if at once, else (Q, P); this program's written
    groups,  # (Q, P / 64) fp32
    totals,  # (Q,) fp32
    counters,  # (1 + P / 64,) int32, zero before and after
    losses,  # (K,) fp32
    stats,  # (2, K) fp32: cross-entropy, divergence
    correct,  # (K,) int64
    finite,  # (K,) uint8
    more,  # (K + 1 + K K,) fp32: entropies, mutual information, pairwise KL
    kl_weight,
    per_label,
    per_kl,
    per_row,
    K: tl.constexpr,
    Q: tl.constexpr,
    MEAN: tl.constexpr,
    BY_ROW: tl.constexpr,
    STATS: tl.constexpr,
    AT_ONCE: tl.constexpr,  # at most FEW programs
):
    """Write the losses and statistics if this program is the last.

    ``per_label``, ``per_kl`` and ``per_row`` are 1 / the denominators: of the cross-entropy, of
    the divergence, and of what every row has. The Q quantities are the cross-entropy, divergence,
    correct and unusable rows of each student, and with all statistics also the fields of ``more``.
    """
    programs = tl.num_programs(0)
    # After the barrier, the release of the thread that counts covers the stores of all threads.
    tl.debug_barrier()
    if AT_ONCE:
        if tl.atomic_add(counters, 1, sem="acq_rel", scope="gpu") == programs - 1:
            tl.store(counters, 0)
            k, ce, kl, right, unusable = _add_few(partials, programs, K, Q, STATS)
            _publish(
                k, ce, kl, right, unusable,
                losses, stats, correct, finite,
                kl_weight, per_label, per_kl,
                K, MEAN, BY_ROW, STATS,
            )  # fmt: skip
            if STATS > 1:
                _add_more(partials, programs, more, per_row, K, Q)
    else:
        group = tl.program_id(0) // GROUP
        n_groups = tl.cdiv(programs, GROUP)
        size = tl.minimum(GROUP, programs - group * GROUP)
        if tl.atomic_add(counters + 1 + group, 1, sem="acq_rel", scope="gpu") == size - 1:
            tl.store(counters + 1 + group, 0)
            add_up(partials + group * GROUP, programs, size, Q, groups, n_groups, group)
            tl.debug_barrier()
            if tl.atomic_add(counters, 1, sem="acq_rel", scope="gpu") == n_groups - 1:
                tl.store(counters, 0)
                add_up(groups, n_groups, n_groups, Q, totals, 1, 0)
                tl.debug_barrier()
                k = tl.arange(0, 8)
                each = k < K
                ce = tl.load(totals + k, mask=each, other=0.0)
                kl = tl.load(totals + K + k, mask=each, other=0.0)
                right = ce
                unusable = ce
                if STATS > 0:
                    right = tl.load(totals + 2 * K + k, mask=each, other=0.0)
                    unusable = tl.load(totals + 3 * K + k, mask=each, other=0.0)
                _publish(
                    k, ce, kl, right, unusable,
                    losses, stats, correct, finite,
                    kl_weight, per_label, per_kl,
                    K, MEAN, BY_ROW, STATS,
                )  # fmt: skip
                if STATS > 1:
                    i = tl.arange(0, 128)
                    mean = tl.load(totals + 4 * K + i, mask=i < Q - 4 * K, other=0.0) * per_row
                    tl.store(more + i, mean, mask=i < Q - 4 * K)


@triton.jit
def _add_few(partials, programs, K: tl.constexpr, Q: tl.constexpr, STATS: tl.constexpr):
    """Return k and, (W,) each, the sums of the students' quantities over the programs."""
    W: tl.constexpr = 1 if K == 1 else (2 if K == 2 else (4 if K <= 4 else 8))
    P: tl.constexpr = 128 if W <= 4 else 64  # no more registers than the rows took
    k = tl.arange(0, W)
    ce = tl.zeros((W,), tl.float32)
    kl = tl.zeros((W,), tl.float32)
    right = tl.zeros((W,), tl.float32)
    unusable = tl.zeros((W,), tl.float32)
    start = 0
    while start < programs:
        p = start + tl.arange(0, P)[:, None]
        at = partials + p * Q + k[None, :]
        inside = (p < programs) & (k[None, :] < K)
        # From the L2 cache, which has the other programs' values.
        a = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
        b = tl.load(at + K, mask=inside, other=0.0, cache_modifier=".cg")
        if STATS > 0:
            c = tl.load(at + 2 * K, mask=inside, other=0.0, cache_modifier=".cg")
            d = tl.load(at + 3 * K, mask=inside, other=0.0, cache_modifier=".cg")
            a, b, c, d = tl.reduce((a, b, c, d), 0, _four_sums)
            right += c
            unusable += d
        else:
            a, b = tl.reduce((a, b), 0, _two_sums)
        ce += a
        kl += b
        start += P
    return k, ce, kl, right, unusable


@triton.jit
def _add_more(partials, programs, more, per_row, K: tl.constexpr, Q: tl.constexpr):
    """Store the means of what only all statistics have, 16 quantities at a time."""
    first = 4 * K
    while first < Q:
        q = first + tl.arange(0, 16)
        total = tl.zeros((16,), tl.float32)
        start = 0
        while start < programs:
            p = start + tl.arange(0, GROUP)
            inside = (p[:, None] < programs) & (q[None, :] < Q)
            at = partials + p[:, None] * Q + q[None, :]
            # From the L2 cache, which has the other programs' values.
            total += tl.sum(tl.load(at, mask=inside, other=0.0, cache_modifier=".cg"), axis=0)
            start += GROUP
        tl.store(more + q - 4 * K, total * per_row, mask=q < Q)
        first += 16


@triton.jit
def _two_sums(a, b, c, d):
    return a + c, b + d


@triton.jit
def _four_sums(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _publish(
    k,
    ce,
    kl,
    right,
    unusable,
    losses,
    stats,
    correct,
    finite,
    kl_weight,
    per_label,
    per_kl,
    K: tl.constexpr,
    MEAN: tl.constexpr,
    BY_ROW: tl.constexpr,
    STATS: tl.constexpr,
):
    """Write the losses and the cheap statistics of students ``k`` from sums over all rows."""
    each = k < K
    if BY_ROW == 0:
        if MEAN:
            total = add_divergence(ce * per_label, kl * per_kl, kl_weight)
        else:
            total = add_divergence(ce, kl, kl_weight)
        tl.store(losses + k, total, mask=each)
    if STATS > 0:
        tl.store(stats + k, ce * per_label, mask=each)
        tl.store(stats + K + k, kl * per_kl, mask=each)
        tl.store(correct + k, right.to(tl.int64), mask=each)
        tl.store(finite + k, tl.where(unusable == 0.0, 1, 0).to(tl.uint8), mask=each)


@triton.jit
def add_divergence(ce, kl, kl_weight):
    """Return the loss; with a weight of 0 not even an infinite divergence counts."""
    return tl.where(kl_weight == 0.0, ce, ce + kl_weight * kl)
