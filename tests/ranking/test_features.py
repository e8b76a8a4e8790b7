"""Ranking from features: exact decisions, whatever multiplies the tiles."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking_cases import LEVELS, TIES, Case, cases, same_bits

from dml_fast import _native
from dml_fast.errors import UserError
from dml_fast.eval import rank_distances, rank_features
from dml_fast.ranking.oracle import dot
from dml_fast.ranking.tiles import Tiling, query_blocks

BF16 = Tiling(bf16=True)


def exact(q: Any, g: Any, metric: str) -> Any:
    """The float64 numbers that decide, as csrc/features.hpp defines them."""
    with np.errstate(all="ignore"):
        products = dot(q[:, None], g[None])
        squares = dot(g, g)
        if metric == "cosine":
            z = -(products / np.sqrt(np.where(squares == 0, 1, squares)))
        else:
            z = 0.5 * squares - products
    return np.where(np.isnan(z), np.inf, z)


def features(rng: np.random.Generator, rows: int, dims: int, kind: str) -> Any:
    if kind == "duplicates":
        return rng.integers(-1, 2, (rows, dims)).astype(np.float32)  # zero vectors among them
    if kind == "near":  # differences that bfloat16 does not see, nor float32 products
        ulps = rng.integers(0, 3, (rows, dims)) * 2.0**-22
        return (1.0 + ulps).astype(np.float32)
    if kind == "scales":
        powers = rng.choice([-60, -40, 0, 40, 60], (rows, 1))
        return (rng.standard_normal((rows, dims)) * 2.0**powers).astype(np.float32)
    if kind == "infinite":
        choice = [np.inf, -np.inf, 0, 1, -1, 3e38]
        return rng.choice(np.array(choice, np.float32), (rows, dims), p=[0.05, 0.05, *[0.225] * 4])
    if kind == "double":
        return 1.0 + rng.integers(0, 2, (rows, dims)) * 1e-12
    if kind == "huge":
        return rng.standard_normal((rows, dims)) * 10.0 ** rng.choice([-200, 0, 120, 160])
    return rng.standard_normal((rows, dims), dtype=np.float32)


KINDS = ["duplicates", "near", "scales", "infinite", "double", "huge", "any"]
settings_of_screens = st.sampled_from(
    [
        Tiling(bf16=bf16, query_rows=rows, item_rows=columns, operand_bytes=size, positives=1)
        for bf16, (rows, columns, size) in product([True, False], [(1, 2, 64), (3, 5, 1 << 20)])
    ]
)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(
    cases(max_items=14, max_queries=40),
    st.sampled_from(["cosine", "euclidean"]),
    st.sampled_from(TIES),
    st.sampled_from([1, 3, 33, 70]),
    settings_of_screens,
)
def test_every_decision_is_that_of_the_exact_distances(
    kind: str,
    case_rng: tuple[Case, np.random.Generator],
    metric: str,
    ties: str,
    dims: int,
    tiling: Tiling,
) -> None:
    case, rng = case_rng
    q = features(rng, len(case.q_pids), dims, kind)
    g = features(rng, len(case.g_pids), dims, kind)
    result = rank_features(
        q, g, *case.labels(), metric=metric, ties=ties, topk=4, max_rank=9, tiling=tiling
    )
    z = exact(q, g, metric)
    same_bits(result, rank_distances(z, *case.labels(), ties=ties, topk=4, max_rank=9))


def people(dtype: Any = np.float32) -> tuple[Any, Any, tuple[Any, ...]]:
    """70 queries, 5,000 items, few to very many matches, junk, duplicates."""
    rng = np.random.default_rng(5)
    ids = np.repeat(np.arange(8), [3, 10, 20, 60, 150, 300, 1200, 3257])
    g_pids = rng.permutation(np.where(rng.random(5000) < 0.1, -1, ids))
    q_pids = np.arange(70) % 8
    centres = rng.standard_normal((9, 48))
    q = centres[q_pids] + 1.5 * rng.standard_normal((70, 48))
    g = centres[g_pids] + 1.5 * rng.standard_normal((5000, 48))
    g[2500:2600] = g[:100]
    labels = (q_pids, g_pids, rng.integers(0, 3, 70), rng.integers(0, 3, 5000))
    return q.astype(dtype), g.astype(dtype), labels


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_same_bits_for_every_level_type_tile_and_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, metric: str, dtype: Any
) -> None:
    q, g, labels = people(dtype)
    expected = rank_distances(exact(q, g, metric), *labels, topk=30)
    monkeypatch.delenv("DML_FAST_ISA", raising=False)
    highest = LEVELS.index(_native.instruction_set())
    tilings = [
        Tiling(bf16=True),
        Tiling(bf16=False),
        Tiling(bf16=True, query_rows=7, item_rows=300, operand_bytes=1 << 17),
        Tiling(bf16=False, query_rows=64, item_rows=77, positives=3000),
    ]
    for level, tiling, threads in zip(
        [LEVELS[min(i, highest)] for i in (0, 1, 2, 2)], tilings, "1231", strict=True
    ):
        monkeypatch.setenv("DML_FAST_ISA", level)
        monkeypatch.setenv("DML_FAST_THREADS", threads)
        same_bits(rank_features(q, g, *labels, metric=metric, topk=30, tiling=tiling), expected)


def test_exact_rows_are_the_oracles_at_every_level(monkeypatch: pytest.MonkeyPatch) -> None:
    q, g, labels = people()
    z = exact(q, g, "euclidean")
    expected = rank_distances(z, *labels, protocol="cuhk03", ties="expected")
    monkeypatch.delenv("DML_FAST_ISA", raising=False)
    for level in LEVELS[: LEVELS.index(_native.instruction_set()) + 1]:
        monkeypatch.setenv("DML_FAST_ISA", level)
        got = rank_features(q, g, *labels, metric="euclidean", protocol="cuhk03", ties="expected")
        same_bits(got, expected)


def test_reduced_precision_allowed_by_the_user_changes_no_bit() -> None:
    q, g, labels = people()
    expected = rank_features(q, g, *labels, tiling=Tiling(bf16=False))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        same_bits(rank_features(q, g, *labels, tiling=Tiling(bf16=False)), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_flushed_denormals_change_no_bit() -> None:
    rng = np.random.default_rng(0)
    q, g = ((rng.standard_normal((n, 8)) * 1e-39).astype(np.float32) for n in (4, 40))
    labels = [rng.integers(0, 3, n) for n in (4, 40, 4, 40)]
    expected = rank_distances(exact(q, g, "euclidean"), *labels)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        same_bits(rank_features(q, g, *labels, metric="euclidean", tiling=BF16), expected)
        z = exact(q, g, "euclidean").astype(np.float32)
        dist = np.where(z == 0, np.float32(1e-45), z)
        flushed = rank_distances(dist, *labels)
    finally:
        torch.set_flush_denormal(False)
    same_bits(flushed, rank_distances(dist, *labels))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("bf16", [True, False])
def test_queries_and_gallery_of_very_different_size(scale: float, bf16: bool) -> None:
    rng = np.random.default_rng(0)
    q = (scale * rng.standard_normal((20, 6))).astype(np.float32)
    g = rng.standard_normal((200, 6), np.float32)
    g[100:] *= np.float32(1e6)
    labels = [rng.integers(0, 5, n) for n in (20, 200, 20, 200)]
    result = rank_features(q, g, *labels, metric="euclidean", tiling=Tiling(bf16=bf16))
    same_bits(result, rank_distances(exact(q, g, "euclidean"), *labels))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_bound_holds_in_its_worst_case(metric: str) -> None:
    """One feature: no errors cancel. Neighbours of any size, each a hair nearer or as near."""
    rng = np.random.default_rng(0)
    q = rng.uniform(0.5, 1, (200, 1)).astype(np.float32)
    g = np.repeat(q, 3, axis=0) * np.float32([[1], [1], [1 + 2**-20]] * 200)
    labels = (np.arange(200), np.tile([0, 1, 2], 200) + 3 * np.arange(200).repeat(3))
    labels = (labels[0] * 3 + 1, labels[1], None, None)
    result = rank_features(q, g, *labels, metric=metric, protocol="all", tiling=BF16)
    same_bits(result, rank_distances(exact(q, g, metric), *labels, protocol="all"))


def test_the_number_of_torchs_threads_is_left_as_it_was() -> None:
    q, g, labels = people()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        rank_features(q, g, *labels)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_input_types_agree() -> None:
    q, g, labels = people()
    expected = rank_features(q, g, *labels)
    same_bits(rank_features(torch.from_numpy(q), torch.from_numpy(g), *labels), expected)
    same_bits(rank_features(np.asfortranarray(q), g.tolist(), *labels), expected)
    same_bits(rank_features(q.astype(np.float64), g, *labels), expected)
    half = torch.from_numpy(q).half()
    same_bits(rank_features(half, g, *labels), rank_features(half.float(), g, *labels))


@pytest.mark.parametrize(
    ("change", "rules", "message"),
    [
        ({"q": (2, np.nan)}, {}, "query has NaN in 1 of its 70 rows, first in row 2"),
        ({"g": (9, np.nan)}, {}, "gallery has NaN in 1 of its 5000 rows, first in row 9"),
        ({"dims": 47}, {}, "query has 47 features and gallery 48"),
        ({"dims": 0}, {}, r"query is empty, its shape is \(70, 0\)"),
        ({}, {"metric": "dot"}, "metric is 'dot', which is none of cosine, euclidean"),
        ({}, {"topk": -2}, "topk is -2"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    change: dict[str, Any], rules: dict[str, Any], message: str
) -> None:
    q, g, labels = people()
    for name, array in (("q", q), ("g", g)):
        if name in change:
            row, value = change[name]
            array[row, 3] = value
    with pytest.raises(UserError, match=message) as caught:
        rank_features(q[:, : change.get("dims", 48)], g, *labels, **rules)
    assert "\n" not in str(caught.value)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=100), st.integers(1, 60), st.integers(1, 9)
)
@settings(deadline=None, max_examples=100)
def test_blocks_of_queries_are_whole_chunks_within_bounds(
    positives: list[int], most: int, sixteens: int
) -> None:
    tiling = Tiling(positives=most, operand_bytes=sixteens * 16 * 4 * 2)
    blocks = list(query_blocks(np.array(positives), 2, tiling))
    assert [begin for begin, _ in blocks[1:]] == [end for _, end in blocks[:-1]]
    assert blocks[0][0] == 0 and blocks[-1][1] == len(positives)
    for begin, end in blocks:
        assert begin % 16 == 0 and 0 < end - begin <= 16 * sixteens
        assert end - begin <= 16 or sum(positives[begin:end]) <= most
