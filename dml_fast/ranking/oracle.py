"""The definitions of all scores in plain numpy, by sorting and enumeration, for the tests."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def rank_query(
    d: Array, match: Array, identity: Array, *, ties: str, max_rank: int, single_shot: bool = False
) -> dict[str, Any]:
    """Score one query from its valid gallery items alone; tie groups must be small.

    Args:
        d: (G,) distances.
        match: (G,) whether an item is a match; at least one is.
        identity: (G,) of the items.
        ties: the rule.
        max_rank: length of ``first_at`` and ``hits_at``.
        single_shot: ``first_at`` is the mean over all draws of one image per identity.
    """
    groups = [np.flatnonzero((d == v) | ((d != d) & (v != v))) for v in np.unique(d)]
    matches, before, found = int(match.sum()), 0, 0
    score = dict.fromkeys(("ap", "ap_trapezoid", "r_precision", "map_at_r"), 0.0)
    score |= {"tied": 0.0, "inp": 0.0, "first_rank": 0.0, "mrr": 0.0}
    first_at, hits_at = np.zeros(len(d) + 1), np.zeros(len(d) + 1)
    for group in groups:
        orders = list(places(match[group], ties))
        score["tied"] = max(score["tied"], float(match[group].any() and not match[group].all()))
        for order in orders:
            for i, place in enumerate(order):
                rank, hits, share = before + place + 1, found + i + 1, 1 / len(orders)
                above = (hits - 1) / (rank - 1) if rank > 1 else 1.0
                score["ap"] += share * hits / rank / matches
                score["ap_trapezoid"] += share * (hits / rank + above) / 2 / matches
                score["r_precision"] += share * (rank <= matches) / matches
                score["map_at_r"] += share * (rank <= matches) * hits / rank / matches
                hits_at[rank] += share
                if hits == 1:
                    score["first_rank"] += share * rank
                    score["mrr"] += share / rank
                    first_at[rank] += share
                if hits == matches:
                    score["inp"] += share * matches / rank
        before, found = before + len(group), found + int(match[group].sum())
    if single_shot:
        first_at = draw_all(d, match, identity, ties)
    pad = np.zeros(max_rank)
    curves = {"first_at": first_at, "hits_at": hits_at}
    return score | {k: np.concatenate([v[1:], pad])[:max_rank] for k, v in curves.items()}


def places(match: Array, ties: str) -> Iterator[tuple[int, ...]]:
    """Yield the equally likely sets of places that the matches of a tie group may take."""
    n, r = len(match), int(match.sum())
    if ties == "expected":
        yield from combinations(range(n), r)
    elif ties == "stable":
        yield tuple(np.flatnonzero(match).tolist())
    else:
        yield tuple(range(r)) if ties == "optimistic" else tuple(range(n - r, n))


def draw_all(d: Array, match: Array, identity: Array, ties: str) -> Array:
    """Return the (G + 1,) chances of each rank of the one match, over all draws per identity."""
    draws = list(product(*(np.flatnonzero(identity == i) for i in np.unique(identity))))
    first_at = np.zeros(len(d) + 1)
    for draw in draws:
        picked = np.sort(np.array(draw))  # by gallery index
        score = rank_query(d[picked], match[picked], identity[picked], ties=ties, max_rank=len(d))
        first_at[1:] += score["first_at"] / len(draws)
    return first_at


def valid_items(
    g_pids: Array, g_cams: Array, pid: int, cam: int, *, junk_pid: int | None, camera_rule: bool
) -> Array:
    """Return (G,) which gallery items count for a query of this identity and camera."""
    keep: Array = np.ones(len(g_pids), bool) if junk_pid is None else g_pids != junk_pid
    same = (g_pids == pid) & (g_cams == cam) & camera_rule
    return np.asarray(keep & ~same)


def dot(a: Array, b: Array) -> Array:
    """Return float64 dot products over the last axis, in the order of csrc/simd.hpp: 32 sums."""
    product_ = a.astype(np.float64) * b.astype(np.float64)
    pad = -product_.shape[-1] % 32
    product_ = np.pad(product_, [(0, 0)] * (product_.ndim - 1) + [(0, pad)])
    lanes = np.zeros((*product_.shape[:-1], 32))
    for i in range(0, product_.shape[-1], 32):
        lanes = lanes + product_[..., i : i + 32]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]
