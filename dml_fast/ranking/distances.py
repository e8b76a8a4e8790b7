"""Ranking from a matrix of distances."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from dml_fast import _native
from dml_fast.machine import cores
from dml_fast.ranking.inputs import ArrayLike, Floats, Ints, as_floats, as_numpy
from dml_fast.ranking.labels import Labels, make_labels
from dml_fast.ranking.protocol import (
    USUAL_JUNK,
    JunkPid,
    Rules,
    SingleShot,
    UsualJunk,
    make_rules,
)
from dml_fast.ranking.result import RankingResult, make_result

# Scores, first_at, hits_at, topk and the number of NaNs of some consecutive queries.
Part: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], Ints, int]


def rank_distances(
    dist: ArrayLike,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_cams: ArrayLike | None = None,
    g_cams: ArrayLike | None = None,
    *,
    max_rank: int = 50,
    protocol: str | SingleShot = "market1501",
    ties: str = "stable",
    junk_pid: JunkPid = USUAL_JUNK,
    camera_rule: bool = True,
    count_invalid: bool = False,
    topk: int = 0,
) -> RankingResult:
    """Rank a gallery for each query from their distances, without sorting it.

    Args:
        dist: (Q, G) distances, smaller is nearer, compared in their own precision. Numpy arrays and
            CPU tensors are read in place; strided ones, CUDA tensors, float16, bfloat16 and
            integers are copied first. NaN comes last, with one warning; +-inf is allowed.
        q_pids: (Q,) identities: integers of any type, strings or bytes.
        g_pids: (G,) identities; 0 is an ordinary one (a distractor).
        q_cams: (Q,) cameras, of the same types; not needed without the camera rule.
        g_cams: (G,) cameras.
        max_rank: length of ``cmc`` and ``precision``.
        protocol: ``market1501``: items with the identity and the camera of the query are left out;
            ``cuhk03``: that, and ``cmc`` is the exact mean over all draws of one gallery image
            per identity (`SingleShot` draws them); ``all``: cameras do not matter.
        ties: the order of items at the same distance. ``stable``: by gallery index;
            ``expected``: the exact mean over all orders; ``optimistic``: matches first;
            ``pessimistic``: matches last.
        junk_pid: gallery items of this identity are dropped; None drops none. It is compared in
            the identities' own type: -1 is also ``"-1"``, and the largest number of an unsigned
            type. If it is left out, a warning counts what was dropped.
        camera_rule: False keeps items with the identity and the camera of the query.
        count_invalid: whether queries without a valid match score 0; otherwise they are left out.
        topk: how many of the nearest valid gallery items of each query to report.

    Raises:
        UserError: shapes, lengths or types do not fit, an argument is unknown, or no query has a
            valid match.
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
    rows = as_floats(dist, "dist", "(Q, G)")
    labels = labels_for(rules, (len(rows), rows.shape[1]), q_pids, g_pids, q_cams, g_cams)
    return collect([rank_rows(rows, labels, rules)], rules)


def labels_for(
    rules: Rules,
    shape: tuple[int, int],
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_cams: ArrayLike | None,
    g_cams: ArrayLike | None,
) -> Labels:
    """Number the identities and cameras of Q, G = ``shape`` items, following the rules.

    It warns of junk that nobody asked to drop; so a function that the user calls must call it.
    """
    rules.check_memory(*shape)
    labels = make_labels(
        q_pids,
        g_pids,
        q_cams,
        g_cams,
        queries=shape[0],
        items=shape[1],
        junk_pid=rules.junk_pid,
        camera_rule=rules.camera_rule,
        count_invalid=rules.count_invalid,
    )
    if isinstance(rules.junk_pid, UsualJunk) and len(labels.junk):
        junk = as_numpy(g_pids, "g_pids")[labels.junk[0]]
        warnings.warn(
            f"{len(labels.junk)} of {shape[1]} gallery items are of identity {junk} and left out "
            "as junk: pass junk_pid=-1 if that is meant, None to keep them",
            UserWarning,
            stacklevel=3,
        )
    return labels


def rank_rows(rows: Floats, labels: Labels, rules: Rules) -> Part:
    """Score the queries whose distances are the (Q, G) rows, in C++."""
    length = rules.curve_length(rows.shape[1])
    rest = (length, rules.topk, rules.repeats, rules.seed, cores(shared=False))
    if rows.dtype == np.float32:
        single = cast("NDArray[np.float32]", rows)
        return _native.rank_rows_f32(single, *labels, rules.ties_number, *rest)
    double = cast("NDArray[np.float64]", rows)
    return _native.rank_rows_f64(double, *labels, rules.ties_number, *rest)


def collect(parts: Iterable[Part], rules: Rules) -> RankingResult:
    """Put the parts of all queries, in their order, into one result; warn of NaNs once.

    The number of queries of each part but the last must be a multiple of 16 (`CHUNK` in
    csrc/ranking.hpp). Then the sums have the same bits for any number of parts.
    """
    scores, first_at, hits_at, topk, nans = zip(*parts, strict=True)
    if total := sum(nans):
        warnings.warn(f"{total} distances are NaN: they are ranked last", UserWarning, stacklevel=3)
    return make_result(
        np.concatenate(scores),
        np.concatenate(first_at),
        np.concatenate(hits_at),
        np.concatenate(topk),
        max_rank=rules.max_rank,
        ties=rules.ties,
        protocol=rules.protocol,
        count_invalid=rules.count_invalid,
    )
