"""Sums over all rows, in the same launch as the rows: the last program to finish adds up.

The sums have two levels, the programs of a group and then the groups, each in a fixed order. So
every run gives the same bits, in whatever order programs finish. There are no float atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(64)  # programs per group


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
    partials,  # (Q, P) fp32, this program's column written
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
    per_row,
    K: tl.constexpr,
    Q: tl.constexpr,
    MEAN: tl.constexpr,
    BY_ROW: tl.constexpr,
    STATS: tl.constexpr,
):
    """Write the losses and statistics if this program is the last.

    The Q quantities are the cross-entropy, divergence, correct and unusable rows of each student,
    and with all statistics also the fields of ``more``.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    group = pid // GROUP
    n_groups = tl.cdiv(programs, GROUP)
    size = tl.minimum(GROUP, programs - group * GROUP)
    # After the barrier, the release of the thread that counts covers the stores of all threads.
    tl.debug_barrier()
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
            if BY_ROW == 0:
                if MEAN:
                    total = add_divergence(ce * per_label, kl * per_row, kl_weight)
                else:
                    total = add_divergence(ce, kl, kl_weight)
                tl.store(losses + k, total, mask=each)
            if STATS > 0:
                tl.store(stats + k, ce * per_label, mask=each)
                tl.store(stats + K + k, kl * per_row, mask=each)
                right = tl.load(totals + 2 * K + k, mask=each, other=0.0)
                tl.store(correct + k, right.to(tl.int64), mask=each)
                unusable = tl.load(totals + 3 * K + k, mask=each, other=0.0)
                tl.store(finite + k, tl.where(unusable == 0.0, 1, 0).to(tl.uint8), mask=each)
            if STATS > 1:
                i = tl.arange(0, 128)
                mean = tl.load(totals + 4 * K + i, mask=i < Q - 4 * K, other=0.0) * per_row
                tl.store(more + i, mean, mask=i < Q - 4 * K)


@triton.jit
def add_divergence(ce, kl, kl_weight):
    """Return the loss; with a weight of 0 not even an infinite divergence counts."""
    return tl.where(kl_weight == 0.0, ce, ce + kl_weight * kl)
