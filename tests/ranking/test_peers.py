"""Other people's evaluations on data without ties, where they are installed."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from benchmarks.peers.ranking import installed, torchreid_rerank
from dml_fast.eval import rank_distances
from dml_fast.ranking.reranking import make_reranker


def evaluation() -> tuple[Any, tuple[Any, Any, Any, Any]]:
    """Rows longer than the curve, as the peers want them, and no ties."""
    rng = np.random.default_rng(0)
    labels = tuple(rng.integers(0, most, n) for most, n in ((9, 40), (9, 300), (4, 40), (4, 300)))
    return rng.permutation(40 * 300).reshape(40, 300).astype(np.float32), labels


def valid(labels: tuple[Any, ...], query: int) -> Any:
    q_pids, g_pids, q_cams, g_cams = labels
    return (g_pids != q_pids[query]) | (g_cams != q_cams[query])


def test_ap_equals_scikit_learns() -> None:
    dist, labels = evaluation()
    result = rank_distances(dist, *labels)
    for query, row in enumerate(dist):
        keep = valid(labels, query)
        expected = average_precision_score(labels[1][keep] == labels[0][query], -row[keep])
        assert result.ap[query] == pytest.approx(expected, abs=1e-12)


def test_ap_and_reciprocal_rank_equal_torchmetrics() -> None:
    retrieval = pytest.importorskip("torchmetrics.functional.retrieval")
    dist, labels = evaluation()
    result = rank_distances(dist, *labels)
    for query, row in enumerate(dist):
        keep = valid(labels, query)
        match = torch.from_numpy(labels[1][keep] == labels[0][query])
        scores = torch.from_numpy(20_000 - row[keep])  # it drops scores of 0 and less
        ap = retrieval.retrieval_average_precision(scores, match)
        assert result.ap[query] == pytest.approx(float(ap), abs=1e-6)
        first = retrieval.retrieval_reciprocal_rank(scores, match)
        assert 1 / result.first_rank[query] == pytest.approx(float(first), abs=1e-6)


def peer(*names: str) -> Any:
    """The first of these modules that is installed, or the test is skipped."""
    for name in names[:-1]:
        if find_module(name):
            return importlib.import_module(name)
    return pytest.importorskip(names[-1])


def find_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def test_map_and_cmc_equal_torchreids() -> None:
    rank = peer("torchreid.metrics.rank", "torchreid.reid.metrics.rank")
    dist, labels = evaluation()
    cmc, mean = rank.eval_market1501(dist, *labels, 50)
    result = rank_distances(dist, *labels)
    assert result.mAP == pytest.approx(float(mean), abs=1e-6)
    np.testing.assert_allclose(result.cmc, cmc, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "names",
    [
        ("torchreid.metrics.rank_cylib.rank_cy", "torchreid.reid.metrics.rank_cylib.rank_cy"),
        ("fastreid.evaluation.rank_cylib.rank_cy",),
    ],
)
def test_map_and_cmc_equal_those_in_cython(names: tuple[str, ...]) -> None:
    rank = peer(*names)
    dist, labels = evaluation()
    cmc, ap, *inp = rank.evaluate_cy(dist, *labels, 50)  # torchreid's is the mean AP
    result = rank_distances(dist, *labels)
    assert result.mAP == pytest.approx(float(np.mean(ap)), abs=1e-6)
    if inp:
        assert result.mINP == pytest.approx(float(np.mean(inp[0])), abs=1e-6)
    np.testing.assert_allclose(result.cmc, cmc, rtol=0, atol=1e-6)


def test_map_minp_and_cmc_equal_fast_reids() -> None:
    rank = peer("fastreid.evaluation.rank")
    dist, labels = evaluation()
    cmc, ap, inp = rank.eval_market1501(dist, *labels, 50)
    result = rank_distances(dist, *labels)
    assert result.mAP == pytest.approx(float(np.mean(ap)), abs=1e-6)
    assert result.mINP == pytest.approx(float(np.mean(inp)), abs=1e-6)
    np.testing.assert_allclose(result.cmc, cmc, rtol=0, atol=1e-6)


def test_re_ranking_equals_torchreids() -> None:
    if not installed(torchreid_rerank):
        pytest.skip("torchreid is not installed")
    rng = np.random.default_rng(0)
    people = rng.integers(0, 30, 400)
    x = rng.standard_normal((30, 64))[people] + 0.8 * rng.standard_normal((400, 64))
    q, g = np.split(x.astype(np.float32), [90])
    ours = make_reranker(np.concatenate([q, g]), 90, "cosine", 20, 6, 0.3).rows(0, 90)
    np.testing.assert_allclose(torchreid_rerank(q, g), ours, rtol=0, atol=2e-5)
