"""Sets of images against loops over all pairs of images in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking_cases import same_bits

from dml_fast.errors import UserError
from dml_fast.eval import pool_queries, rank_distances, rank_features, rank_sets

REDUCTIONS = ["min", "mean", "log_sum_exp", "centroid"]


def distance(a: Any, b: Any, metric: str) -> float:
    if metric == "euclidean":
        return float(np.linalg.norm(a - b))
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(1 - a @ b / (norms or 1))


def reduced(values: list[float], how: str, temperature: float) -> float:
    if how == "min":
        return min(values)
    if how == "mean":
        return float(np.mean(values))
    return float(-temperature * np.log(np.mean(np.exp(-np.array(values) / temperature))))


def by_loops(data: dict[str, Any], how: str, metric: str, temperature: float = 0.1) -> Any:
    """(query sets, gallery sets) distances; inf where the camera rule leaves nothing."""
    rows = []
    for s in np.unique(data["q_sets"]):
        mine, row = np.flatnonzero(data["q_sets"] == s), []
        for t in np.unique(data["g_sets"]):
            theirs = np.flatnonzero(data["g_sets"] == t)
            same = data["q_pids"][mine[0]] == data["g_pids"][theirs[0]]
            if how == "centroid":
                parted = same & (data["g_cams"][theirs][:, None] == data["q_cams"][mine]).all(1)
                kept = theirs[~parted]
                ends = data["q"][mine].mean(0), data["g"][kept].mean(0) if len(kept) else None
                row.append(distance(*ends, metric) if len(kept) else np.inf)
                continue
            values = [
                distance(data["q"][i], data["g"][j], metric)
                for i in mine
                for j in theirs
                if not (same and data["q_cams"][i] == data["g_cams"][j])
            ]
            row.append(reduced(values, how, temperature) if values else np.inf)
        rows.append(row)
    return np.array(rows)


def sets(seed: int, size: int = 40) -> dict[str, Any]:
    """Sets of one identity each, seen by one camera or several."""
    rng = np.random.default_rng(seed)
    data: dict[str, Any] = {}
    for side, count, n in (("q", 6, 14), ("g", 12, size)):
        of = np.concatenate([np.arange(count), rng.integers(0, count, n - count)])
        data[f"{side}_sets"] = rng.permutation(of)
        data[f"{side}_pids"] = rng.integers(-1 if side == "g" else 0, 4, count)[
            data[f"{side}_sets"]
        ]
        data[f"{side}_cams"] = rng.integers(0, 2, n)
        data[side] = rng.standard_normal((n, 5))
    data["g_pids"][data["g_sets"] == 0] = data["q_pids"][0]  # seen by both cameras:
    data["g_cams"][np.flatnonzero(data["g_sets"] == 0)[0]] = 1 - data["q_cams"][0]
    return data


def arguments(data: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(data[k] for k in ("q", "g", "q_pids", "g_pids", "q_cams", "g_cams"))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("how", REDUCTIONS)
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32))
def test_sets_equal_loops_over_their_images(how: str, metric: str, seed: int) -> None:
    data = sets(seed)
    result = rank_sets(
        *arguments(data), q_sets=data["q_sets"], g_sets=data["g_sets"], reduction=how, metric=metric
    )
    dist = by_loops(data, how, metric)
    first = [np.unique(data[f"{s}_sets"], return_index=True)[1] for s in "qg"]
    q_pids, g_pids = data["q_pids"][first[0]], data["g_pids"][first[1]]
    expected = []
    for row, pid in zip(dist, q_pids, strict=True):
        keep = (g_pids >= 0) & np.isfinite(row)
        match = (g_pids[keep] == pid)[np.argsort(row[keep], kind="stable")]
        hits = np.flatnonzero(match) + 1
        expected.append(np.mean(np.arange(1, len(hits) + 1) / hits) if len(hits) else np.nan)
    np.testing.assert_allclose(result.ap, expected, rtol=0, atol=1e-12)


def test_sets_of_one_image_are_images() -> None:
    data = sets(1, size=60)
    alone = rank_sets(*arguments(data), reduction="min", topk=4)
    np.testing.assert_allclose(alone.ap, rank_features(*arguments(data)).ap)
    assert alone.topk.tolist() == rank_features(*arguments(data), topk=4).topk.tolist()


def test_a_cold_log_sum_exp_is_the_minimum_and_does_not_overflow() -> None:
    data = sets(2)
    data["q"] *= 1000
    common = {"q_sets": data["q_sets"], "g_sets": data["g_sets"], "metric": "euclidean"}
    cold = rank_sets(*arguments(data), reduction="log_sum_exp", temperature=1e-6, **common)
    same_bits(cold, rank_sets(*arguments(data), reduction="min", **common))


def test_pooled_queries_are_means_or_maxima_by_identity_and_camera() -> None:
    x = np.array([[1, 8], [3, 2], [5, 5], [7, 0]], np.float32)
    pooled, pids, cams = pool_queries(x, [2, 2, 1, 2], [0, 0, 0, 1])
    assert pooled.tolist() == [[5, 5], [2, 5], [7, 0]]
    assert (pids.tolist(), cams.tolist()) == ([1, 2, 2], [0, 0, 1])
    assert pool_queries(x, [2, 2, 1, 2], [0, 0, 0, 1], how="max")[0].tolist()[1] == [3, 8]
    assert rank_distances(-pooled @ pooled.T, pids, pids, cams, cams + 1).n_valid == 3


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"reduction": "max"}, "reduction is 'max', which is none of min, mean"),
        ({"temperature": 0.0}, r"temperature is 0\.0: give a number above 0"),
        ({"q_sets": [1, 2]}, r"q_sets has shape \(2,\)"),
        ({"g_sets": np.zeros(40, int)}, "gallery set 0 has images of several identities"),
    ],
)
def test_mistakes_are_told_in_one_sentence(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rank_sets(*arguments(sets(3)), **rules)
    with pytest.raises(UserError, match="how is 'sum', which is none of mean, max"):
        pool_queries(np.ones((2, 2)), [1, 1], [0, 0], how="sum")
