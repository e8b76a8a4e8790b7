"""Ranking of given distances against the numpy oracle, and what it refuses."""

from __future__ import annotations

import json
import re
import warnings
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking_cases import LEVELS, TIES, Case, cases, check, same_bits

from dml_fast import _native
from dml_fast.errors import UserError
from dml_fast.eval import SingleShot, rank_distances

RULES = [
    {"protocol": protocol, "ties": ties}
    for protocol, ties in product(("market1501", "cuhk03", "all"), TIES)
]


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The instruction sets that this machine can be told to use."""
    monkeypatch.delenv("DML_FAST_ISA", raising=False)
    return list(LEVELS[: LEVELS.index(_native.instruction_set()) + 1])


def distances(case: Case, rng: np.random.Generator, kind: str, dtype: Any) -> Any:
    shape = (len(case.q_pids), len(case.g_pids))
    if kind == "tied":
        return rng.integers(0, 3, shape).astype(dtype)
    if kind == "extreme":  # both zeros, denormals, infinities and neighbours of one
        tiny, one = np.finfo(dtype).smallest_subnormal, dtype(1)
        choice = [0.0, -0.0, tiny, -tiny, np.inf, -np.inf, one, np.nextafter(one, dtype(2))]
        return rng.choice(np.array(choice, dtype), shape)
    if kind == "nan":
        return rng.choice(np.array([np.nan, np.inf, 1, 2], dtype), shape)
    return rng.random(shape, dtype=dtype)


@pytest.mark.parametrize("rules", RULES, ids=lambda r: f"{r['protocol']}-{r['ties']}")
@settings(deadline=None, max_examples=30)
@given(
    cases(), st.sampled_from(["tied", "extreme", "nan", "any"]), st.booleans(), st.integers(1, 12)
)
def test_every_field_equals_the_oracles(
    rules: dict[str, Any],
    case_rng: tuple[Case, np.random.Generator],
    kind: str,
    double: bool,
    max_rank: int,
) -> None:
    case, rng = case_rng
    dist = distances(case, rng, kind, np.float64 if double else np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if kind == "nan" else "error")
        result = rank_distances(
            dist, *case.labels(), max_rank=max_rank, topk=3, junk_pid=-1, **rules
        )
    check(result, dist, case, **rules)


@settings(deadline=None, max_examples=40)
@given(cases(), st.booleans(), st.booleans(), st.sampled_from([-1, 0, None]))
def test_the_other_arguments_follow_the_oracle(
    case_rng: tuple[Case, np.random.Generator], camera_rule: bool, count_invalid: bool, junk: Any
) -> None:
    case, rng = case_rng
    if junk == 0:
        case.g_pids += 1  # query 0 keeps its match
        case.q_pids += 1
    dist = distances(case, rng, "tied", np.float32)
    rules = {"camera_rule": camera_rule, "count_invalid": count_invalid, "junk_pid": junk}
    check(rank_distances(dist, *case.labels(), **rules), dist, case, **rules)


@pytest.mark.parametrize("protocol", ["market1501", "cuhk03"])
def test_curves_are_sums_over_all_chunks_of_queries(protocol: str) -> None:
    """40 queries are three chunks of 16; the last is not whole."""
    rng = np.random.default_rng(0)
    pids, cams = (lambda n: rng.integers(0, 3, n)), (lambda n: rng.integers(0, 2, n))
    case = Case(pids(40), pids(9), cams(40), cams(9))
    dist = rng.random((40, 9), np.float32)
    check(rank_distances(dist, *case.labels(), protocol=protocol), dist, case, protocol=protocol)


def big_case(dtype: Any = np.float32, kind: str = "rounded") -> tuple[Any, tuple[Any, ...]]:
    """Rows longer than a block, from few to very many matches per query."""
    rng = np.random.default_rng(3)
    pids = np.repeat(np.arange(6), [2, 5, 30, 80, 400, 4500])
    g_pids = rng.permutation(np.where(rng.random(len(pids)) < 0.1, -1, pids))
    q_pids = np.arange(40) % 6
    dist = rng.random((40, len(g_pids))).astype(dtype)
    if kind == "rounded":
        dist = dist.round(3)
    return dist, (q_pids, g_pids, rng.integers(0, 4, 40), rng.integers(0, 4, len(g_pids)))


@pytest.mark.parametrize("kind", ["rounded", "fine"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ties", TIES)
def test_the_same_bits_at_every_level_and_for_any_number_of_threads(
    levels: list[str], monkeypatch: pytest.MonkeyPatch, dtype: Any, ties: str, kind: str
) -> None:
    dist, labels = big_case(dtype, kind)
    results = []
    for level, threads in product(levels, ("1", "3")):
        monkeypatch.setenv("DML_FAST_ISA", level)
        monkeypatch.setenv("DML_FAST_THREADS", threads)
        results.append(rank_distances(dist, *labels, ties=ties, topk=20))
    for result in results[1:]:
        same_bits(results[0], result)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_long_rows_equal_the_oracle_at_every_level(
    levels: list[str], monkeypatch: pytest.MonkeyPatch, level: str, dtype: Any
) -> None:
    if level not in levels:
        pytest.skip(f"this machine has no {level}")
    monkeypatch.setenv("DML_FAST_ISA", level)
    dist, labels = big_case(dtype)
    dist, labels = dist[:6], (labels[0][:6], labels[1], labels[2][:6], labels[3])
    for ties in ("stable", "pessimistic"):
        result = rank_distances(dist, *labels, ties=ties, topk=20)
        check(result, dist, Case(*labels), ties=ties)


def test_the_expected_scores_are_the_mean_over_shuffled_galleries() -> None:
    rng = np.random.default_rng(0)
    dist = rng.integers(0, 4, (8, 60)).astype(np.float32)
    labels = [rng.integers(0, 5, n) for n in (8, 60, 8, 60)]
    expected = rank_distances(dist, *labels, ties="expected")
    shuffled = []
    for _ in range(2000):
        order = rng.permutation(60)
        shuffled.append(
            rank_distances(dist[:, order], labels[0], labels[1][order], labels[2], labels[3][order])
        )
    for name in ("mAP", "mAP_trapezoid", "mINP", "mrr", "r_precision", "map_at_r", "cmc"):
        values = np.array([getattr(result, name) for result in shuffled])
        error = 5 * values.std(0) / np.sqrt(len(values)) + 0.003  # rare events may not have come up
        assert (np.abs(values.mean(0) - getattr(expected, name)) <= error).all(), name


@pytest.mark.parametrize("ties", TIES)
def test_drawing_single_shots_comes_near_their_exact_mean(ties: str) -> None:
    rng = np.random.default_rng(1)
    dist = rng.integers(0, 12, (20, 90)).astype(np.float64)
    labels = [rng.integers(0, 12, n) for n in (20, 90, 20, 90)]
    exact = rank_distances(dist, *labels, protocol="cuhk03", ties=ties)
    drawn = rank_distances(dist, *labels, protocol=SingleShot(3000, seed=7), ties=ties)
    np.testing.assert_allclose(drawn.cmc, exact.cmc, atol=0.01)
    assert (drawn.cmc != exact.cmc).any() and drawn.mAP == exact.mAP
    again = rank_distances(dist, *labels, protocol=SingleShot(3000, seed=7), ties=ties)
    other = rank_distances(dist, *labels, protocol=SingleShot(3000, seed=8), ties=ties)
    same_bits(drawn, again)
    assert (drawn.cmc != other.cmc).any()


def test_scores_worked_out_by_hand() -> None:
    """Matches at ranks 1 and 3 of four; the curve continues beyond the row's end."""
    result = rank_distances([[0.1, 0.2, 0.3, 0.4]], [7], [7, 1, 7, 2], [0], [1, 1, 1, 1])
    assert result.mAP == pytest.approx((1 + 2 / 3) / 2)
    assert result.mAP_trapezoid == pytest.approx((1 + (2 / 3 + 1 / 2) / 2) / 2)
    assert result.mINP == pytest.approx(2 / 3)
    assert result.cmc.tolist() == [1.0] * 50
    assert result.precision[:5] == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2, 2 / 5])
    assert (result.first_rank[0], result.n_valid, result.n_tied) == (1, 1, 0)


