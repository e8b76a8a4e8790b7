"""Sizes from arguments and the environment: huge, negative, not whole; one sentence each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ranking_cases import Case, check

from dml_fast.errors import UserError
from dml_fast.eval import (
    SingleShot,
    rank_distances,
    rank_features,
    rank_hamming,
    rank_sets,
    rerank,
)

RNG = np.random.default_rng(0)
Q, G = RNG.standard_normal((20, 4)), RNG.standard_normal((30, 4))
LABELS: Any = (np.arange(20) % 5, np.arange(30) % 5, np.zeros(20, int), np.ones(30, int))


def all_ways(**rules: Any) -> list[Any]:
    codes = [np.packbits(f > 0, axis=1) for f in (Q, G)]
    return [
        lambda: rank_distances(Q @ G.T, *LABELS, **rules),
        lambda: rank_features(Q, G, *LABELS, **rules),
        lambda: rank_features(Q, G, *LABELS, protocol="cuhk03", **rules),
        lambda: rank_hamming(*codes, *LABELS, **rules),
        lambda: rank_sets(Q, G, *LABELS, **rules),
        lambda: rerank(Q, G, *LABELS, **rules),
    ]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"max_rank": 2**40}, "^max_rank is 1099511627776 and topk 0: .* and .* GB are free"),
        ({"max_rank": 10**30}, "^max_rank is 10{30} and topk 0: .* GB are free: give less$"),
        ({"topk": 2**40}, "^max_rank is 50 and topk 1099511627776: .* are free: give less$"),
        ({"topk": 10**30}, "and topk 10{30}: .* are free: give less$"),
        ({"max_rank": 5.0}, "^max_rank is 5.0: give a whole number of at least 1$"),
        ({"max_rank": "5"}, "^max_rank is '5': give a whole number of at least 1$"),
        ({"topk": None}, "^topk is None: give a whole number of at least 0$"),
    ],
)
def test_sizes_that_no_memory_holds_are_refused(rules: dict[str, Any], message: str) -> None:
    for rank in all_ways(**rules):
        with pytest.raises(UserError, match=message) as caught:
            rank()
        assert "\n" not in str(caught.value)


def test_a_curve_costs_no_more_than_the_gallery_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each of the chunks of 16 queries; that is how 2^31 - 1 filled the memory."""
    monkeypatch.setattr("dml_fast.ranking.protocol.available_bytes", lambda: 100 * 2**20)
    for protocol in ("market1501", "cuhk03"):
        dist = RNG.random((1600, 30))
        case = Case(np.arange(1600) % 5, LABELS[1], np.zeros(1600, int), LABELS[3])
        result = rank_distances(dist, *case.labels(), max_rank=10**6, protocol=protocol)
        assert len(result.cmc) == len(result.precision) == 10**6
        assert result.cmc[-1] == result.cmc[29] and result.precision[-1] < 1e-4
    few = Case(*(x[:3] if len(x) == 20 else x for x in LABELS))
    for rank in (31, 100):
        check(rank_distances(dist[:3], *few.labels(), max_rank=rank), dist[:3], few)
    with pytest.raises(UserError, match=r"would take 480\.\d GB and 0\.1 GB are free"):
        rank_distances(dist, *case.labels(), max_rank=10**10)


@pytest.mark.parametrize(
    "protocol",
    [SingleShot(2**63), SingleShot(10**30), SingleShot(2.5), SingleShot(3, seed=0.5)],  # type: ignore[arg-type]
)
def test_numbers_of_draws_that_cannot_be(protocol: SingleShot) -> None:
    with pytest.raises(UserError, match=r"^SingleShot\(.* is impossible: "):
        rank_distances(Q @ G.T, *LABELS, protocol=protocol)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k1": 50}, r"^k1 is 50: with 50 images it must be in 1..49$"),
        ({"k1": 10**30}, "^k1 is 10{30}: with 50 images"),
        ({"k1": 5.5}, "^k1 is 5.5: give a whole number"),
        ({"k2": 3.0}, "^k2 is 3.0: give a whole number"),
        ({"k2": 22}, "^k2 is 22: with k1=20"),
        ({"lambda_value": float("nan")}, "^lambda_value is nan"),
    ],
)
def test_neighbourhoods_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rerank(Q, G, *LABELS, **options)


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf")])
def test_temperatures_that_cannot_be(temperature: float) -> None:
    with pytest.raises(UserError, match=r"^temperature is .*: give a number above 0$"):
        rank_sets(Q, G, *LABELS, reduction="log_sum_exp", temperature=temperature)


@pytest.mark.parametrize("threads", ["9" * 20, "9" * 5000, "2147483648", "0", "-1", "1e3", "٣x"])
def test_numbers_of_threads_that_cannot_be(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DML_FAST_THREADS", threads)
    for rank in all_ways():
        with pytest.raises(UserError, match=r"^DML_FAST_THREADS=.* is not a number of threads: "):
            rank()


def test_more_threads_than_cores_are_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DML_FAST_THREADS", "1024")
    for rank in all_ways():
        rank()


@pytest.mark.parametrize("isa", ["avx9", "AVX2", "\udcff"])
def test_instruction_sets_that_cannot_be(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DML_FAST_ISA", isa)
    for rank in all_ways():
        with pytest.raises(UserError, match=r"^DML_FAST_ISA=.* is not an instruction set: choose"):
            rank()
