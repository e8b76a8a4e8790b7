"""Re-ranking against the dense definition in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ranking_cases import LEVELS, same_bits

from benchmarks.peers.ranking import dense_rerank
from dml_fast import _native
from dml_fast.errors import UserError
from dml_fast.eval import rank_distances, rerank
from dml_fast.ranking.reranking import make_reranker


def dense(q: Any, g: Any, metric: str, k1: int, k2: int, lambda_value: float) -> Any:
    """Zhong et al. on full matrices, in float64."""
    x = np.concatenate([q, g]).astype(np.float64)
    if metric == "cosine":
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    d = ((x[:, None] - x[None]) ** 2).sum(2)
    d /= d.max(1, keepdims=True)
    order = np.argsort(d, axis=1, kind="stable")

    def mutual(i: int, k: int) -> list[int]:
        return [j for j in order[i, : k + 1] if i in order[j, : k + 1]]

    v = np.zeros_like(d)
    for i in range(len(x)):
        own = mutual(i, k1)
        members = set(own)
        for j in own:
            theirs = mutual(j, int(np.around(k1 / 2)))
            if len(set(theirs) & set(own)) > 2 / 3 * len(theirs):
                members |= set(theirs)
        chosen = sorted(members)
        v[i, chosen] = np.exp(-d[i, chosen])
        v[i] /= v[i].sum()
    v = np.stack([v[order[i, :k2]].mean(0) for i in range(len(x))])
    s = np.minimum(v[: len(q), None], v[None, len(q) :]).sum(2)
    return (1 - lambda_value) * (1 - s / (2 - s)) + lambda_value * d[: len(q), len(q) :]


def images(dtype: Any = np.float32, size: int = 150) -> tuple[Any, Any, list[Any]]:
    rng = np.random.default_rng(4)
    centres = rng.standard_normal((12, 20))
    labels = [rng.integers(0, 12, n) for n in (25, size)] + [
        rng.integers(0, 4, n) for n in (25, size)
    ]
    q, g = (centres[ids] + 1.2 * rng.standard_normal((len(ids), 20)) for ids in labels[:2])
    return q.astype(dtype), g.astype(dtype), labels


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("k1", "k2", "share"), [(20, 6, 0.3), (5, 1, 0.0), (9, 10, 1.0), (3, 2, 0.5)]
)
def test_new_distances_equal_the_dense_ones(
    metric: str, dtype: Any, k1: int, k2: int, share: float
) -> None:
    q, g, labels = images(dtype)
    expected = dense(q, g, metric, k1, k2, share)
    rows = make_reranker(np.concatenate([q, g]), len(q), metric, k1, k2, share).rows(0, len(q))
    np.testing.assert_allclose(rows, expected, rtol=0, atol=2e-6)  # codes are stored in float32
    result = rerank(q, g, *labels, k1=k1, k2=k2, lambda_value=share, metric=metric, topk=5)
    same_bits(result, rank_distances(rows, *labels, topk=5))


def test_the_benchmarks_dense_re_ranking_is_the_same_work() -> None:
    q, g, _ = images()
    rows = make_reranker(np.concatenate([q, g]), len(q), "cosine", 20, 6, 0.3).rows(0, len(q))
    np.testing.assert_allclose(dense_rerank(q, g), rows, rtol=0, atol=1e-5)


def test_re_ranking_helps_on_clusters() -> None:
    q, g, labels = images(size=400)
    plain = rerank(q, g, *labels, lambda_value=1.0)  # the original distances alone
    assert rerank(q, g, *labels).mAP > plain.mAP + 0.05


def test_the_same_bits_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    q, g, labels = images()
    monkeypatch.setenv("DML_FAST_THREADS", "1")
    expected = rerank(q, g, *labels)
    monkeypatch.setenv("DML_FAST_THREADS", "3")
    same_bits(rerank(q, g, *labels), expected)


def fixed_order(a: Any, b: Any) -> Any:
    """Dot products of all rows (csrc/simd.hpp: 32 partial sums, then added by halves)."""
    products = a.astype(np.float64)[:, None] * b.astype(np.float64)[None]
    lanes = np.zeros((*products.shape[:2], 32))
    for begin in range(0, products.shape[2], 32):
        part = products[:, :, begin : begin + 32]
        lanes[:, :, : part.shape[2]] += part
    while lanes.shape[2] > 1:
        lanes = lanes[:, :, : lanes.shape[2] // 2] + lanes[:, :, lanes.shape[2] // 2 :]
    return lanes[:, :, 0]


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("queries", "gallery", "dims"), [(67, 133, 77), (3, 64, 96), (9, 71, 5)])
def test_original_distances_have_these_bits_at_every_level(
    monkeypatch: pytest.MonkeyPatch, level: str, dtype: Any, queries: int, gallery: int, dims: int
) -> None:
    monkeypatch.delenv("DML_FAST_ISA", raising=False)
    if LEVELS.index(level) > LEVELS.index(_native.instruction_set()):
        pytest.skip(f"this CPU has no {level}")
    monkeypatch.setenv("DML_FAST_ISA", level)
    rng = np.random.default_rng(dims)
    x = rng.standard_normal((queries + gallery, dims)).astype(dtype)
    product = fixed_order(x, x)
    squared = np.diag(product)
    largest = squared + 2 * (0.5 * squared - product).max(1)
    d = np.maximum(0, squared[:, None] + squared - 2 * product)
    expected = (1 / largest)[:, None] * d
    rows = make_reranker(x, queries, "euclidean", 5, 2, 1.0).rows(0, queries)
    np.testing.assert_array_equal(rows, expected[:queries, queries:])


def test_duplicates_and_collapsed_features_are_no_division_by_zero() -> None:
    q, g, labels = images()
    same = rerank(np.ones_like(q), np.ones_like(g), *labels)
    assert np.isfinite(same.mAP) and same.n_tied == same.n_valid
    zeros = rerank(np.zeros_like(q), np.zeros_like(g), *labels, metric="euclidean")
    assert np.isfinite(zeros.mAP)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"k1": 175}, r"k1 is 175: with 175 images it must be in 1\.\.174"),
        ({"k1": 175}, "k1 is 175"),
        ({"k2": 22}, r"k2 is 22: with k1=20 it must be in 1\.\.21"),
        ({"lambda_value": 1.5}, r"lambda_value is 1\.5"),
        ({"lambda_value": float("nan")}, "lambda_value is nan"),
        ({"metric": "l1"}, "metric is 'l1', which is none of"),
    ],
)
def test_mistakes_are_told_in_one_sentence(rules: dict[str, Any], message: str) -> None:
    q, g, labels = images()
    with pytest.raises(UserError, match=message):
        rerank(q, g, *labels, **rules)


def test_infinite_features_are_refused() -> None:
    q, g, labels = images()
    g[7, 2] = np.inf
    with pytest.raises(UserError, match=r"1 features are infinite .* first in row gallery 7"):
        rerank(q, g, *labels)