def test_a_collapsed_network_scores_by_chance_not_by_luck() -> None:
    """All distances equal: 'optimistic' gives it 100 %."""
    labels = ([0] * 5, [0] * 10 + [1] * 990, None, None)
    dist = np.zeros((5, 1000), np.float32)
    kept = {"camera_rule": False, "max_rank": 1000}
    expected = rank_distances(dist, *labels, ties="expected", **kept)
    assert expected.cmc[0] == pytest.approx(0.01)
    assert expected.cmc[989] == pytest.approx(1 - 1e-10, abs=1e-9) and expected.n_tied == 5
    assert expected.first_rank[0] == pytest.approx(1001 / 11)
    assert rank_distances(dist, *labels, ties="optimistic", **kept).mAP == 1


def test_torch_numpy_types_and_layouts_agree() -> None:
    dist, labels = big_case()
    expected = rank_distances(dist, *labels, topk=5)
    wide = np.zeros((dist.shape[0], 2 * dist.shape[1]), np.float32)
    wide[:, ::2] = dist
    as_tensors = [torch.tensor(x) for x in labels]
    for given_dist, given_labels in (
        (torch.from_numpy(dist), as_tensors),
        (wide[:, ::2], [x.astype(np.int16) for x in labels]),
        (dist.astype(np.float64), [x.astype(np.int32) - (i > 1) * 9 for i, x in enumerate(labels)]),
        (np.asfortranarray(dist), [x.tolist() for x in labels]),
    ):
        same_bits(rank_distances(given_dist, *given_labels, topk=5), expected)
    names = np.array(["d", "b", "c", "a", "e", "f", "-1"])
    in_words = [names[labels[0]], names[labels[1]], names[labels[2]], names[labels[3]]]
    without_junk = in_words[1] != "-1"
    in_words[1], in_words[3] = in_words[1][without_junk], in_words[3][without_junk]
    by_name = rank_distances(dist[:, without_junk], *in_words)
    assert by_name.ap.tobytes() == expected.ap.tobytes()
    half = rank_distances(torch.from_numpy(dist).bfloat16(), *labels)
    same_bits(half, rank_distances(torch.from_numpy(dist).bfloat16().float(), *labels))


