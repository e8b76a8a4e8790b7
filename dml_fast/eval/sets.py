"""Which images of a search belong together, each set as one item."""

from __future__ import annotations

import logging
import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml_fast.data.sets import RetrievalSet
from dml_fast.ranking.result import RankingResult
from dml_fast.ranking.sets import WITH_TEMPERATURE, rank_sets

DISTRACTOR = 0  # Zheng et al., ICCV 2015

_log = logging.getLogger("dml_fast")


class SetRule(NamedTuple):
    """How the distances of the images of two sets become one.

    Attributes:
        reduction: as in `rank_sets`.
        temperature: as there.
    """

    reduction: str
    temperature: float


def sets_of(images: RetrievalSet) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return to which set each query (Q,) and each image of the gallery (G,) belongs.

    An identity that one camera saw is a set of queries; an identity is a set of the gallery.
    Distractors, which are of nobody in particular, are a set each: images of identity 0, unless
    queries have it. Junk (-1) is one set, which is left out of a search.
    """
    q_pids, g_pids = images.labels[: images.queries], images.labels[images.queries :]
    seen = q_pids[None] if images.cams is None else np.stack([q_pids, images.cams[: len(q_pids)]])
    _, of_queries = np.unique(seen, axis=1, return_inverse=True)
    of_items = g_pids.copy()
    if DISTRACTOR not in q_pids:
        distractors = np.flatnonzero(g_pids == DISTRACTOR)
        of_items[distractors] = g_pids.max() + 1 + np.arange(len(distractors))
    return of_queries.reshape(-1).astype(np.int64), of_items


def search_sets(
    features: NDArray[Any], images: RetrievalSet, rule: SetRule, protocol: str
) -> RankingResult:
    """Rank the sets of the gallery for each set of queries, by cosine distance.

    Args:
        features: (N, D) of ``images``.
        images: their identities and cameras.
        rule: how sets are compared.
        protocol: market1501, or all, where cameras do not matter.

    Raises:
        UserError: for the reasons of `rank_sets`.
    """
    q, g = slice(images.queries), slice(images.queries, None)
    pids, cams = images.labels, images.cams
    q_sets, g_sets = sets_of(images)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the gallery is one set")  # `set_facts` says so once
        return rank_sets(
            features[q],
            features[g],
            pids[q],
            pids[g],
            None if cams is None else cams[q],
            None if cams is None else cams[g],
            q_sets=q_sets,
            g_sets=g_sets,
            reduction=rule.reduction,
            temperature=rule.temperature,
            protocol=protocol,
            camera_rule=cams is not None,
            junk_pid=-1,
        )


def set_facts(images: RetrievalSet, rule: SetRule) -> dict[str, Any]:
    """Return what a result says about its sets: the rule, and how many there are."""
    q_sets, g_sets = sets_of(images)
    items = len(np.unique(g_sets[g_sets >= 0]))
    if items == 1 and rule.reduction == "mutual_information":
        _log.warning(
            "the gallery is one set, about which no query says anything: give another --reduction"
        )
    return {
        "reduction": rule.reduction,
        "temperature": rule.temperature if rule.reduction in WITH_TEMPERATURE else None,
        "queries": len(np.unique(q_sets)),
        "gallery": items,
    }
