"""How much a label of each row would tell, and which rows to take: numpy alone, in float64."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from dml_fast.data.philox import Draws
from dml_fast.errors import UserError, brief, check_choice, check_number, check_whole
from dml_fast.ranking.inputs import ArrayLike, as_numpy

Floats: TypeAlias = NDArray[np.float64]
Ids: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]
Score = Literal["mutual_information", "entropy", "margin", "random"]
How = Literal["power", "topk"]
SCORES: tuple[str, ...] = get_args(Score)
HOWS: tuple[str, ...] = get_args(How)

_AT_ONCE = 2**20  # numbers of float64, so that a pool of any size needs little memory beside it
_SMALLEST = 2.0**-1074  # the smallest positive double


class Scores(NamedTuple):
    """What a label would tell, for each of N rows: natural units, larger is sooner, never negative.

    A row for which no student has usable logits has NaN in all of them.

    Attributes:
        mutual_information: (N,) H(p) - mean_k H(p_k) in nats, with p = mean_k p_k: how much the
            students disagree (BALD; Houlsby et al. 2011, arXiv 1112.5745).
        entropy: (N,) H(p) in nats: information about the label, noise included.
        margin: (N,) 1 minus the difference of the two largest classes of p.
    """

    mutual_information: Floats
    entropy: Floats
    margin: Floats


def pool_scores(logits: ArrayLike) -> Scores:
    """Score the rows of a pool by what a cohort's students say about them.

    Distributions are softmax(z) at temperature 1. A student whose logits for a row are unusable
    (NaN or +inf, or all -inf) is left out of that row, as in the loss. The mutual information is
    the mean over students of KL(p_k || p), of which each term is computed in a form that is never
    negative: it is exactly 0 for equal students, and small values keep their digits.

    Args:
        logits: (K, N, C) numbers, an array or a tensor: K students, N rows, C >= 2 classes.

    Raises:
        UserError: another shape, or not numbers.
    """
    z = as_numpy(logits, "logits")
    if z.ndim != 3 or z.shape[0] < 1 or z.shape[2] < 2:
        raise UserError(
            f"logits have shape {z.shape}: pass (students, rows, classes) with at least one "
            "student and two classes"
        )
    if z.dtype.kind not in "fiu":
        raise UserError(f"logits have type {z.dtype}: pass real numbers")
    students, rows, classes = z.shape
    step = max(1, _AT_ONCE // (students * classes))
    parts = [judged(z[:, first : first + step])[0] for first in range(0, rows, step)]
    empty = Scores(*[np.empty(0)] * 3)
    return Scores(*map(np.concatenate, zip(empty, *parts, strict=True)))


def judged(logits: NDArray[Any]) -> tuple[Scores, Floats]:
    """Return the scores of rows as `pool_scores`, and what the ensemble says about them.

    Args:
        logits: (K, N, C), of which this makes a few copies in float64.

    Returns:
        The scores, and p (N, C), the mean of the usable students' probabilities; NaN where there
        is no such student.
    """
    z = logits.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        e = np.exp(z - z.max(2, keepdims=True))
        p = e / e.sum(2, keepdims=True)
    usable = ~np.isnan(p).any(2)
    count = np.maximum(usable.sum(0), 1)
    # relative to one of them, so that the mean of equals is exactly what they are
    base = p[usable.argmax(0), np.arange(p.shape[1])]
    mean = base + np.where(usable[..., None], p - base, 0.0).sum(0) / count[:, None]
    log_mean = _log(mean)
    apart = np.where(usable[..., None], _terms(p, mean, log_mean), 0.0)
    none = ~usable.any(0)
    information = np.where(none, np.nan, apart.sum((0, 2)) / count)
    entropy = np.maximum(-(mean * log_mean).sum(1), 0.0)
    first, second = np.partition(mean, (-1, -2), axis=1)[:, [-1, -2]].T
    margin = np.where(none, np.nan, 1.0 - (first - second))
    return Scores(information, entropy, margin), mean


def _terms(p: Floats, mean: Floats, log_mean: Floats) -> Floats:
    """Return terms, never negative, whose sum over the classes is KL(p || mean).

    They are p (d + exp(-d) - 1) with d = log p - log mean, as in `dml_fast.loss.disagreement`.
    """
    d = _log(p) - log_mean
    with np.errstate(over="ignore", invalid="ignore"):
        near = p * (d + np.expm1(-d))
    far = np.where(p == 0, 0.0, p * d) - p + mean
    terms: Floats = np.maximum(np.where(np.abs(d) < 0.5, near, far), 0.0)
    return terms


def _log(p: Floats) -> Floats:
    """Return log p, finite where p is 0."""
    found: Floats = np.log(np.maximum(p, np.finfo(np.float64).tiny))
    return found


def acquire(
    scores: ArrayLike,
    q: int,
    *,
    how: How = "power",
    beta: float = 1.0,
    exclude: ArrayLike | None = None,
    seed: int = 0,
) -> Ids:
    """Choose the rows to label next, in the order in which to label them.

    ``topk`` takes the highest scores. ``power`` draws without replacement, with probabilities
    proportional to score ** beta among those that are left: the highest of beta log(score) + g
    with g ~ Gumbel(0, 1), so that a batch is not q copies of one row (Kirsch et al., TMLR 2023,
    arXiv 2106.12059). Among equals the lower index comes first. A score of 0 counts as the smallest
    positive double: a pool of zeros is drawn uniformly. Rows with NaN come last, in their order.

    The random number of a row depends on its index and the seed alone.

    Args:
        scores: (N,) numbers, as of `pool_scores`; for ``power`` finite and at least 0, or NaN.
        q: how many rows.
        how: topk or power.
        beta: 0 or more; 0 draws uniformly.
        exclude: the indices (M,) of rows not to choose, or (N,) bool, true for these.
        seed: for ``power``.

    Returns:
        (q,) int64.

    Raises:
        UserError: q is more than there are rows to choose from, or an argument is wrong.
    """
    check_choice("how", how, HOWS)
    check_whole("q", q, 0)
    check_whole("seed", seed, 0)
    check_number("beta", beta, "a finite number, 0 or more", lambda x: 0 <= x < np.inf)
    found = as_numpy(scores, "scores")
    if found.ndim != 1 or found.dtype.kind not in "fiu":
        raise UserError(f"scores are {brief(found)} of {found.dtype}: pass (N,) real numbers")
    values = found.astype(np.float64)
    left = np.flatnonzero(~_excluded(exclude, len(values)))
    if q > len(left):
        raise UserError(
            f"q is {q} and there are {len(left)} rows to choose from: give at most that"
        )
    keys = _power_keys(values, float(beta), seed) if how == "power" else values
    mine = keys[left]
    mine[np.isnan(mine)] = -np.inf
    last = np.isnan(values[left])  # after scores of -inf, which topk allows
    return left[np.lexsort((left, -mine, last))[:q]]


def _power_keys(values: Floats, beta: float, seed: int) -> Floats:
    wrong = np.flatnonzero((values < 0) | np.isinf(values))
    if len(wrong):
        raise UserError(
            f"scores[{wrong[0]}] is {values[wrong[0]]}: a power is drawn from finite scores of at "
            "least 0, so give such, or how='topk'"
        )
    high, low = Draws(seed, "acquire").words(np.arange(len(values)), 0, 2).astype(np.uint64)
    uniform = ((high << np.uint64(32) | low) >> np.uint64(11)).astype(np.float64) + 0.5
    gumbel = -np.log(-np.log(uniform * 2.0**-53))
    keys: Floats = beta * np.log(np.maximum(values, _SMALLEST)) + gumbel
    return keys


def _excluded(exclude: ArrayLike | None, rows: int) -> Mask:
    mask = np.zeros(rows, dtype=bool)
    if exclude is None:
        return mask
    found = as_numpy(exclude, "exclude")
    if found.dtype == bool and found.shape == (rows,):
        return found
    if found.size == 0 and found.ndim == 1:
        return mask
    fits = found.ndim == 1 and found.dtype.kind in "iu"
    if not fits or int(found.min()) < 0 or int(found.max()) >= rows:
        raise UserError(
            f"exclude is {brief(exclude)}: pass indices of the {rows} rows, or ({rows},) bool"
        )
    mask[found] = True
    return mask
