"""Ranking of sets of images, each set as one item."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml_fast import _native
from dml_fast.errors import UserError, check_choice, check_number
from dml_fast.machine import cores
from dml_fast.ranking.distances import Part, collect, labels_for, rank_rows
from dml_fast.ranking.features import ROW_BYTES, feature_pair, make_ranker
from dml_fast.ranking.inputs import ArrayLike, Floats, Ints, as_floats, as_ids
from dml_fast.ranking.labels import Labels, make_labels
from dml_fast.ranking.protocol import USUAL_JUNK, JunkPid, SingleShot, make_rules
from dml_fast.ranking.result import RankingResult
from dml_fast.ranking.tiles import CHUNK, Ranker

REDUCTIONS = ("min", "mean", "log_sum_exp")  # csrc/sets.hpp: enum Reduction
OTHER_REDUCTIONS = ("centroid", "mutual_information")
WITH_TEMPERATURE = ("log_sum_exp", "mutual_information")


class Sets:
    """Images grouped by a label.

    Attributes:
        offsets: (S + 1,) where each set begins in ``members``.
        members: (N,) images by set, rising within each.
        pids, cams: (S,) of each set. A set that several cameras saw has a camera number that no
            other set has. So the camera rule leaves out exactly those pairs of sets of which it
            leaves no pair of images.
    """

    def __init__(self, sets: NDArray[Any], pids: Ints, cams: Ints, name: str, unique: int) -> None:
        _, index = np.unique(sets, return_inverse=True)
        self.members = np.argsort(index, kind="stable").astype(np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(np.bincount(index))]).astype(np.int64)
        starts = self.offsets[:-1]
        self.pids, self.cams = pids[self.members[starts]], cams[self.members[starts]]
        mixed = np.flatnonzero(
            np.add.reduceat(pids[self.members] != self.pids[index[self.members]], starts)
        )
        if len(mixed):
            first = sets[self.members[starts[mixed[0]]]]
            raise UserError(f"{name} set {first} has images of several identities: give it one")
        several = np.add.reduceat(cams[self.members] != self.cams[index[self.members]], starts) > 0
        self.cams[several] = unique - np.arange(np.count_nonzero(several))

    def __len__(self) -> int:
        return len(self.offsets) - 1


def rank_sets(
    query: ArrayLike,
    gallery: ArrayLike,
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_cams: ArrayLike | None = None,
    g_cams: ArrayLike | None = None,
    *,
    q_sets: ArrayLike | None = None,
    g_sets: ArrayLike | None = None,
    reduction: str = "mean",
    temperature: float = 0.1,
    metric: str = "cosine",
    max_rank: int = 50,
    protocol: str | SingleShot = "market1501",
    ties: str = "stable",
    junk_pid: JunkPid = USUAL_JUNK,
    camera_rule: bool = True,
    count_invalid: bool = False,
    topk: int = 0,
) -> RankingResult:
    """Rank sets of images by the exact distances of their images, reduced to one for each pair.

    The camera rule and junk apply to images, before distances are reduced: of a gallery set with
    the query's identity only the images of other cameras count.

    Args:
        query: (Q, D) features of images, as in `rank_features`.
        gallery: (G, D).
        q_pids: (Q,) identities of the images; a set must have one.
        g_pids: (G,) identities.
        q_cams: (Q,) cameras.
        g_cams: (G,) cameras.
        q_sets: (Q,) which set an image belongs to, of the types of identities; None: each is its
            own.
        g_sets: (G,); None: each is its own. Results number the sets by these labels, sorted.
        reduction: ``min``, ``mean`` or ``log_sum_exp`` of the distances of all pairs of images;
            ``centroid``: the distance of the mean features (of a set with the query's identity,
            those images that the camera rule separates from all of the query set are left out); or
            ``mutual_information``: how much the query's images say, one by one, in favour of a set
            and against the others (`information_distances`).
        temperature: of ``log_sum_exp`` and ``mutual_information``, in units of the distance:
            towards 0 the former is ``min``.
        metric: ``cosine`` (1 - cosine) or ``euclidean`` (not squared).
        max_rank: this and the rest as in `rank_distances`, for sets.
        protocol: see there.
        ties: see there.
        junk_pid: see there.
        camera_rule: see there.
        count_invalid: see there.
        topk: see there; numbers of sets.

    Raises:
        UserError: a set has several identities, the reduction is unknown, and for all reasons of
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
    check_choice("reduction", reduction, (*REDUCTIONS, *OTHER_REDUCTIONS))
    check_number("temperature", temperature, "a number above 0", lambda t: 0 < t < np.inf)
    q, g = feature_pair(query, gallery)
    images = labels_for(rules, (len(q), len(g)), q_pids, g_pids, q_cams, g_cams)
    ranker = make_ranker(q, g, images, metric, 0)
    queries, items = _group(images, q_sets, g_sets, len(q), len(g))
    of_sets = make_labels(
        queries.pids,
        items.pids,
        queries.cams,
        items.cams,
        queries=len(queries),
        items=len(items),
        junk_pid=-1,
        camera_rule=rules.camera_rule,
        count_invalid=rules.count_invalid,
    )
    if reduction == "mutual_information" and np.count_nonzero(items.pids >= 0) == 1:
        warnings.warn(
            "the gallery is one set, about which no query says anything (mutual_information is 0): "
            "pass g_sets with several, or another reduction",
            UserWarning,
            stacklevel=2,
        )

    def parts() -> Iterator[Part]:
        step = max(CHUNK, ROW_BYTES // (8 * len(items)) // CHUNK * CHUNK)
        for begin in range(0, len(queries), step):
            end = min(begin + step, len(queries))
            if reduction == "centroid":
                rows = _centroid_rows(q, g, images, queries, items, metric, begin, end)
            else:
                rows = np.concatenate(
                    [
                        _set_row(ranker, images, queries, items, metric, reduction, temperature, s)
                        for s in range(begin, end)
                    ]
                )
            rows[np.isnan(rows)] = np.inf  # no pair of images is left: of_sets leaves it out
            yield rank_rows(rows, of_sets.of_queries(begin, end), rules)

    return collect(parts(), rules)


def pool_queries(
    query: ArrayLike, q_pids: ArrayLike, q_cams: ArrayLike, *, how: str = "mean"
) -> tuple[Floats, NDArray[Any], NDArray[Any]]:
    """Pool the features of all queries with one identity and camera: Market-1501's multi-query.

    Args:
        query: (Q, D) features.
        q_pids: (Q,) identities.
        q_cams: (Q,) cameras.
        how: ``mean`` or ``max``.

    Returns:
        Features (P, D), identities (P,) and cameras (P,), sorted by (identity, camera).
    """
    check_choice("how", how, ("mean", "max"))
    features = as_floats(query, "query", "(Q, D)")
    pids, cams = (
        as_ids(ids, name, len(features)) for ids, name in ((q_pids, "q_pids"), (q_cams, "q_cams"))
    )
    order = np.lexsort((cams, pids))
    pids, cams = pids[order], cams[order]
    starts = np.flatnonzero(
        np.concatenate([[True], (pids[1:] != pids[:-1]) | (cams[1:] != cams[:-1])])
    )
    if how == "max":
        pooled = np.maximum.reduceat(features[order], starts, axis=0)
    else:
        sizes = np.diff(np.append(starts, len(order)))[:, None]
        sums = np.add.reduceat(features[order].astype(np.float64), starts, axis=0)
        pooled = (sums / sizes).astype(features.dtype)
    return pooled, pids[starts], cams[starts]


def _group(
    images: Labels, q_sets: ArrayLike | None, g_sets: ArrayLike | None, q: int, g: int
) -> tuple[Sets, Sets]:
    """Return the sets of queries and of the gallery; no two sets share a camera by mistake."""
    q_cams = images.query_camera if len(images.query_camera) else np.zeros(q, np.int64)
    g_cams = images.item_camera if len(images.item_camera) else np.zeros(g, np.int64)
    _, cams = np.unique(np.concatenate([q_cams, g_cams]), return_inverse=True)  # 0 or more
    q_labels = np.arange(q) if q_sets is None else as_ids(q_sets, "q_sets", q)
    g_labels = np.arange(g) if g_sets is None else as_ids(g_sets, "g_sets", g)
    # An identity that the gallery lacks matches nothing: a number that no other has.
    q_pids = np.where(images.query_identity < 0, len(images.member_offsets), images.query_identity)
    queries = Sets(q_labels, q_pids, cams[:q].astype(np.int64), "query", -1)
    items = Sets(g_labels, images.item_identity, cams[q:].astype(np.int64), "gallery", -1 - q)
    return queries, items


def _set_row(
    ranker: Ranker,
    images: Labels,
    queries: Sets,
    items: Sets,
    metric: str,
    reduction: str,
    temperature: float,
    s: int,
) -> NDArray[np.float64]:
    """Return the (1, gallery sets) distances of query set ``s``."""
    members = queries.members[queries.offsets[s] : queries.offsets[s + 1]]
    one_by_one = reduction == "mutual_information" and len(members) > 1
    rows = np.concatenate([ranker.exact_rows(int(m), int(m) + 1) for m in members])
    rows = _distances(rows, ranker.query_norms()[members], metric)
    camera = images.query_camera
    of_members = images._replace(
        query_identity=images.query_identity[members],
        query_camera=camera[members] if len(camera) else camera,
    )
    count = len(members)
    of_queries = (np.arange(count + 1) if one_by_one else np.array([0, count]), np.arange(count))
    of_items, threads = (items.offsets, items.members), cores(shared=False)
    # of one image log_sum_exp gives the order: subtracting could only tie what differs by little
    number = REDUCTIONS.index("log_sum_exp" if reduction == "mutual_information" else reduction)
    if one_by_one:
        rows[np.isnan(rows)] = np.inf  # so that NaN means below that no pair of images is left
    reduced = _native.reduce_rows(
        rows, *of_members, *of_queries, *of_items, number, temperature, threads
    )
    return information_distances(reduced, temperature)[None] if one_by_one else reduced


def information_distances(rows: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Return the distance of a set of query images from each set of a gallery, -T i(Q; S).

    With p(q|S) = mean of exp(-d / T) over the images of S, up to a factor, image q says
    i(q; S) = log p(q|S) - log mean_S' p(q|S') about S: pointwise mutual information in nats, all
    sets being equally likely. i(Q; S) is its sum over the images of Q, which are independent given
    S. In units of the distance this is, for each image, its ``log_sum_exp`` distance from the set
    less that from all sets together.

    Args:
        rows: (n, S) ``log_sum_exp`` distances of n images from S sets; NaN where a set has no pair
            with the image. Such a pair is left out of the sum, and the set out of the mean.
        temperature: T, in units of the distance.

    Returns:
        (S,) in units of the distance; NaN for a set without any pair.
    """
    there = ~np.isnan(rows)
    known = np.where(there, rows, np.inf)
    nearest = known.min(axis=1, keepdims=True)
    with np.errstate(all="ignore"):  # a set far away weighs 0
        weights = np.where(there, np.exp((nearest - known) / temperature), 0)
        sets = np.count_nonzero(there, axis=1)[:, None]
        everywhere = nearest - temperature * np.log(weights.sum(axis=1, keepdims=True) / sets)
        everywhere[~np.isfinite(nearest)] = 0  # an image infinitely far from all sets
    distances = np.where(there, known - everywhere, 0).sum(axis=0)
    return np.where(there.any(axis=0), distances, np.nan)


def _distances(
    z: NDArray[np.float64], squared_norms: NDArray[np.float64], metric: str
) -> NDArray[np.float64]:
    """Return distances from csrc/features.hpp's z, for rows of queries with these norms."""
    squared = squared_norms[:, None]
    if metric == "cosine":
        return np.asarray(1 + z / np.sqrt(np.where(squared == 0, 1, squared)))
    return np.asarray(np.sqrt(np.maximum(squared + 2 * z, 0)))


def _centroid_rows(
    q: Floats,
    g: Floats,
    images: Labels,
    queries: Sets,
    items: Sets,
    metric: str,
    begin: int,
    end: int,
) -> NDArray[np.float64]:
    """Return the (end - begin, gallery sets) distances of centroids."""
    from_queries = _centroids(q, queries.members, queries.offsets[begin : end + 1])
    everywhere = _centroids(g, items.members, items.offsets)
    rows = _exact(from_queries, everywhere, metric)
    if not len(images.query_camera):
        return rows
    for i in range(begin, end):
        mine = queries.members[queries.offsets[i] : queries.offsets[i + 1]]
        seen = np.unique(images.query_camera[mine])
        if len(seen) > 1:
            continue  # each image of the gallery has a partner from another camera
        for s in np.flatnonzero(items.pids == queries.pids[i]):
            theirs = items.members[items.offsets[s] : items.offsets[s + 1]]
            kept = theirs[~np.isin(images.item_camera[theirs], seen)]
            if len(kept) == len(theirs):
                continue
            row = slice(i - begin, i - begin + 1)
            rows[row, s] = np.nan
            if len(kept):
                centroid = _centroids(g, kept, np.array([0, len(kept)]))
                rows[row, s] = _exact(from_queries[row], centroid, metric)[0]
    return rows


def _centroids(features: Floats, members: Ints, offsets: Ints) -> NDArray[np.float64]:
    sizes = np.diff(offsets)[:, None]
    inside = features[members[offsets[0] : offsets[-1]]].astype(np.float64)
    return np.asarray(np.add.reduceat(inside, offsets[:-1] - offsets[0], axis=0) / sizes)


def _exact(q: NDArray[np.float64], g: NDArray[np.float64], metric: str) -> NDArray[np.float64]:
    """Return the (Q, G) distances of a few features."""
    zeros, items = np.zeros(len(q), np.int64), np.arange(len(g))
    none = np.zeros(0, np.int64)
    plain = Labels(
        zeros, np.zeros(len(g), np.int64), none, none, np.array([0, len(g)]), items, none
    )
    ranker = make_ranker(q, g, plain, metric, 0)
    return _distances(ranker.exact_rows(0, len(q)), ranker.query_norms(), metric)
