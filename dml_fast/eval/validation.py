"""Validation at the end of an epoch: the scores of each student and of the ensemble."""

from __future__ import annotations

from typing import TypeAlias

import torch

from dml_fast.data import DataSet, PairSet, RetrievalSet
from dml_fast.data.loaders import evaluation_batches
from dml_fast.distributed.world import World
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.precision import Precision
from dml_fast.eval.classification import Classified, ClassScores, evaluate
from dml_fast.eval.displacements import displacement_scores
from dml_fast.eval.retrieval import evaluate_retrieval
from dml_fast.eval.several_labels import evaluate_labels
from dml_fast.ranking.result import RankingResult

BATCH = 512

Scores: TypeAlias = dict[str, float | None]


def validate(
    cohort: Cohort,
    data: DataSet,
    precision: Precision,
    channels_last: bool,
    protocol: str,
    weights: str = "student",
) -> tuple[list[Scores], Scores]:
    """Evaluate on the validation images; each column of processes takes its share.

    Args:
        cohort: of this process.
        data: whose ``val`` is used.
        precision: as in training.
        channels_last: the memory format of images.
        protocol: of a search, as in `dml_fast.eval.retrieval.search`.
        weights: whose, as of `dml_fast.engine.Student.network`.

    Returns:
        The scores of each of K students, and of the ensemble, by their names in an epoch's line.
    """
    world, val = cohort.world, data.val
    batches = evaluation_batches(
        val,
        batch_size=BATCH,
        mean=data.mean,
        std=data.std,
        device=precision.device,
        channels_last=channels_last,
        students=cohort.numbers,
        rank=world.column,
        ranks=world.mesh.data,
    )
    with cohort.whole(weights) as models:
        if isinstance(val, RetrievalSet):
            search = evaluate_retrieval(
                models, batches, val, precision, protocol=protocol, world=world
            )
            return [_scores(r) for r in search.students], _scores(search.ensemble)
        if data.several_labels:
            labelled = evaluate_labels(models, batches, precision, len(data.classes), world)
            return [{"val_mAP": s.mAP} for s in labelled.students], {
                "val_mAP": labelled.ensemble.mAP
            }
        pairs = isinstance(val, PairSet)
        found = evaluate(models, batches, precision, len(data.classes), world, detailed=pairs)
    students, ensemble = [_of_classes(s) for s in found.students], _of_classes(found.ensemble)
    if isinstance(val, PairSet):
        every = [*students, ensemble]
        for scores, error in zip(every, _errors(found, val.search, world, precision), strict=True):
            scores["val_error_px"] = error
    return students, ensemble


def _of_classes(found: ClassScores) -> Scores:
    return {"val_acc": found.accuracy, "val_f1": found.f1}


def _errors(found: Classified, search: int, world: World, precision: Precision) -> list[float]:
    """Return the mean error of each student's displacements, and the ensemble's, in pixels."""
    sums = torch.zeros(world.total + 2, dtype=torch.float64, device=precision.device)
    if found.answers is not None and found.target is not None:  # of this column of processes
        rows = len(found.target)
        means = displacement_scores(found.answers, found.target, search)
        sums += sums.new_tensor([*(rows * one.error for one in means), rows])
    *errors, count = world.sum_over_data(sums).tolist()
    return [error / count for error in errors]


def _scores(result: RankingResult | None) -> Scores:
    """Return the scores, each None for features that are not numbers."""
    if result is None:
        return {"val_mAP": None, "val_rank1": None}
    return {"val_mAP": result.mAP, "val_rank1": float(result.cmc[0])}
