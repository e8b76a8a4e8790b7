"""Re-ranking with k-reciprocal neighbours (Zhong et al., CVPR 2017), linear in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from dml_fast import _native
from dml_fast.errors import UserError, check_number, check_whole
from dml_fast.machine import cores
from dml_fast.ranking.distances import Part, collect, labels_for, rank_rows
from dml_fast.ranking.features import ROW_BYTES, feature_pair, make_ranker
from dml_fast.ranking.inputs import ArrayLike, Floats
from dml_fast.ranking.labels import NO_INTS, Labels
from dml_fast.ranking.protocol import USUAL_JUNK, JunkPid, SingleShot, make_rules
from dml_fast.ranking.result import RankingResult
from dml_fast.ranking.tiles import CHUNK, Screen, Tiling, query_blocks

K1 = 20  # the paper's size of a neighbourhood

Reranker: TypeAlias = "_native.RerankF32 | _native.RerankF64"


def rerank(
    query: ArrayLike,
    gallery: ArrayLike,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_cams: ArrayLike | None = None,
    g_cams: ArrayLike | None = None,
    *,
    k1: int = K1,
    k2: int = 6,
    lambda_value: float = 0.3,
    metric: str = "cosine",
    max_rank: int = 50,
    protocol: str | SingleShot = "market1501",
    ties: str = "stable",
    junk_pid: JunkPid = USUAL_JUNK,
    camera_rule: bool = True,
    count_invalid: bool = False,
    topk: int = 0,
) -> RankingResult:
    """Rank by distances corrected with the images' mutual neighbours.

    Defaults and results are those of the paper's code, except for its float16. All images, junk
    included, may be neighbours. Distances are squared and divided by the largest in each row. Only
    a few neighbours of each image are stored, and the new distances of a few queries at a time.

    Args:
        query: (Q, D) features, as in `rank_features`.
        gallery: (G, D).
        q_pids: (Q,) identities; this and the rest as in `rank_distances`.
        g_pids: (G,) identities.
        q_cams: (Q,) cameras.
        g_cams: (G,) cameras.
        k1: size of a neighbourhood.
        k2: how many nearest images' codes are averaged.
        lambda_value: share of the original distance, 0..1.
        metric: ``cosine`` or ``euclidean``.
        max_rank: see there.
        protocol: see there.
        ties: see there.
        junk_pid: see there.
        camera_rule: see there.
        count_invalid: see there.
        topk: see there.

    Raises:
        UserError: k1, k2 or lambda_value do not fit, a feature is infinite, and for all reasons of
            `rank_features`.
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
    images = cast("Floats", np.concatenate([q, g]))
    reranker = make_reranker(images, len(q), metric, k1, k2, lambda_value)

    def parts() -> Iterator[Part]:
        step = max(CHUNK, ROW_BYTES // (8 * len(g)) // CHUNK * CHUNK)
        for begin in range(0, len(q), step):
            end = min(begin + step, len(q))
            yield rank_rows(reranker.rows(begin, end), labels.of_queries(begin, end), rules)

    return collect(parts(), rules)


def make_reranker(
    images: Floats, queries: int, metric: str, k1: int, k2: int, lambda_value: float
) -> Reranker:
    """Make the C++ re-ranker of N images, the queries first.

    Raises:
        UserError: as `rerank`.
    """
    count = len(images)
    for name, number in (("k1", k1), ("k2", k2)):
        check_whole(name, number, 1)
    if k1 >= count:
        raise UserError(f"k1 is {k1}: with {count} images it must be in 1..{count - 1}")
    if k2 > k1 + 1:
        raise UserError(f"k2 is {k2}: with k1={k1} it must be in 1..{k1 + 1}")
    check_number("lambda_value", lambda_value, "a number from 0 to 1", lambda x: 0 <= x <= 1)
    # No image matches another and none is left out: a plain search for neighbours.
    unmatched, zero = np.full(count, -1, np.int64), np.zeros(count, np.int64)
    offsets, members = np.array([0, count]), np.arange(count)
    plain = Labels(unmatched, zero, NO_INTS, NO_INTS, offsets, members, NO_INTS)
    ranker = make_ranker(images, images, plain, metric, k1 + 1, farthest=True)
    infinite = np.flatnonzero(np.isinf(ranker.item_norms()))
    if len(infinite):
        row = int(infinite[0])
        where = f"query {row}" if row < queries else f"gallery {row - queries}"
        raise UserError(
            f"{len(infinite)} features are infinite or too large to be squared, first in row "
            f"{where}: rescale them"
        )
    tiling = Tiling()
    screen = Screen(ranker, count, images.shape[1], tiling, cores(shared=False))
    found = []
    for begin, end in query_blocks(zero, images.shape[1], tiling):
        screen.run(begin, end)
        found.append(ranker.neighbours())
    nearest, farthest = (np.concatenate(columns) for columns in zip(*found, strict=True))
    del ranker, screen
    cosine, rest = metric == "cosine", (k1, k2, lambda_value, cores(shared=False))
    if images.dtype == np.float32:
        single = cast("NDArray[np.float32]", images)
        return _native.RerankF32(single, queries, cosine, nearest, farthest, *rest)
    double = cast("NDArray[np.float64]", images)
    return _native.RerankF64(double, queries, cosine, nearest, farthest, *rest)
