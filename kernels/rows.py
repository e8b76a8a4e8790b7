"""What the kernels of the mutual loss share: labels, row constants, one student's gradient.

Everything is in base 2, since exp2 is one instruction and exp five. With z the logits of a row, m
their maximum and T the temperature,

    log2 p = (z - m) log2(e) / T - log2 d,    d = Σ 2^((z - m) log2(e) / T)

The maximum is subtracted before the scaling; in the other order a common offset of 1e4 causes an
error of 3.6e-4. Divergences use log2 (d / C), not log2 d: where students agree, all log2 d are
close to log2 C, and the rounding errors of that would be most of their differences, times T².

A row is usable if d > 0: a row with NaN or +inf, or with only -inf, has d = NaN or 0. The maximum
cannot show this: in hardware it ignores NaN. Values for each row are (R, 1) or scalars, tiles are
(R, BLOCK).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(-1e30)  # stands for -inf where 0 times it must be 0


@triton.jit
def label_share(
    index,  # (N,) integers
    class_weight,  # (C,) fp32
    label_count,  # () the number of labelled rows, or the sum of their weights
    given,  # its reciprocal, if the host knows it
    ignore_index,
    N,
    C: tl.constexpr,
    LABELS: tl.constexpr,  # 0: given, 1: read label_count, 2: count here
    IGNORE: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr,
):
    """Return 1 / (the sum of the labelled rows' weights), or 0 if no row has a label."""
    if LABELS == 0:
        share = given
    else:
        if LABELS == 1:
            count = tl.load(label_count).to(tl.float32)
        else:
            # Each program reads all labels, some KB from the cache: that saves a launch.
            total = tl.zeros((128,), tl.float32)
            start = 0
            while start < N:
                row = start + tl.arange(0, 128)
                _, _, own = read_labels(
                    index, class_weight, ignore_index, row, row < N, C, IGNORE, CLASS_WEIGHT
                )
                total += tl.where(own == own, own, 1.0)
                start += 128
            count = tl.sum(total, axis=0)
        share = tl.where(count == 0.0, 0.0, 1.0 / count)
    return share


@triton.jit
def row_share(
    index,
    row_count,  # () the number of rows with a divergence
    given,  # its reciprocal, if the host knows it
    per_label,
    ignore_index,
    N,
    C: tl.constexpr,
    ROWS: tl.constexpr,  # 0: given, 1: read row_count, 2: count labels here, 3: as per_label
):
    """Return 1 / (the number of rows that have a divergence), or 0 if none has."""
    if ROWS == 3:
        share = per_label
    else:
        share = label_share(index, index, row_count, given, ignore_index, N, C, ROWS, True, False)
    return share


@triton.jit
def row_factors(
    index,
    class_weight,
    label_count,
    row_count,
    given_labels,
    per_row,
    ignore_index,
    of_row,  # the row's weight
    scale,  # of the divergence's gradient
    N,
    C: tl.constexpr,
    LABELS: tl.constexpr,
    IGNORE: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    MEAN: tl.constexpr,
    WANTED: tl.constexpr,  # whether the first two are needed without MEAN too
):
    """Return `label_share`, `row_share`, and the factors of both terms' gradients."""
    per_label = given_labels
    per_kl = per_row
    if MEAN or WANTED:
        per_label = label_share(
            index, class_weight, label_count, given_labels, ignore_index, N, C, LABELS, IGNORE,
            CLASS_WEIGHT,
        )  # fmt: skip
        if ROWS != 0:
            per_kl = row_share(index, row_count, per_row, per_label, ignore_index, N, C, ROWS)
    of_label = of_row
    of_peers = of_row * scale
    if MEAN:
        of_label = of_row * per_label
        of_peers = of_row * (scale * per_kl)
    return per_label, per_kl, of_label, of_peers


@triton.jit
def read_labels(
    index,
    class_weight,
    ignore_index,
    row,
    ok,
    C: tl.constexpr,
    IGNORE: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr,
):
    """Return the class (0 without a label), whether the row has a label, and its weight.

    A class out of range has the weight NaN, which makes the loss of its row NaN: raising an error
    would mean to wait for the device.
    """
    given = tl.load(index + row, mask=ok, other=0).to(tl.int64)
    valid = ok
    if IGNORE:
        valid = ok & (given != ignore_index)
    wrong = valid & ((given < 0) | (given >= C))
    y = tl.where(valid & (wrong == 0), given, 0).to(tl.int32)
    own = tl.where(valid, 1.0, 0.0)
    if CLASS_WEIGHT:
        own = own * tl.load(class_weight + y)
    return y, valid, tl.where(wrong, float("nan"), own)


@triton.jit
def columns(THREADS: tl.constexpr, EACH: tl.constexpr, SPREAD: tl.constexpr):
    """Return the columns of a step, (THREADS, EACH): a thread's are a row of it.

    They are adjacent, so that a thread reads several at once. Where rows are of odd length it
    cannot, and neighbours take adjacent columns: Triton has them so in any case, and would add up
    a row of this over the lanes of a warp.
    """
    if SPREAD:
        lane = tl.arange(0, EACH)[None, :] * THREADS + tl.arange(0, THREADS)[:, None]
    else:
        lane = tl.arange(0, THREADS)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    return lane


@triton.jit
def dense_target(
    soft,  # (N, C) fp32 probabilities
    class_weight,
    far,  # int64 row numbers
    col,
    inside,
    smoothing,
    C: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr,
    SOFT_ROW: tl.constexpr,
    SOFT_COL: tl.constexpr,
):
    """Return the dense part of the cross-entropy's target: raw, and smoothed and weighted."""
    if SOFT:
        raw = tl.load(soft + far * SOFT_ROW + col * SOFT_COL, mask=inside, other=0.0)
        dense = raw
        if SMOOTH:
            dense = raw * (1.0 - smoothing) + smoothing / C
    else:
        raw = tl.where(inside, smoothing / C, 0.0)
        dense = raw
    if CLASS_WEIGHT:
        dense = dense * tl.load(class_weight + col, mask=col < C, other=0.0)
    return raw, tl.where(inside, dense, 0.0)


@triton.jit
def log_softmax(t, log_d, rate, TEMPERED: tl.constexpr):
    """Return log2 p from what one_pass keeps: z - max, scaled already if T = 1."""
    if TEMPERED:
        log_p = t * rate - log_d
    else:
        log_p = t - log_d
    return log_p


@triton.jit
def peer_share(count, MEAN: tl.constexpr):
    """Return the uniform weight of a peer if ``count`` distributions are usable."""
    if MEAN:
        share = tl.where(count < 2.0, 0.0, 1.0 / tl.maximum(count - 1.0, 1.0))
    else:
        share = tl.where(count < 2.0, 0.0, 1.0)
    return share


@triton.jit
def read_scalar(value, ON_DEVICE: tl.constexpr):
    """Return a number that is passed by value or by pointer."""
    if ON_DEVICE:
        x = tl.load(value).to(tl.float32)
    else:
        x = value
    return x


@triton.jit
def gradient_tile(
    p,  # softmax at temperature T
    q,  # and at temperature 1
    mix,  # Σ_l w_kl p_l, or Σ_l p_l
    dense,
    here,  # whether the column is the label's
    push_p,
    push_q,
    pull,
    dense_pull,
    sparse_pull,
    MUTUAL: tl.constexpr,
    TEMPERED: tl.constexpr,
    DENSE: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """Return one student's gradient from row constants: A p - B mix - D dense - [y] c."""
    if TEMPERED:
        g = q * push_q
        if MUTUAL:
            g += p * push_p
    else:
        g = p * (push_q + push_p)
    if MUTUAL:
        g -= mix * pull
    if DENSE:
        g -= dense * dense_pull
    if SPARSE:
        g -= tl.where(here, sparse_pull, 0.0)
    return g
