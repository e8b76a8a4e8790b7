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
from dml_fast.ranking.distances import rank_rows
from dml_fast.ranking.sets import information_distances

REDUCTIONS = ["min", "mean", "log_sum_exp", "centroid", "mutual_information"]


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


def information(data: dict[str, Any], mine: Any, metric: str, temperature: float) -> Any:
    """The definition: (gallery sets,) i(Q; S) of one query set, -inf where nothing is left."""
    names = np.unique(data["g_sets"])
    total = {t: 0.0 for t in names}
    seen = set()
    for i in mine:
        density = {}
        for t in names:
            kernels = [
                np.exp(-distance(data["q"][i], data["g"][j], metric) / temperature)
                for j in np.flatnonzero(data["g_sets"] == t)
                if data["g_pids"][j] >= 0
                and (
                    data["q_pids"][i] != data["g_pids"][j] or data["q_cams"][i] != data["g_cams"][j]
                )
            ]
            if kernels:
                density[t] = sum(kernels) / len(kernels)
        seen |= set(density)
        for t, p in density.items():
            total[t] += np.log(p) - np.log(sum(density.values()) / len(density))
    return np.array([total[t] if t in seen else -np.inf for t in names])


def by_loops(data: dict[str, Any], how: str, metric: str, temperature: float = 0.1) -> Any:
    """(query sets, gallery sets) distances; inf where the camera rule leaves nothing."""
    rows = []
    if how == "mutual_information":
        sets = [np.flatnonzero(data["q_sets"] == s) for s in np.unique(data["q_sets"])]
        return np.array([-information(data, mine, metric, temperature) for mine in sets])
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


@pytest.mark.parametrize("protocol", ["market1501", "all"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_mutual_information_is_its_definition(
    metric: str, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged sets, junk, distractors (sets of one) and sets that one camera saw."""
    seen: list[Any] = []

    def spy(rows: Any, *arguments: Any) -> Any:
        seen.append(rows.copy())
        return rank_rows(rows, *arguments)

    monkeypatch.setattr("dml_fast.ranking.sets.rank_rows", spy)
    whole = 0
    for seed in range(6):
        data = sets(seed)
        seen.clear()
        rank_sets(
            *arguments(data), q_sets=data["q_sets"], g_sets=data["g_sets"], metric=metric,
            reduction="mutual_information", temperature=0.3, protocol=protocol, junk_pid=-1,
        )  # fmt: skip
        if protocol == "all":
            data["g_cams"] = data["g_cams"] + 2
        found = -np.concatenate(seen) / 0.3
        for s, row in enumerate(found):
            mine = np.flatnonzero(data["q_sets"] == s)
            expected = information(data, mine, metric, 0.3)
            assert np.array_equal(np.isfinite(row), np.isfinite(expected))
            if len(mine) > 1:  # the order of one image needs no prior
                kept = np.isfinite(row)
                np.testing.assert_allclose(row[kept], expected[kept], rtol=0, atol=1e-10)
                assert (row[kept] <= len(mine) * np.log(kept.sum()) + 1e-12).all()
                whole += 1
    assert whole > 20


def test_mutual_information_does_not_underflow() -> None:
    """Against numbers of a wider range; exp(-1 / 0.0005) is 0 in float64."""
    rows = np.random.default_rng(0).uniform(0.5, 1.5, (4, 6))
    rows[1, 2] = rows[3, 2] = rows[0, 5] = np.nan  # pairs that are not there
    rows[:, 4] = np.nan
    t = np.longdouble(0.0005)
    weights = np.exp(-rows.astype(np.longdouble) / t)
    assert (weights[~np.isnan(rows)] > 0).all() and (np.exp(-rows / 0.0005) == 0).any()
    i = np.log(weights) - np.log(np.nanmean(weights, axis=1, keepdims=True))
    expected = np.where(np.isnan(rows).all(0), np.nan, np.nansum(i, axis=0))
    found = information_distances(rows, 0.0005)
    np.testing.assert_allclose(-found / 0.0005, expected.astype(float), rtol=1e-12)
    coldest = information_distances(rows, 5e-324)  # as cold as can be: the nearest set counts
    best = np.nanmin(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(coldest, np.where(np.isnan(rows).all(0), np.nan,
                               np.nansum(rows - best, axis=0)))  # fmt: skip


@pytest.mark.parametrize("temperature", [0.002, 0.1])
def test_single_images_are_ordered_by_mutual_information_as_by_log_sum_exp(
    temperature: float,
) -> None:
    data = sets(5, size=60)
    common = {"g_sets": data["g_sets"], "temperature": temperature, "topk": 12}
    same_bits(
        rank_sets(*arguments(data), reduction="mutual_information", **common),
        rank_sets(*arguments(data), reduction="log_sum_exp", **common),
    )
    close = rank_sets(
        [[0.0]], [[2e-18], [1e-18], [0.9]], [1], [2, 1, 3], reduction="mutual_information",
        metric="euclidean", temperature=temperature, protocol="all", topk=3,
    )  # fmt: skip
    assert close.topk.tolist() == [[1, 0, 2]]


def test_no_query_image_decides_alone_by_mutual_information() -> None:
    """One image is at the wrong set exactly, two are nearer to the right one."""
    angle = np.array([0.0, 0.8, 0.9, 1.0, 0.95])
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    gallery, query = x[[0, 4]], x[[0, 2, 3]]
    labels = ([1, 1, 1], [2, 1], [0, 0, 0], [1, 1])
    common = {"q_sets": [0, 0, 0], "temperature": 0.3}
    wrong = rank_sets(query, gallery, *labels, reduction="min", **common)
    assert wrong.first_rank.tolist() == [2]
    right = rank_sets(query, gallery, *labels, reduction="mutual_information", **common)
    assert right.first_rank.tolist() == [1]


def test_an_image_that_is_infinitely_far_says_nothing() -> None:
    far = np.array([[np.inf, np.inf], [0.2, 0.5]])
    assert np.isinf(information_distances(far, 0.1)).all()
    assert information_distances(np.array([[0.1, np.inf], [0.2, 0.5]]), 0.1)[1] == np.inf


def test_a_gallery_of_one_set_says_nothing_and_is_told_once() -> None:
    x = np.eye(4)
    labels = ([1, 1, 2], [1, 1, -1, -1], [0, 0, 0], [1, 2, 1, 1])
    with pytest.warns(UserWarning, match="the gallery is one set, about which no query") as told:
        result = rank_sets(
            x[:3], x, *labels, q_sets=[0, 0, 1], g_sets=[7, 7, 8, 9], junk_pid=-1,
            reduction="mutual_information",
        )  # fmt: skip
    assert len(told) == 1 and result.n_valid == 1
    assert information_distances(np.array([[0.1], [0.7]]), 0.05).tolist() == [0.0]


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
        (
            {"reduction": "max"},
            "reduction is 'max', which is none of min, mean, .*, mutual_information",
        ),
        ({"reduction": "mutual_information", "temperature": -1.0}, r"temperature is -1\.0: give"),
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
