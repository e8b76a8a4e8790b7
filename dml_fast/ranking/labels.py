"""Which gallery items are valid for which query, and which are its matches."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml_fast.errors import UserError, brief
from dml_fast.ranking.inputs import ArrayLike, Ints, as_ids, as_numpy, comparable
from dml_fast.ranking.protocol import JunkPid

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
    junk_pid: JunkPid,
    camera_rule: bool,
    count_invalid: bool = False,
    without_cameras: str = "camera_rule=False",
) -> Labels:
    """Number the identities and sort the gallery by them.

    Args:
        q_pids: (Q,) as in `rank_distances`, with all that follows.
        g_pids: (G,).
        q_cams: (Q,).
        g_cams: (G,).
        queries: Q.
        items: G.
        junk_pid: see there.
        camera_rule: see there.
        count_invalid: see there.
        without_cameras: what an error tells the caller to give for a search without cameras.

    Raises:
        UserError: lengths or types do not fit, cameras are missing, or no query has a match and
            ``count_invalid`` is not set.
    """
    q, g = as_ids(q_pids, "q_pids", queries), as_ids(g_pids, "g_pids", items)
    q, g = comparable(q, g, "q_pids", "g_pids")
    is_junk = junk_mask(as_numpy(g_pids, "g_pids"), junk_pid)
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
        if q_cams is None or g_cams is None:
            missing = "q_cams" if q_cams is None else "g_cams"
            raise UserError(
                f"{missing} is missing: pass cameras, or {without_cameras} to rank without them"
            )
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
    if not count_invalid:
        _check_matches(labels, without_cameras)
    return labels


def check_search(
    q_pids: ArrayLike,
    g_pids: ArrayLike,
    q_cams: ArrayLike | None,
    g_cams: ArrayLike | None,
    *,
    camera_rule: bool,
    without_cameras: str,
) -> None:
    """Check that a query has a match, before anything is computed for the search.

    Args:
        q_pids: (Q,) as in `rank_distances`; identity -1 is junk.
        g_pids: (G,).
        q_cams: (Q,).
        g_cams: (G,).
        camera_rule: see there.
        without_cameras: what an error tells the user to give for a search without cameras.

    Raises:
        UserError: none has, or types do not fit.
    """
    make_labels(
        q_pids,
        g_pids,
        q_cams,
        g_cams,
        queries=len(q_pids),
        items=len(g_pids),
        junk_pid=-1,
        camera_rule=camera_rule,
        without_cameras=without_cameras,
    )


def junk_mask(g_pids: NDArray[Any], junk_pid: JunkPid) -> NDArray[np.bool_]:
    """Return (G,) which gallery items are junk, compared in the type of ``g_pids`` (G,).

    A number is its decimal digits among strings and bytes. Among unsigned integers a negative one
    is what ``astype`` makes of it: -1 is the largest.

    Raises:
        UserError: a string among integers, bytes among strings, or another type.
    """
    if junk_pid is None:
        return np.zeros(len(g_pids), bool)
    dtype = g_pids.dtype
    whole = isinstance(junk_pid, int | np.integer)
    if dtype.kind == "S" and (whole or isinstance(junk_pid, str | bytes)):
        text = junk_pid if isinstance(junk_pid, bytes) else str(junk_pid).encode()
        return np.asarray(g_pids == text)
    if dtype.kind in "UT" and (whole or isinstance(junk_pid, str)):
        return np.asarray(g_pids == str(junk_pid))
    if dtype.kind not in "iu" or not whole:
        asked = {"S": "bytes", "U": "a string", "T": "a string"}.get(dtype.kind, "an integer")
        raise UserError(f"junk_pid is {brief(junk_pid)} and g_pids has type {dtype}: pass {asked}")
    number, bits = int(junk_pid), 8 * dtype.itemsize
    if dtype.kind == "u" and -(2 ** (bits - 1)) <= number < 0:
        number += 2**bits
    if not np.iinfo(dtype).min <= number <= np.iinfo(dtype).max:
        return np.zeros(len(g_pids), bool)
    return np.asarray(g_pids == dtype.type(number))


def _stable_order(values: NDArray[Any]) -> NDArray[np.intp]:
    if values.dtype.kind in "iu" and len(values):
        low, high = values.min(), values.max()
        if int(high) - int(low) < 2**16:
            values = (values - low).astype(np.uint16)  # numpy sorts these by radix, 6 times as fast
    return np.argsort(values, kind="stable")


def _cameras(q_cams: ArrayLike, g_cams: ArrayLike, queries: int, items: int) -> tuple[Ints, Ints]:
    q, g = as_ids(q_cams, "q_cams", queries), as_ids(g_cams, "g_cams", items)
    q, g = comparable(q, g, "q_cams", "g_cams")
    if q.dtype != np.int64:
        numbers = np.unique(np.concatenate([q, g]), return_inverse=True)[1].astype(np.int64)
        return numbers[:queries], numbers[queries:]
    return q, g


def _check_matches(labels: Labels, without_cameras: str) -> None:
    """Refuse an evaluation without a single match, and say why there is none."""
    known = np.flatnonzero(labels.query_identity >= 0)
    if not len(known):
        junk, items = len(labels.junk), len(labels.item_identity)
        left_out = f" ({junk} of {items} gallery items are junk)" if junk else ""
        raise UserError(
            "no query has a match: none of the queries' identities is in the gallery"
            f"{left_out}; check that both number the same people alike"
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
        f"identity; give query and gallery their true cameras, or {without_cameras}"
    )
