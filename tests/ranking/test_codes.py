"""Ranking of binary codes equals ranking of the distances that they have."""

from __future__ import annotations

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
from dml_fast.eval import rank_distances, rank_hamming


def bits_between(q: Any, g: Any) -> Any:
    return np.unpackbits(q[:, None] ^ g[None], axis=2).sum(2).astype(np.float32)


@pytest.mark.parametrize("protocol", ["market1501", "cuhk03", "all"])
@settings(deadline=None, max_examples=40)
@given(cases(), st.sampled_from(TIES), st.sampled_from([1, 8, 11]), st.integers(1, 255))
def test_codes_equal_the_oracle(
    protocol: str,
    case_rng: tuple[Case, np.random.Generator],
    ties: str,
    size: int,
    most: int,
) -> None:
    case, rng = case_rng
    q, g = (rng.integers(0, most, (len(x), size), np.uint8) for x in (case.q_pids, case.g_pids))
    result = rank_hamming(q, g, *case.labels(), protocol=protocol, ties=ties, topk=4, max_rank=8)
    check(result, bits_between(q, g), case, protocol=protocol, ties=ties)


@pytest.mark.parametrize("size", [8, 24, 64, 61])
def test_the_same_bits_at_every_level_and_for_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    rng = np.random.default_rng(2)
    q, g = (rng.integers(0, 256, (n, size), np.uint8) for n in (40, 3000))
    g[1000:] &= g[0]
    labels = [rng.integers(-1, 20, n) for n in (40, 3000)] + [
        rng.integers(0, 3, n) for n in (40, 3000)
    ]
    expected = {
        ties: rank_distances(bits_between(q, g), *labels, ties=ties, topk=9) for ties in TIES
    }
    monkeypatch.delenv("DML_FAST_ISA", raising=False)
    levels = LEVELS[: LEVELS.index(_native.instruction_set()) + 1]
    for level, threads in product(levels, ("1", "3")):
        monkeypatch.setenv("DML_FAST_ISA", level)
        monkeypatch.setenv("DML_FAST_THREADS", threads)
        for ties in TIES:
            same_bits(rank_hamming(q, g, *labels, ties=ties, topk=9), expected[ties])


def test_tensors_and_strides_are_taken_and_long_codes_counted() -> None:
    rng = np.random.default_rng(0)
    q, g = rng.integers(0, 256, (3, 8), np.uint8), rng.integers(0, 256, (50, 8), np.uint8)
    labels = [rng.integers(0, 3, n) for n in (3, 50, 3, 50)]
    expected = rank_hamming(q, g, *labels)
    same_bits(rank_hamming(torch.from_numpy(q), np.asfortranarray(g), *labels), expected)
    zeros, ones = np.zeros((1, 8184), np.uint8), np.full((1, 8184), 255, np.uint8)
    both = np.concatenate([ones, zeros])
    assert rank_hamming(zeros, both, [1], [2, 1], [0], [1, 1]).mAP == 1
    assert rank_hamming(zeros, both, [1], [1, 2], [0], [1, 1]).mAP == 0.5


@pytest.mark.parametrize(
    ("q", "g", "message"),
    [
        (np.zeros((1, 8), np.uint8), np.zeros((1, 4), np.uint8), "8 bytes and gallery of 4"),
        (np.zeros((1, 4), np.uint8), np.zeros((1, 3), np.uint8), "4 bytes and gallery of 3"),
        (np.zeros((1, 8)), np.zeros((1, 8), np.uint8), "query has type float64: pass uint8"),
        (np.zeros((1, 8), bool), np.zeros((1, 8), np.uint8), "query has type bool: pass uint8"),
        (np.zeros((1, 8), np.uint8), np.zeros((0, 8), np.uint8), r"gallery has shape \(0, 8\)"),
        (np.zeros((1, 8185), np.uint8), np.zeros((1, 8), np.uint8), "of 8185 bytes: 8184 are"),
    ],
)
def test_mistakes_are_told_in_one_sentence(q: Any, g: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rank_hamming(q, g, [1], [1] * len(g), [0], [1] * len(g))
