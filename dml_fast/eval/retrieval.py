"""How well students find identities: embeddings of all images, ranked for each query."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dml_fast.data.loaders.assemble import Batch, input_of
from dml_fast.data.sets import RetrievalSet
from dml_fast.distributed.world import World
from dml_fast.engine.precision import Precision
from dml_fast.eval.checks import known_protocol
from dml_fast.eval.classification import evaluating
from dml_fast.eval.sets import SetRule, search_sets
from dml_fast.ranking.features import rank_features
from dml_fast.ranking.reranking import rerank
from dml_fast.ranking.result import RankingResult

_log = logging.getLogger("dml_fast")

Features = NDArray[np.float32]


@dataclass(frozen=True)
class Retrieval:
    """Rankings by each student's embeddings and by all of them together.

    Attributes:
        students: that of each student; None where embeddings are not finite.
        ensemble: by the concatenated embeddings of the others; None if there are none.
    """

    students: tuple[RankingResult | None, ...]
    ensemble: RankingResult | None


@torch.inference_mode()
def embed(
    models: Sequence[nn.Module], batches: Iterable[Batch], precision: Precision
) -> list[Features]:
    """Embed a set with each student; modes are restored afterwards.

    Args:
        models: K networks with ``embed(inputs (N, ...)) -> (N, D)``.
        batches: every row once, with one input for all these models or one for each.
        precision: as in training.

    Returns:
        K arrays (N, D) float32.
    """
    parts: list[list[Features]] = [[] for _ in models]
    with evaluating(models):
        for batch in batches:
            with precision.autocast():
                found = [
                    model.embed(input_of(batch.inputs, place))  # type: ignore[operator]
                    for place, model in enumerate(models)
                ]
            for part, features in zip(parts, found, strict=True):
                part.append(features.float().cpu().numpy())
    return [np.concatenate(part) if part else np.zeros((0, 0), np.float32) for part in parts]


def concatenate(features: Sequence[Features]) -> Features:
    """Return the ensemble's features: each student's at length 1, side by side.

    Thus the cosine similarity of two images is the mean of the students'.

    Args:
        features: K arrays (N, D_k).

    Returns:
        (N, sum of D_k) float32.
    """
    lengths = [np.linalg.norm(f, axis=1, keepdims=True) for f in features]
    scaled = [f / np.where(n > 0, n, 1) for f, n in zip(features, lengths, strict=True)]
    return np.concatenate(scaled, axis=1)


def search(
    features: Features,
    images: RetrievalSet,
    *,
    protocol: str = "market1501",
    reranked: bool = False,
    sets: SetRule | None = None,
    topk: int = 0,
) -> RankingResult:
    """Rank the gallery for each query by cosine distance, as Market-1501 does.

    Args:
        features: (N, D) of ``images``.
        images: their identities and cameras.
        protocol: as in `rank_distances`; cameras that are not known do not matter.
        reranked: correct the distances with mutual neighbours (`rerank`).
        sets: rank sets of images in this way, and neither re-rank nor report images.
        topk: how many nearest images to report.

    Raises:
        UserError: for the reasons of `rank_features`.
    """
    if sets is not None:
        return search_sets(features, images, sets, known_protocol(images, protocol))
    q = slice(images.queries)
    g = slice(images.queries, None)
    pids, cams = images.labels, images.cams
    rank_gallery = rerank if reranked else rank_features
    return rank_gallery(
        features[q],
        features[g],
        pids[q],
        pids[g],
        None if cams is None else cams[q],
        None if cams is None else cams[g],
        protocol=known_protocol(images, protocol),
        camera_rule=cams is not None,
        junk_pid=-1,
        topk=topk,
    )


def evaluate_retrieval(
    models: Sequence[nn.Module],
    batches: Iterable[Batch],
    images: RetrievalSet,
    precision: Precision,
    *,
    protocol: str = "market1501",
    reranked: bool = False,
    sets: SetRule | None = None,
    topk: int = 0,
    world: World | None = None,
) -> Retrieval:
    """Let each student and their ensemble search; a student that diverged finds nothing.

    Args:
        models: K networks with ``embed``.
        batches: every image of ``images`` once, in order.
        images: the queries and the gallery.
        precision: as in training.
        protocol: as in `search`.
        reranked: as in `search`.
        sets: as in `search`.
        topk: as in `search`, for the ensemble alone.
        world: the processes, as in `dml_fast.eval.classification.evaluate`; rank 0 searches.
    """
    how = {"protocol": protocol, "reranked": reranked, "sets": sets}
    if world is None or world.single:
        return _search_all(embed(models, batches, precision), images, how, topk)
    seen: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]

    def noted() -> Iterator[Batch]:
        for batch in batches:
            seen.append(batch.ids.cpu().numpy())
            yield batch

    mine = embed(models, noted(), precision)
    parts = world.gather((np.concatenate(seen), mine))
    return world.from_main(
        lambda: _search_all(_joined(parts or [], world, len(images)), images, how, topk)
    )


def _joined(
    parts: Sequence[tuple[NDArray[np.int64], list[Features]]], world: World, count: int
) -> list[Features]:
    """Return (N, D) for each of K students, from each rank's image indices and features."""
    found: list[Features] = [np.zeros((0, 0), np.float32)] * world.total
    for rank, (ids, students) in enumerate(parts):
        for k, features in zip(world.shares[rank // world.mesh.data], students, strict=True):
            if not len(ids):
                continue
            if not len(found[k]):
                found[k] = np.zeros((count, features.shape[1]), np.float32)
            found[k][ids] = features
    return found


def _search_all(
    features: Sequence[Features], images: RetrievalSet, how: dict[str, Any], topk: int
) -> Retrieval:
    whole = [bool(np.isfinite(f).all()) for f in features]
    for k in np.flatnonzero(np.logical_not(whole)).tolist():
        _log.warning("student %d's embeddings are not finite: it is left out of the search", k)
    good = [f for f, ok in zip(features, whole, strict=True) if ok]
    students = (
        search(f, images, **how) if ok else None for f, ok in zip(features, whole, strict=True)
    )
    both = search(concatenate(good), images, **how, topk=topk) if good else None
    return Retrieval(tuple(students), both)
