"""Identities of every type give the same ranking; what is left out as junk is counted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranking_cases import Case, check, same_bits

from dml_fast.errors import UserError
from dml_fast.eval import (
    SingleShot,
    rank_distances,
    rank_features,
    rank_hamming,
    rank_sets,
    rerank,
)

Ids = NDArray[Any]

# Junk is -1 and the distractor 0, whatever they are written as.
TYPES: dict[str, Callable[[Ids], Any]] = {
    "int8": lambda ids: ids.astype(np.int8),
    "int32, other byte order": lambda ids: ids.astype(">i4"),
    "int64": lambda ids: ids.astype(np.int64),
    "uint8": lambda ids: ids.astype(np.uint8),
    "uint16": lambda ids: ids.astype(np.uint16),
    "uint64": lambda ids: ids.astype(np.uint64),
    "strings": lambda ids: ids.astype(str),
    "bytes": lambda ids: ids.astype("S"),
    "long strings": lambda ids: ids.astype("U40"),
    "list of int": lambda ids: ids.tolist(),
    "list of str": lambda ids: [str(i) for i in ids],
    "tensor": lambda ids: torch.from_numpy(ids.astype(np.int16)),
    "unsigned tensor": lambda ids: torch.from_numpy(ids.astype(np.uint8)),
}


def labelled() -> tuple[NDArray[np.float32], Case]:
    """Distances in which junk is nearest, and labels with junk and a distractor."""
    rng = np.random.default_rng(5)
    g_pids = rng.permutation(np.repeat([-1, 0, 1, 2, 30], [6, 9, 5, 5, 5]))
    case = Case(np.array([1, 2, 30, 1, 77]), g_pids, rng.integers(0, 2, 5), rng.integers(0, 2, 30))
    dist = rng.random((5, 30), dtype=np.float32)
    dist[:, g_pids == -1] -= 1
    return dist, case


@pytest.mark.parametrize("cams", ["int64", "bytes", "uint64"])
@pytest.mark.parametrize("kind", TYPES)
def test_every_type_of_identity_gives_the_oracles_scores(kind: str, cams: str) -> None:
    dist, case = labelled()
    pids, views = TYPES[kind], TYPES[cams]
    labels = (pids(case.q_pids), pids(case.g_pids), views(case.q_cams), views(case.g_cams))
    result = rank_distances(dist, *labels, junk_pid=-1, topk=3)
    check(result, dist, case)
    unscreened = rank_distances(dist, *labels, junk_pid=None, topk=3)
    check(unscreened, dist, case, junk_pid=None)
    assert unscreened.mAP < result.mAP


@pytest.mark.parametrize("kind", ["int16", "uint32", "U", "S"])
def test_all_ways_of_ranking_know_junk_of_every_type(kind: str) -> None:
    rng = np.random.default_rng(0)
    g_pids = np.arange(60) % 6 - 1
    g = rng.standard_normal((60, 8)) + 3 * np.eye(8)[g_pids]
    codes = np.packbits(g > 0, axis=1)
    pids = (np.array([1, 2, 3]), g_pids)
    typed = [p.astype(kind) for p in pids]

    def results(q_pids: Ids, g_pids: Ids) -> list[Any]:
        labels: Any = (q_pids, g_pids)
        rules: Any = {"protocol": "all", "junk_pid": -1}
        return [
            rank_features(g[1:4], g, *labels, **rules),
            rerank(g[1:4], g, *labels, **rules),
            rank_sets(g[1:4], g, *labels, g_sets=np.arange(60) % 12, **rules),
            rank_hamming(codes[1:4], codes, *labels, **rules),
        ]

    for expected, result in zip(results(*pids), results(*typed), strict=True):
        same_bits(expected, result)


def test_strings_and_bytes_may_have_any_lengths() -> None:
    dist = np.array([[0.1, 0.2, 0.3]])
    for kind in (str, np.bytes_):
        names = np.array(["ann", "annabella", "ann"]).astype(kind)
        result = rank_distances(dist, names[:1], names, protocol="all")
        assert result.ap[0] == pytest.approx((1 + 2 / 3) / 2)
        assert rank_distances(dist, names[1:2], names, protocol="all").ap[0] == 0.5


def test_numbers_that_no_signed_type_holds_are_not_rounded() -> None:
    """In float64, numpy's common type of the two, the last three are one number."""
    g_pids = np.array([5, 2**63, 2**64 - 2048, 2**64 - 2049, 2**64 - 2050], np.uint64)
    dist = np.arange(5.0)[None]
    for pid, place in ((2**64 - 2049, 4), (5, 1), (2**63, 2)):
        for q in (np.array([pid], np.uint64), [pid]):
            result = rank_distances(dist, q, g_pids, protocol="all")
            assert result.first_rank.tolist() == [place]
    cams = np.array([2**63, 1, 2, 3, 4], np.uint64)
    with pytest.raises(UserError, match="same camera"):
        rank_distances(dist[:, :1], [5], g_pids[:1], cams[:1], cams[:1])
    with pytest.raises(UserError, match="none of the queries' identities"):
        rank_distances(dist, [-(2**63)], g_pids, protocol="all")


