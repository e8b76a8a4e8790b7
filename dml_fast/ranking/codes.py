"""Ranking of binary codes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dml_fast import _native
from dml_fast.errors import UserError
from dml_fast.machine import cores
from dml_fast.ranking.distances import collect, labels_for
from dml_fast.ranking.inputs import ArrayLike, as_numpy
from dml_fast.ranking.labels import NO_INTS, Labels
from dml_fast.ranking.protocol import USUAL_JUNK, JunkPid, SingleShot, make_rules
from dml_fast.ranking.result import RankingResult

MOST_BYTES = 8 * 1023  # distances are counted in 16 bits


def rank_hamming(
    query: ArrayLike,
    gallery: ArrayLike,
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
    """Rank a gallery for each query by the number of bits in which their codes differ.

    Such distances tie often. With ``ties="expected"`` the scores do not depend on the gallery's
    order.

    Args:
        query: (Q, B) uint8, 8 bits in each byte (``np.packbits(bits, axis=1)``). Codes whose length
            is a multiple of 8 bytes are read in place, others are copied and padded.
        gallery: (G, B) uint8.
        q_pids: (Q,) identities; this and the rest as in `rank_distances`.
        g_pids: (G,) identities.
        q_cams: (Q,) cameras.
        g_cams: (G,) cameras.
        max_rank: see there.
        protocol: see there.
        ties: see there.
        junk_pid: see there.
        camera_rule: see there.
        count_invalid: see there.
        topk: see there.

    Raises:
        UserError: codes are not uint8, longer than 8,184 bytes or of different lengths, and for all
            reasons of `rank_distances`.
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
    q, g = _words(query, "query", "(Q, B)"), _words(gallery, "gallery", "(G, B)")
    lengths = [as_numpy(*codes).shape[1] for codes in ((query, "query"), (gallery, "gallery"))]
    if lengths[0] != lengths[1]:
        raise UserError(
            f"query has codes of {lengths[0]} bytes and gallery of {lengths[1]}: pass the same "
            "kind for both"
        )
    labels = labels_for(rules, (len(q), len(g)), q_pids, g_pids, q_cams, g_cams)
    kept = np.flatnonzero(labels.item_identity >= 0)
    if len(kept) < len(g):
        g, labels = g[kept], _without_junk(labels, kept)
    length = rules.curve_length(len(g))
    rest = (length, rules.topk, rules.repeats, rules.seed, cores(shared=False))
    part = _native.rank_codes(q, g, *labels, rules.ties_number, *rest)
    nearest = np.where(part[3] >= 0, kept[part[3]], -1)
    return collect([(*part[:3], nearest, 0)], rules)


def _words(codes: ArrayLike, name: str, shape: str) -> NDArray[np.uint64]:
    """Return the codes as (N, ceil(B / 8)) words, padded with zero bits."""
    array = as_numpy(codes, name)
    if array.ndim != 2 or 0 in array.shape:
        raise UserError(f"{name} has shape {array.shape}: pass {shape} codes, at least one")
    if array.dtype != np.uint8:
        raise UserError(f"{name} has type {array.dtype}: pass uint8, see np.packbits(bits, axis=1)")
    if array.shape[1] > MOST_BYTES:
        raise UserError(f"{name} has codes of {array.shape[1]} bytes: {MOST_BYTES} are the most")
    missing = -array.shape[1] % 8
    if missing:
        array = np.pad(array, ((0, 0), (0, missing)))
    return np.require(np.ascontiguousarray(array).view(np.uint64), requirements=["A"])


def _without_junk(labels: Labels, kept: NDArray[np.int64]) -> Labels:
    """Return the labels of the kept items, which are numbered anew."""
    camera = labels.item_camera
    return labels._replace(
        item_identity=labels.item_identity[kept],
        item_camera=camera[kept] if len(camera) else camera,
        members=np.searchsorted(kept, labels.members).astype(np.int64),
        junk=NO_INTS,
    )