@pytest.mark.parametrize(
    "numbers", [[5, 3, 70_000, 4, 65_540, 0], [-(2**62), 1 - 2**63, 0, 7, 2**62, 2**63 - 1]]
)
def test_identities_may_be_any_integers(numbers: list[int]) -> None:
    dist, labels = big_case()
    expected = rank_distances(dist, *labels)
    others = [np.append(numbers, -1)[pids] for pids in labels[:2]]
    same_bits(rank_distances(dist, *others, *labels[2:]), expected)


def test_a_tensor_is_read_in_place_and_left_as_it_was() -> None:
    from dml_fast.ranking.inputs import as_floats

    dist = torch.rand(3, 4)
    assert np.shares_memory(as_floats(dist, "dist", "(Q, G)"), dist.numpy())
    frozen = np.random.default_rng(0).random((1, 2))
    frozen.setflags(write=False)
    rank_distances(frozen, [1], [1, 2], [0], [1, 1])


def test_float64_is_not_rounded() -> None:
    """In float32 the two would tie, and the first, no match, would win."""
    result = rank_distances(np.array([[1 + 1e-12, 1.0]]), [1], [2, 1], [0], [1, 1])
    assert result.mAP == 1 and result.n_tied == 0


def test_nans_are_ranked_last_with_one_warning() -> None:
    dist = np.array([[np.nan, 5, np.inf], [np.nan, np.nan, 1]])
    with pytest.warns(UserWarning, match="^3 distances are NaN: they are ranked last$") as caught:
        result = rank_distances(dist, [1, 1], [1, 2, 2], [0, 0], [1, 1, 1])
    assert len(caught) == 1 and result.first_rank.tolist() == [3, 2]


def test_the_result_prints_a_table_and_goes_to_json() -> None:
    labels = ([1, 9], [1, 2, 2], [0, 0], [1, 1, 1])
    result = rank_distances([[1, 1, 0], [1, 2, 3]], *labels, topk=1)
    table = str(result)
    assert re.search(r"^mAP +50\.00 %$", table, re.M)
    assert re.search(r"^rank-1 +0\.00 %$", table, re.M)
    assert re.search(r"^without a match +1$", table, re.M)
    assert re.search(r"^with ties +1 +\(broken: stable\)$", table, re.M)
    plain = json.loads(result.to_json())
    assert plain["ap"] == [0.5, None] and plain["mAP"] == 0.5 and len(plain["cmc"]) == 50
    assert plain["protocol"] == "market1501" and "topk" not in plain


