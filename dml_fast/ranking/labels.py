"""Which gallery items are valid for which query, and which are its matches."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml_fast.errors import UserError
from dml_fast.ranking.inputs import ArrayLike, Ints, as_ids

NO_INTS = np.zeros(0, np.int64)


class Labels(NamedTuple):
    """Identities and cameras, in the order of the C++ functions' arguments; J junk items.

    Attributes:
        query_identity: (Q,) 0..I-1, or -1 where the gallery has none of that identity.
        item_identity: (G,) 0..I-1, or -1 for junk.
        query_camera: (Q,), or empty where cameras do not matter.
        item_camera: (G,), or empty.
        member_offsets: (I + 1,) where each identity begins in ``members``.
        members: (G - J,) gallery items by identity, rising within each.
        junk: (J,) items that are valid for no query.
    """

    query_identity: Ints
    item_identity: Ints
    query_camera: Ints
    item_camera: Ints
    member_offsets: Ints
    members: Ints
    junk: Ints

    def of_queries(self, begin: int, end: int) -> Labels:
        """Return the same gallery with the queries begin..end-1."""
        return self._replace(
            query_identity=self.query_identity[begin:end],
            query_camera=self.query_camera[begin:end],
        )


def make_labels(
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_cams: ArrayLike | None,
    g_cams: ArrayLike | None,
    *,
    queries: int,
    items: int,
    junk_pid: int | None,
    camera_rule: bool,
) -> Labels:
    """Number the identities and sort the gallery by them.

    Raises:
        UserError: lengths or types do not fit, cameras are missing, or no query has a match.
    """
    q, g = as_ids(q_pids, "q_pids", queries), as_ids(g_pids, "g_pids", items)
    _same_kind(q, g, "q_pids", "g_pids")
    is_junk = np.zeros(items, bool)
    if junk_pid is not None and g.dtype.kind != "U":
        is_junk = g == junk_pid
    kept = np.flatnonzero(~is_junk)
    by_identity = _stable_order(g[kept])
    members, ids = kept[by_identity], g[kept][by_identity]
    starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1])[: len(ids)])
    names, offsets = ids[starts], np.append(starts, len(ids))
    item_identity = np.full(items, -1, np.int64)
    item_identity[members] = np.repeat(np.arange(len(names)), np.diff(offsets))
    query_identity = np.full(queries, -1, np.int64)
    if len(names):
        place = np.minimum(np.searchsorted(names, q), len(names) - 1)
        query_identity = np.where(names[place] == q, place, -1).astype(np.int64)
    query_camera = item_camera = NO_INTS
    if camera_rule:
        query_camera, item_camera = _cameras(q_cams, g_cams, queries, items)
    labels = Labels(
        query_identity,
        item_identity,
        query_camera,
        item_camera,
        offsets.astype(np.int64),
        members.astype(np.int64),
        np.flatnonzero(is_junk).astype(np.int64),
    )
    _check_matches(labels)
    return labels


def _stable_order(values: NDArray[Any]) -> NDArray[np.intp]:
    if values.dtype.kind != "U" and len(values):
        low, high = values.min(), values.max()
        if int(high) - int(low) < 2**16:
            values = (values - low).astype(np.uint16)  # numpy sorts these by radix, 6 times as fast
    return np.argsort(values, kind="stable")


def _cameras(
    q_cams: ArrayLike | None, g_cams: ArrayLike | None, queries: int, items: int
) -> tuple[Ints, Ints]:
    if q_cams is None or g_cams is None:
        missing = "q_cams" if q_cams is None else "g_cams"
        raise UserError(
            f"{missing} is missing: pass cameras, or camera_rule=False to rank without them"
        )
    q, g = as_ids(q_cams, "q_cams", queries), as_ids(g_cams, "g_cams", items)
    _same_kind(q, g, "q_cams", "g_cams")
    if q.dtype.kind == "U":
        numbers = np.unique(np.concatenate([q, g]), return_inverse=True)[1].astype(np.int64)
        return numbers[:queries], numbers[queries:]
    return q, g


def _same_kind(q: Ints, g: Ints, q_name: str, g_name: str) -> None:
    if (q.dtype.kind == "U") != (g.dtype.kind == "U"):
        raise UserError(
            f"{q_name} has type {q.dtype} and {g_name} {g.dtype}: pass integers or strings for both"
        )


def _check_matches(labels: Labels) -> None:
    """Refuse an evaluation without a single match, and say why there is none."""
    known = np.flatnonzero(labels.query_identity >= 0)
    if not len(known):
        raise UserError(
            "no query has a match: none of the queries' identities is in the gallery; check that "
            "q_pids and g_pids number the same people alike"
        )
    if not len(labels.query_camera):
        return
    for query in known:  # mostly the first has one
        identity = labels.query_identity[query]
        same = labels.members[labels.member_offsets[identity] : labels.member_offsets[identity + 1]]
        if (labels.item_camera[same] != labels.query_camera[query]).any():
            return
    raise UserError(
        "no query has a valid match: each has the same camera as all gallery images of its "
        "identity; give query and gallery their true cameras, or camera_rule=False"
    )
