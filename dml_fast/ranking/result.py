"""The result of a ranking: scores, their means, a table and JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml_fast.ranking.inputs import Ints

# Columns of the C++ code's scores (csrc/scores.hpp).
AP, AP_TRAPEZOID, INP, FIRST_RANK, RECIPROCAL_RANK, R_PRECISION, MAP_AT_R, TIED = range(8)


@dataclass(frozen=True, eq=False)
class RankingResult:
    """Scores of Q queries; all shares are in 0..1. ``print(result)`` shows a table.

    A query without a valid match has NaN in the arrays and does not enter the means. With
    ``count_invalid`` it has 0 and enters them, and only its ``first_rank`` is NaN.

    Attributes:
        mAP: mean average precision. AP is the mean of the precision at each match, as in torchreid
            and fast-reid.
        mAP_trapezoid: the same with AP as the area by the trapezoid rule, as in Market-1501's
            official code, which the DML paper used.
        mINP: mean of P / rank of the last match (Ye et al., TPAMI 2021).
        cmc: (max_rank,) share of queries whose first match has rank 1, <= 2, ...
        precision: (max_rank,) mean precision among the first 1, 2, ... ranks.
        r_precision: mean precision among the first P ranks, P the query's number of matches.
        map_at_r: MAP@R (Musgrave et al., ECCV 2020).
        mrr: mean of 1 / rank of the first match.
        ap, ap_trapezoid, inp: (Q,) float64.
        first_rank: (Q,) float64, from 1: a mean over orders with ``ties="expected"``.
        topk: (Q, topk) gallery indices, nearest first by (distance, index), -1 beyond the last.
        n_queries: Q.
        n_valid: queries with a valid match.
        n_tied: queries whose scores depend on how ties are broken.
        ties: the rule by which they were broken.
        protocol: whose rules were followed.
    """

    mAP: float
    mAP_trapezoid: float
    mINP: float
    cmc: NDArray[np.float64] = field(repr=False)
    precision: NDArray[np.float64] = field(repr=False)
    r_precision: float
    map_at_r: float
    mrr: float
    ap: NDArray[np.float64] = field(repr=False)
    ap_trapezoid: NDArray[np.float64] = field(repr=False)
    inp: NDArray[np.float64] = field(repr=False)
    first_rank: NDArray[np.float64] = field(repr=False)
    topk: Ints = field(repr=False)
    n_queries: int
    n_valid: int
    n_tied: int
    ties: str
    protocol: str

    def __str__(self) -> str:
        ranks = [k for k in (1, 5, 10, 20) if k <= len(self.cmc)]
        shares = {"mAP": self.mAP, "mAP (trapezoid)": self.mAP_trapezoid, "mINP": self.mINP}
        shares |= {f"rank-{k}": float(self.cmc[k - 1]) for k in ranks}
        lines = [f"{name:<16} {100 * share:6.2f} %" for name, share in shares.items()]
        lines.append(f"{'queries':<16} {self.n_queries:6d}")
        if self.n_valid < self.n_queries:
            lines.append(f"{'without a match':<16} {self.n_queries - self.n_valid:6d}")
        if self.n_tied:
            lines.append(f"{'with ties':<16} {self.n_tied:6d}   (broken: {self.ties})")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, without ``topk``; None for NaN."""
        plain: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name == "topk":
                continue
            if isinstance(value, np.ndarray):
                plain[name] = [None if x != x else x for x in value.tolist()]
            else:
                plain[name] = value
        return plain

    def to_json(self) -> str:
        """Return one JSON object with the entries of ``to_dict``."""
        return json.dumps(self.to_dict())


def make_result(
    scores: NDArray[np.float64],
    first_at: NDArray[np.float64],
    hits_at: NDArray[np.float64],
    topk: Ints,
    *,
    max_rank: int,
    ties: str,
    protocol: str,
    count_invalid: bool,
) -> RankingResult:
    """Compute means and curves.

    Args:
        scores: (Q, 8), NaN in the rows of queries without a valid match.
        first_at: (chunks, ranks) queries whose first match has that rank, summed by chunk; at most
            ``max_rank`` ranks, and none beyond the gallery's end.
        hits_at: (chunks, ranks) matches at that rank.
        topk: (Q, topk).
        max_rank: length of the curves.
        ties: the rule.
        protocol: its name.
        count_invalid: whether queries without a valid match score 0.
    """
    valid = ~np.isnan(scores[:, AP])
    n_valid = int(np.count_nonzero(valid))
    counted = len(scores) if count_invalid else n_valid
    tied = int(np.nansum(scores[:, TIED]))
    first_rank = scores[:, FIRST_RANK].copy()
    if count_invalid:
        scores = np.where(valid[:, None], scores, 0.0)
    means = np.sum(scores[valid], axis=0) / counted
    first, hits = (
        np.concatenate([of_chunks.sum(0), np.zeros(max_rank - of_chunks.shape[1])])
        for of_chunks in (first_at, hits_at)
    )
    return RankingResult(
        mAP=float(means[AP]),
        mAP_trapezoid=float(means[AP_TRAPEZOID]),
        mINP=float(means[INP]),
        cmc=np.cumsum(first) / counted,
        precision=np.cumsum(hits) / np.arange(1, max_rank + 1) / counted,
        r_precision=float(means[R_PRECISION]),
        map_at_r=float(means[MAP_AT_R]),
        mrr=float(means[RECIPROCAL_RANK]),
        ap=scores[:, AP].copy(),
        ap_trapezoid=scores[:, AP_TRAPEZOID].copy(),
        inp=scores[:, INP].copy(),
        first_rank=first_rank,
        topk=topk,
        n_queries=len(scores),
        n_valid=n_valid,
        n_tied=tied,
        ties=ties,
        protocol=protocol,
    )
