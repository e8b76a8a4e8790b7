"""How well a finished run's students find identities, and pictures of what they find."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dml_fast.data import RetrievalSet
from dml_fast.errors import UserError
from dml_fast.eval.of_run import Evaluation, show_facts, show_table
from dml_fast.eval.retrieval import evaluate_retrieval
from dml_fast.ranking.result import RankingResult
from dml_fast.runs.history import percent

LIST_LENGTH = 10  # gallery images in a ranked list
_SHARES = {"mAP": "mAP", "rank1": "rank-1", "rank5": "rank-5", "rank10": "rank-10", "mINP": "mINP"}


def retrieve(
    evaluation: Evaluation, *, reranked: bool = False, lists: int = 0, out: Path | None = None
) -> dict[str, Any]:
    """Let the students and their ensemble search, and draw ranked lists.

    Args:
        evaluation: of a run that learned identities.
        reranked: correct the distances with mutual neighbours (`dml_fast.eval.rerank`).
        lists: how many queries' lists to draw, of the ensemble.
        out: the picture to draw.

    Returns:
        What ``--json`` prints: shares in 0..1, and what they were measured on.

    Raises:
        UserError: the split has no queries, or none that can be found, or nobody to find them;
            the picture cannot be written.
    """
    images = evaluation.images
    if not isinstance(images, RetrievalSet):
        raise UserError("the train split has no queries: give --split test or val")
    found = evaluate_retrieval(
        evaluation.models,
        evaluation.batches,
        images,
        evaluation.precision,
        reranked=reranked,
        topk=LIST_LENGTH if lists else 0,
    )
    if found.ensemble is None:
        raise UserError(
            f"no student of {evaluation.facts['run']} gives embeddings that are numbers, so there "
            "is nothing to rank: evaluate an earlier checkpoint with --checkpoint"
        )
    if lists and out is not None:
        from dml_fast.reporting.ranked_lists import (
            draw_ranked_lists,  # matplotlib takes a second to import
        )

        draw_ranked_lists(out, images, found.ensemble, lists)
    students = evaluation.student_facts("val_mAP")
    return {
        **evaluation.facts,
        "queries": images.queries,
        "gallery": len(images) - images.queries,
        "n_valid": found.ensemble.n_valid,
        "reranked": reranked,
        "ranked_lists": str(out) if lists else None,
        "students": [
            {**facts, **_shares(result)}
            for facts, result in zip(students, found.students, strict=True)
        ],
        "best_student": evaluation.trained.best,
        "ensemble": _shares(found.ensemble),
    }


def show(result: Mapping[str, Any]) -> None:
    """Print the result of ``retrieve`` to stdout as a table."""
    columns = ["val. mAP", *_SHARES.values()]
    rows = [[s["val_mAP"], *(s[key] for key in _SHARES)] for s in result["students"]]
    scores = [percent(result["ensemble"][key]) for key in _SHARES]
    ensemble = ["concatenated embeddings", "", "", *scores]
    show_table(result, columns, rows, ensemble, title=f"{result['split']} split, %")
    how = "re-ranked, " if result["reranked"] else ""
    show_facts(
        result, f"images ({result['queries']:,} queries, {how}{result['gallery']:,} gallery)"
    )
    if missing := result["queries"] - result["n_valid"]:
        print(f"{missing:,} queries without a valid match are left out of the means")
    if result["ranked_lists"]:
        print(f"ranked lists of the ensemble: {result['ranked_lists']}")


def _shares(result: RankingResult | None) -> dict[str, float | None]:
    """None for a student that diverged."""
    if result is None:
        return dict.fromkeys((*_SHARES, "mAP_trapezoid"))
    ranks = {f"rank{k}": float(result.cmc[k - 1]) for k in (1, 5, 10)}
    means = {name: getattr(result, name) for name in ("mAP", "mAP_trapezoid", "mINP")}
    return {**means, **ranks}
