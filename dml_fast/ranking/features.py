"""Ranking from features: exact, in the memory of a few tiles, as fast as the product alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
from numpy.typing import NDArray

from dml_fast import _native
from dml_fast.errors import UserError, check_choice
from dml_fast.machine import cores
from dml_fast.ranking.distances import Part, collect, labels_for, rank_rows
from dml_fast.ranking.inputs import ArrayLike, Floats, as_floats
from dml_fast.ranking.labels import Labels
from dml_fast.ranking.protocol import USUAL_JUNK, JunkPid, Rules, SingleShot, make_rules
from dml_fast.ranking.result import RankingResult
from dml_fast.ranking.tiles import CHUNK, Ranker, Screen, Tiling, query_blocks

METRICS = ("cosine", "euclidean")
ROW_BYTES = 1 << 23  # of exact distances at a time, where whole rows are needed


def rank_features(
    query: ArrayLike,
    gallery: ArrayLike,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_cams: ArrayLike | None = None,
    g_cams: ArrayLike | None = None,
    *,
    metric: str = "cosine",
    max_rank: int = 50,
    protocol: str | SingleShot = "market1501",
    ties: str = "stable",
    junk_pid: JunkPid = USUAL_JUNK,
    camera_rule: bool = True,
    count_invalid: bool = False,
    topk: int = 0,
    tiling: Tiling | None = None,
) -> RankingResult:
    """Rank a gallery for each query by the distances of features; no matrix of them is stored.

    Every decision is that of a float64 dot product in a fixed order. It is computed only for the
    few pairs that faster products with an error bound leave open. The result has the same bits for
    any number of threads, size of tiles, instruction set and library that multiplies.

    Args:
        query: (Q, D) features. Float32 and float64 arrays and CPU tensors are read in place;
            strided and CUDA input, float16 and bfloat16 are copied first, and float32 is widened if
            the other is float64. Infinite features are allowed.
        gallery: (G, D).
        q_pids: (Q,) identities.
        g_pids: (G,) identities.
        q_cams: (Q,) cameras.
        g_cams: (G,) cameras.
        metric: ``cosine`` (a zero vector is at distance 1 from everything) or ``euclidean``.
        max_rank: see `rank_distances`, for all arguments down to ``topk``.
        protocol: see there; ``cuhk03`` computes all distances exactly, several times as slow.
        ties: see there; items tie if their float64 distances are equal, as duplicates do.
        junk_pid: see there.
        camera_rule: see there.
        count_invalid: see there.
        topk: see there.
        tiling: sizes to work in; they do not change the result.

    Raises:
        UserError: features are NaN (it says in how many rows, and in which first), dimensions
            differ, and for all reasons of `rank_distances`.
    """
    rules = make_rules(
        max_rank=max_rank,
        protocol=protocol,
        ties=ties,
        junk_pid=junk_pid,
        camera_rule=camera_rule,
        count_invalid=count_invalid,
        topk=topk,
    )
    q, g = feature_pair(query, gallery)
    labels = labels_for(rules, (len(q), len(g)), q_pids, g_pids, q_cams, g_cams)
    ranker = make_ranker(q, g, labels, metric, topk if rules.repeats < 0 else 0)
    if rules.repeats >= 0:
        return collect(_row_parts(ranker, labels, rules), rules)
    tiling = tiling or Tiling()
    screen = Screen(ranker, len(g), q.shape[1], tiling, cores(shared=False))
    return collect(_screened_parts(screen, labels, rules), rules)


def feature_pair(query: ArrayLike, gallery: ArrayLike) -> tuple[Floats, Floats]:
    """Return both sets as C-contiguous arrays of the same type.

    Raises:
        UserError: a shape or a type does not fit.
    """
    q, g = as_floats(query, "query", "(Q, D)"), as_floats(gallery, "gallery", "(G, D)")
    if q.shape[1] != g.shape[1]:
        raise UserError(
            f"query has {q.shape[1]} features and gallery {g.shape[1]}: pass the same kind for both"
        )
    if q.dtype != g.dtype:
        return q.astype(np.float64), g.astype(np.float64)
    return q, g


def make_ranker(
    q: Floats, g: Floats, labels: Labels, metric: str, topk: int, farthest: bool = False
) -> Ranker:
    """Make the C++ ranker of these features.

    Raises:
        UserError: the metric is unknown, or a feature is NaN.
    """
    if isinstance(metric, str) and metric == "hamming":
        raise UserError("metric is 'hamming': use rank_hamming, which takes binary codes")
    check_choice("metric", metric, METRICS)
    cosine = metric == "cosine"
    ranker: Ranker
    if q.dtype == np.float32:
        q32, g32 = cast("NDArray[np.float32]", q), cast("NDArray[np.float32]", g)
        ranker = _native.FeaturesF32(q32, g32, cosine, *labels, topk, farthest, cores(shared=False))
    else:
        q64, g64 = cast("NDArray[np.float64]", q), cast("NDArray[np.float64]", g)
        ranker = _native.FeaturesF64(q64, g64, cosine, *labels, topk, farthest, cores(shared=False))
    for name, norms in (("query", ranker.query_norms()), ("gallery", ranker.item_norms())):
        bad = np.flatnonzero(np.isnan(norms))
        if len(bad):
            raise UserError(
                f"{name} has NaN in {len(bad)} of its {len(norms)} rows, first in row {bad[0]}: "
                "look for a network that diverged"
            )
    return ranker


def _screened_parts(screen: Screen, labels: Labels, rules: Rules) -> Iterator[Part]:
    sizes = np.append(np.diff(labels.member_offsets), 0)  # the last is that of identity -1
    positives = sizes[labels.query_identity]
    for begin, end in query_blocks(positives, screen.dims, screen.tiling):
        screen.run(begin, end)
        yield screen.ranker.finish(rules.ties_number, rules.curve_length(screen.items))


def _row_parts(ranker: Ranker, labels: Labels, rules: Rules) -> Iterator[Part]:
    """Rank by whole rows of exact distances, some queries at a time."""
    queries, items = len(labels.query_identity), len(labels.item_identity)
    step = max(CHUNK, ROW_BYTES // (8 * items) // CHUNK * CHUNK)
    for begin in range(0, queries, step):
        end = min(begin + step, queries)
        yield rank_rows(ranker.exact_rows(begin, end), labels.of_queries(begin, end), rules)
