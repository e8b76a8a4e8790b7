"""Whatever is given for an argument, the answer is a result or one sentence."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mutations import ODD_VALUES, outcome

from dml_fast.errors import UserError
from dml_fast.eval import (
    SingleShot,
    pool_queries,
    rank_distances,
    rank_features,
    rank_hamming,
    rank_sets,
    rerank,
)

RNG = np.random.default_rng(0)
Q, G = RNG.standard_normal((6, 4)), RNG.standard_normal((30, 4))
LABELS = {
    "q_pids": np.arange(6) % 3,
    "g_pids": np.arange(30) % 3,
    "q_cams": np.zeros(6, int),
    "g_cams": np.ones(30, int),
}
FEATURES = {"query": Q, "gallery": G, **LABELS}
CODES = {"query": np.packbits(Q > 0, axis=1), "gallery": np.packbits(G > 0, axis=1), **LABELS}
GOOD: dict[Callable[..., Any], dict[str, Any]] = {
    rank_distances: {"dist": Q @ G.T, **LABELS},
    rank_features: FEATURES,
    rank_hamming: CODES,
    rank_sets: FEATURES,
    rerank: FEATURES,
    pool_queries: {"query": Q, "q_pids": LABELS["q_pids"], "q_cams": LABELS["q_cams"]},
}
ODD = (
    *ODD_VALUES, [[1], [2, 3]], object(), b"x", range(6), {1, 2}, ["a"] * 6, np.int8(3),
    np.float32(3), np.zeros(6), np.zeros((6, 0)), np.zeros(0), np.zeros((6, 30), complex),
    np.zeros((6, 4), object), np.zeros((6, 4), bool), np.array("x"), np.array([3]),
    np.zeros(6, "M8[s]"), np.zeros(6, [("a", int)]), np.zeros(6, "V1"),
    np.full((6, 30), np.inf, "f2"), np.array([1, 2, 3, 4, 5, "6"], object), torch.tensor([1, 2]),
    torch.zeros(6, 4).to_sparse(), torch.zeros(6, 4, device="meta"),
    torch.zeros(6, dtype=torch.complex64), SingleShot(None), SingleShot("x"),  # type: ignore[arg-type]
    SingleShot(3, seed=-1), SingleShot(np.zeros(3)),  # type: ignore[arg-type]
)  # fmt: skip


def arguments() -> list[tuple[Callable[..., Any], str]]:
    """All of `rank_distances`; of the others those that it lacks."""
    common = inspect.signature(rank_distances).parameters
    return [
        (rank, name)
        for rank in GOOD
        for name in inspect.signature(rank).parameters
        if name != "tiling" and (rank is rank_distances or name not in common)
    ]


@pytest.mark.parametrize(
    ("rank", "name"), arguments(), ids=lambda x: getattr(x, "__name__", str(x))
)
def test_the_answer_is_a_result_or_one_sentence(rank: Callable[..., Any], name: str) -> None:
    for odd in ODD:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome(lambda odd=odd: rank(**{**GOOD[rank], name: odd}))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"ties": "expect"}, "ties is 'expect', which is none of .*: did you mean expected"),
        ({"protocol": "market"}, "protocol is 'market', .*: did you mean market1501"),
        ({"camera_rule": np.zeros(3)}, r"camera_rule is a ndarray of shape \(3,\): give True or"),
        ({"count_invalid": "no"}, "count_invalid is 'no': give True or False"),
        ({"q_pids": [[1], [2, 3]]}, "q_pids is a list of length 2, which is no array"),
        ({"dist": torch.zeros(6, 30).to_sparse()}, "dist is a Tensor of shape .* no array"),
    ],
)
def test_the_sentence_says_what_was_given(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rank_distances(**{**GOOD[rank_distances], **rules})


def test_a_mask_is_not_ignored() -> None:
    """As numpy.asarray would."""
    hidden = np.ma.masked_array(Q @ G.T, mask=np.arange(180).reshape(6, 30) == 7)
    with pytest.raises(UserError, match=r"^dist has 1 masked entries: fill or remove them"):
        rank_distances(**{**GOOD[rank_distances], "dist": hidden})
    rank_distances(**{**GOOD[rank_distances], "dist": np.ma.masked_array(Q @ G.T)})