D = np.zeros((2, 3), np.float32)
LABELS = ([1, 1], [1, 2, 3], [0, 0], [1, 1, 1])
MISTAKES: list[tuple[Any, Any, dict[str, Any], str]] = [
    (D[0], LABELS, {}, r"dist has 1 dimension\(s\): pass \(Q, G\)"),
    (D[:0], LABELS, {}, r"dist is empty, its shape is \(0, 3\)"),
    (D[:, :0], LABELS, {}, r"dist is empty, its shape is \(2, 0\)"),
    (D.astype(complex), LABELS, {}, "dist has type complex128: pass float32 or float64"),
    (D, ([1], *LABELS[1:]), {}, r"q_pids has shape \(1,\): pass one for each row, \(2,\)"),
    (D, (*LABELS[:3], [1]), {}, r"g_cams has shape \(1,\): pass one for each row, \(3,\)"),
    (D, ([1.0, 1.5], *LABELS[1:]), {}, "q_pids has type float64: pass integers"),
    (D, (["a", "b"], *LABELS[1:]), {}, "q_pids has type <U1 and g_pids int64"),
    (D, (*LABELS[:2], None, None), {}, "q_cams is missing: pass cameras, or camera_rule=False"),
    (D, ([5, 6], *LABELS[1:]), {}, "none of the queries' identities is in the gallery"),
    (D, ([1, 1], [-1, -1, -1], *LABELS[2:]), {}, "none of the queries' identities"),
    (D, (*LABELS[:2], [1, 1], [1, 1, 1]), {}, "the same camera as all gallery images"),
    (D, LABELS, {"max_rank": 0}, "max_rank is 0"),
    (D, LABELS, {"topk": -1}, "topk is -1"),
    (D, LABELS, {"ties": "random"}, "ties is 'random', which is none of stable, expected"),
    (D, LABELS, {"protocol": "msmt"}, "protocol is 'msmt', which is none of market1501"),
    (D, LABELS, {"protocol": SingleShot(0)}, r"SingleShot\(repeats=0, seed=0\) is impossible"),
]


@pytest.mark.parametrize(("dist", "labels", "rules", "message"), MISTAKES)
def test_mistakes_are_told_in_one_sentence(
    dist: Any, labels: Any, rules: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        rank_distances(dist, *labels, **rules)
    assert "\n" not in str(caught.value)


def test_the_extension_itself_converts_nothing() -> None:
    ids, offsets, none = np.zeros(2, np.int64), np.array([0, 2]), np.zeros(0, np.int64)
    good = (ids, ids, none, none, offsets, np.arange(2), none, 0, 5, 0, -1, 0, 1)
    dist = np.zeros((2, 2), np.float32)
    assert _native.rank_rows_f32(dist, *good)[0].shape == (2, 8)
    for bad in (dist.astype(np.float64), np.zeros((2, 4), np.float32)[:, ::2], [[0.0]]):
        with pytest.raises(TypeError):
            _native.rank_rows_f32(bad, *good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a row for each query"):
        _native.rank_rows_f32(np.zeros((2, 3), np.float32), *good)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("matches", [1, 13, 14, 15, 16, 29, 30, 31, 44, 60, 61, 63, 64, 65])
def test_any_number_of_matches_that_a_table_may_hold(
    levels: list[str], monkeypatch: pytest.MonkeyPatch, level: str, matches: int
) -> None:
    """Thresholds in registers: their last place, infinities, NaN, and rows of any length."""
    if level not in levels:
        pytest.skip(f"this machine has no {level}")
    monkeypatch.setenv("DML_FAST_ISA", level)
    rng = np.random.default_rng(matches)
    for items in (matches + 1, 2016 + matches, 2 * 2016, 4100):
        g_pids = rng.permutation(np.arange(items) < matches).astype(int)
        case = Case(np.ones(4, int), g_pids, np.zeros(4, int), rng.integers(0, 9, items))
        case.g_cams[np.flatnonzero(g_pids)[0]] = 1
        dist = rng.standard_normal((4, items)).astype(np.float32)
        dist[1] = dist[1].round(2)  # many ties
        dist[2, rng.random(items) < 0.1] = np.inf
        dist[3] = np.where(g_pids, dist[3] - 9, dist[3])  # all matches first
        dist[3, rng.random(items) < 0.1] = -np.inf
        dist[2:, rng.random(items) < 0.1] = np.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = rank_distances(dist, *case.labels(), protocol="all")
        check(result, dist, case, protocol="all")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numbers beyond the table's last place are no NaNs
            rank_distances(dist[:1], case.q_pids[:1], g_pids, protocol="all")
