"""Random evaluations for the tests of ranking, and the oracle's answer to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from hypothesis import strategies as st

from dml_fast.ranking.oracle import Array, rank_query, valid_items
from dml_fast.ranking.result import RankingResult

TIES = ("stable", "expected", "optimistic", "pessimistic")
LEVELS = ("baseline", "avx2", "avx512")


@dataclass
class Case:
    """Labels of Q queries and G gallery items; -1 is junk."""

    q_pids: Array
    g_pids: Array
    q_cams: Array
    g_cams: Array

    def labels(self) -> tuple[Array, Array, Array, Array]:
        return self.q_pids, self.g_pids, self.q_cams, self.g_cams


@st.composite
def cases(draw: Any, max_items: int = 9, max_queries: int = 4) -> tuple[Case, np.random.Generator]:
    """At least one query has a valid match, whatever the camera rule."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    queries, items = draw(st.integers(1, max_queries)), draw(st.integers(1, max_items))
    people = draw(st.integers(1, 4))
    case = Case(
        rng.integers(0, people, queries),
        rng.integers(-1, people, items),
        rng.integers(0, 2, queries),
        rng.integers(0, 2, items),
    )
    lucky = rng.integers(items)
    case.g_pids[lucky], case.g_cams[lucky] = case.q_pids[0], 1 - case.q_cams[0]
    return case, rng


@lru_cache(maxsize=64)
def _answer(
    d: bytes,
    dtype: str,
    match: bytes,
    ids: bytes,
    id_dtype: str,
    ties: str,
    ranks: int,
    single: bool,
) -> dict[str, Any]:
    """The oracle's, which takes long, kept for the next instruction set."""
    return rank_query(
        np.frombuffer(d, dtype),
        np.frombuffer(match, bool),
        np.frombuffer(ids, id_dtype),
        ties=ties,
        max_rank=ranks,
        single_shot=single,
    )


def check(
    result: RankingResult, dist: Array, case: Case, *, protocol: str = "market1501", **rules: Any
) -> None:
    """A result against the oracle, every field of it."""
    ties, max_rank = rules.get("ties", "stable"), len(result.cmc)
    junk_pid, camera_rule = rules.get("junk_pid", -1), rules.get("camera_rule", True)
    scores: list[dict[str, Any]] = []
    for q, row in enumerate(dist):
        keep = valid_items(
            case.g_pids,
            case.g_cams,
            case.q_pids[q],
            case.q_cams[q],
            junk_pid=junk_pid,
            camera_rule=camera_rule and protocol != "all",
        )
        match = case.g_pids[keep] == case.q_pids[q]
        nearest = np.flatnonzero(keep)[np.argsort(row[keep], kind="stable")]
        if k := result.topk.shape[1]:
            wanted = np.concatenate([nearest, np.full(k, -1)])[:k]
            np.testing.assert_array_equal(result.topk[q], wanted)
        if not match.any():
            expected = 0.0 if rules.get("count_invalid") else np.nan
            np.testing.assert_equal(result.ap[q], expected)
            assert np.isnan(result.first_rank[q])
            continue
        identities = case.g_pids[keep]
        score = _answer(
            row[keep].tobytes(), row.dtype.str, match.tobytes(), identities.tobytes(),
            identities.dtype.str, ties, max_rank, protocol == "cuhk03",
        )  # fmt: skip
        scores.append(score)
        for field in ("ap", "ap_trapezoid", "inp", "first_rank"):
            assert abs(getattr(result, field)[q] - score[field]) < 1e-11, field
    assert result.n_valid == len(scores) and result.n_queries == len(dist)
    assert result.n_tied == sum(score["tied"] for score in scores)
    counted = len(dist) if rules.get("count_invalid") else len(scores)
    means = {k: sum(s[k] for s in scores) / counted for k in scores[0]}
    for mine, theirs in {
        "mAP": "ap",
        "mAP_trapezoid": "ap_trapezoid",
        "mINP": "inp",
        "r_precision": "r_precision",
        "map_at_r": "map_at_r",
        "mrr": "mrr",
    }.items():
        assert abs(getattr(result, mine) - means[theirs]) < 1e-11, mine
    np.testing.assert_allclose(result.cmc, np.cumsum(means["first_at"]), rtol=0, atol=1e-11)
    precision = np.cumsum(means["hits_at"]) / np.arange(1, max_rank + 1)
    np.testing.assert_allclose(result.precision, precision, rtol=0, atol=1e-11)


def same_bits(a: RankingResult, b: RankingResult) -> None:
    """Two results agree in every bit of every field."""
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, np.ndarray):
            assert value.tobytes() == other.tobytes(), name
        else:
            assert value == other, name
