"""Average precision of each class, where rows may have several labels, or none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dml_fast.data.loaders.assemble import Batch, input_of
from dml_fast.distributed.world import World
from dml_fast.engine.precision import Precision
from dml_fast.eval.classification import evaluating

Shares = NDArray[np.float64]


@dataclass(frozen=True)
class LabelScores:
    """How well one student, or the ensemble, tells labels; None where its numbers are not finite.

    Attributes:
        mAP: the mean of the classes' average precisions, in 0..1.
        exact: the share of rows whose labels are all right: a probability above 0.5 is a label.
        ap: of each of C classes its average precision; None for a class that no row has.
    """

    mAP: float | None
    exact: float | None
    ap: tuple[float | None, ...]


@dataclass(frozen=True)
class Labelled:
    """What was found on a set of rows.

    Attributes:
        students: the scores of each student.
        ensemble: those of the mean of the students' probabilities.
        images: how many rows were counted.
        absent: the classes that no row has, which are left out of the means.
    """

    students: tuple[LabelScores, ...]
    ensemble: LabelScores
    images: int
    absent: tuple[int, ...]


def average_precisions(scores: NDArray[Any], labels: NDArray[Any]) -> Shares:
    """Return the average precision of each class, as scikit-learn's ``average_precision_score``.

    It is the sum over the thresholds of (R_n - R_(n-1)) P_n, without interpolation; rows of equal
    scores share a threshold.

    Args:
        scores: (N, C), finite; more is likelier.
        labels: (N, C), 0 or 1.

    Returns:
        (C,) float64 in 0..1, NaN for a class that no row has.
    """
    found = np.full(labels.shape[1], np.nan)
    for c in np.flatnonzero(labels.any(0)).tolist():
        order = np.argsort(-scores[:, c], kind="stable")
        ends = np.flatnonzero(np.append(np.diff(scores[order, c]) != 0, True))  # of equal scores
        hits = np.cumsum(labels[order, c])[ends]
        found[c] = (np.diff(hits, prepend=0) * hits / (ends + 1)).sum() / hits[-1]
    return found


@torch.inference_mode()
def evaluate_labels(
    models: Sequence[nn.Module],
    batches: Iterable[Batch],
    precision: Precision,
    classes: int,
    world: World | None = None,
) -> Labelled:
    """Let each student and all together tell the labels of a set; modes are restored afterwards.

    Args:
        models: K networks, ``forward(inputs (N, ...)) -> logits (N, C)``; each of several
            processes gives those that it holds.
        batches: every row once, with targets (N, C); each column of processes gives its share.
        precision: as in training.
        classes: C.
        world: the processes; by default there is one.
    """
    world = world or World.alone(len(models))
    logits: list[Tensor] = [torch.zeros(world.total, 0, classes)]
    targets: list[Tensor] = [torch.zeros(0, classes)]
    with evaluating(models):
        for batch in batches:
            with precision.autocast():
                mine = [m(input_of(batch.inputs, place)) for place, m in enumerate(models)]
            logits.append(torch.stack(world.all_students([z.float() for z in mine])).cpu())
            targets.append(batch.target.cpu())
    whole = torch.cat(logits, 1).numpy(), torch.cat(targets).numpy()
    if world.single:
        return _judged(*whole)
    parts = world.gather(whole)

    def judged() -> Labelled:
        columns = (parts or [])[: world.mesh.data]  # the other rows have the same
        return _judged(
            np.concatenate([z for z, _ in columns], 1), np.concatenate([y for _, y in columns])
        )

    return world.from_main(judged)


def _judged(logits: NDArray[np.float32], target: NDArray[np.float32]) -> Labelled:
    """Return the scores of K students' logits (K, N, C) for targets (N, C)."""
    labels = target > 0.5
    # in float64, or probabilities close to 1 would be equal
    shares = torch.from_numpy(logits).double().sigmoid().mean(0).numpy()
    students = tuple(_scores(z, z > 0, labels) for z in logits)
    ensemble = _scores(shares, shares > 0.5, labels)
    return Labelled(students, ensemble, len(labels), tuple(np.flatnonzero(~labels.any(0)).tolist()))


def _scores(
    scores: NDArray[Any], said: NDArray[np.bool_], labels: NDArray[np.bool_]
) -> LabelScores:
    if not np.isfinite(scores).all():
        return LabelScores(None, None, (None,) * labels.shape[1])
    found = average_precisions(scores, labels)
    there = found[~np.isnan(found)]
    return LabelScores(
        mAP=float(there.mean()) if len(there) else None,
        exact=float((said == labels).all(1).mean()) if len(labels) else None,
        ap=tuple(None if np.isnan(one) else float(one) for one in found),
    )