def test_junk_is_compared_in_the_identities_own_type_or_refused() -> None:
    dist = np.array([[0.1, 0.2]])

    def places(g_pids: Any, junk: Any) -> list[float]:
        ranked = rank_distances(dist, g_pids[1:], g_pids, protocol="all", junk_pid=junk)
        return list(ranked.first_rank)

    for junk in ("x", np.str_("x")):
        assert places(np.array(["x", "me"]), junk) == [1]
        assert places(np.array([b"x", b"me"]), junk) == [1]
    assert places(np.array([b"x", b"me"]), b"x") == [1]
    assert places(np.array(["-7", "me"]), -7) == [1]
    assert places(np.array([250, 3], np.uint8), np.int64(250)) == [1]
    for pids, absent in ((np.uint8, 300), (np.uint8, -200), (np.int8, 255), (np.int64, 2**70)):
        assert places(np.array([44, 3], pids), absent) == [2]
    for pids, junk in (([1, 2], "1"), ([1, 2], b"1"), (["a", "b"], b"a"), ([1, 2], 1.0)):
        with pytest.raises(UserError, match=r"^junk_pid is .* and g_pids has type .*: pass"):
            places(np.array(pids), junk)


def test_what_the_default_leaves_out_is_counted_in_one_warning() -> None:
    dist, case = labelled()
    message = "^6 of 30 gallery items are of identity -1 and left out as junk: "
    with pytest.warns(UserWarning, match=message) as caught:
        rank_distances(dist, *case.labels())
    assert len(caught) == 1 and caught[0].filename == __file__
    features = np.random.default_rng(0).standard_normal((35, 4))
    for rank in (rank_features, rerank, rank_sets):
        with pytest.warns(UserWarning, match=message) as caught:
            rank(features[:5], features[5:], *case.labels())
        assert len(caught) == 1
    wrapped = [ids.astype(np.uint16) for ids in case.labels()]
    with pytest.warns(UserWarning, match="are of identity 65535 and left out"):
        rank_distances(dist, *wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rank_distances(dist, *case.labels(), junk_pid=-1)  # asked for
        rank_distances(dist, *case.labels(), junk_pid=None)
        rank_distances(dist[:, case.g_pids >= 0], case.q_pids, case.g_pids[case.g_pids >= 0],
                       protocol="all")  # fmt: skip


def test_if_all_matches_are_junk_the_error_says_so() -> None:
    with pytest.raises(UserError, match=r"none of the queries' .* \(2 of 2 gallery items are junk"):
        rank_distances(np.ones((1, 2)), [-1], [-1, -1], protocol="all", junk_pid=-1)


@pytest.mark.parametrize("protocol", ["market1501", "cuhk03", "all", SingleShot(3)])
@pytest.mark.parametrize("labels", [([9, 8], [1, 2, 3]), ([1, 1], [-1, -1, -1])])
def test_with_count_invalid_no_match_at_all_counts_zero(labels: Any, protocol: Any) -> None:
    rng = np.random.default_rng(0)
    q, g = rng.standard_normal((2, 4)), rng.standard_normal((3, 4))
    rules: Any = {"protocol": protocol, "count_invalid": True, "junk_pid": -1}
    cams = ([0, 0], [1, 1, 1])
    found = [
        rank_distances(q @ g.T, *labels, *cams, **rules),
        rank_features(q, g, *labels, *cams, **rules),
        rerank(q, g, *labels, *cams, k1=2, k2=1, **rules),
        rank_sets(q, g, *labels, *cams, **rules),
        rank_sets(q, g, *labels, *cams, reduction="centroid", **rules),
        rank_hamming((q > 0).astype(np.uint8), (g > 0).astype(np.uint8), *labels, *cams, **rules),
    ]
    for result in found:
        assert (result.mAP, result.mINP, result.mrr, result.n_valid) == (0, 0, 0, 0)
        assert not result.cmc.any() and not result.precision.any()
        assert result.ap.tolist() == [0, 0]
