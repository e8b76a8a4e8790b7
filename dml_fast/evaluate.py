"""Scores of a run's students, or of anybody's features: ``python -m dml_fast.evaluate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from dml_fast import cli
from dml_fast.errors import UserError
from dml_fast.runs.folder import Run


@dataclass(frozen=True)
class EvaluateArguments:
    """Scores of a run's students and their ensemble on images kept aside, or of features.

    Accuracy; for a run that learned identities, and for features, mAP and CMC.
    """

    run: Positional[Path | None] = None
    """Folder of the run."""
    features: tuple[Path, Path] | None = None
    """In place of a run: two .npz files, of the queries and of the gallery, with the arrays
    features (N, D), pids (N,) and cams (N,)."""
    data: str = ""
    """Other data with the same classes (or other identities), written as for training, in place of
    the run's own. Its pixels are normalised as in the run."""
    split: Literal["test", "val", "train"] = "test"
    """Which images. train: unaugmented, with the labels the students were taught."""
    checkpoint: Literal["best", "last", "previous"] = "best"
    """best: of the epoch with the highest mean validation score."""
    rerank: bool = False
    """Correct the distances with mutual neighbours (Zhong et al., CVPR 2017)."""
    ranked_lists: int = 0
    """Draw so many queries with their ten nearest gallery images."""
    out: Path = Path("ranked_lists.png")
    """Where to draw them."""
    metric: Literal["cosine", "euclidean", "hamming"] = "cosine"
    """For --features. hamming: features are codes, uint8 of 8 bits each."""
    protocol: Literal["market1501", "cuhk03", "all"] = "market1501"
    """For --features. cuhk03: one gallery image an identity. all: cameras do not matter."""
    json: bool = False
    """Print JSON in place of the table: shares in 0..1."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    batch_size: int = 512
    """Images at a time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, evaluate, print; returns 0."""
    args = cli.parse(EvaluateArguments, argv, "evaluate")
    for name in ("batch_size", "ranked_lists"):
        least = int(name == "batch_size")
        if (value := getattr(args, name)) < least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {value}: give a whole number of at least {least}")
    if (args.run is None) == (args.features is None):
        raise UserError("give the folder of a run, or --features QUERY.npz GALLERY.npz")
    if args.features is not None:
        _evaluate_features(args, args.features)
    elif args.run is not None:
        _evaluate_run(args, Run.open(args.run))
    return 0


def _evaluate_features(args: EvaluateArguments, files: tuple[Path, Path]) -> None:
    for name in ("data", "ranked_lists"):
        if getattr(args, name):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} needs images and --features has none: give a run")
    from dml_fast.eval.feature_files import rank_files

    result = rank_files(*files, metric=args.metric, protocol=args.protocol, reranked=args.rerank)
    print(result.to_json() if args.json else result)


def _evaluate_run(args: EvaluateArguments, run: Run) -> None:
    for name in ("metric", "protocol"):
        if getattr(args, name) != getattr(EvaluateArguments, name):
            raise UserError(f"--{name} goes with --features: a run is ranked as it was trained")
    asked = {"--rerank": args.rerank, "--ranked-lists": args.ranked_lists}
    if not run.config.retrieval:
        for flag, value in asked.items():
            if value:
                raise UserError(f"{flag} ranks, and {run.folder} learned classes: leave it out")

    from dml_fast.eval import of_run as evaluation
    from dml_fast.eval import of_run_retrieval as evaluation_retrieval

    prepared = evaluation.Evaluation.prepare(
        run,
        spec=args.data,
        split=args.split,
        which=args.checkpoint,
        device=args.device,
        batch_size=args.batch_size,
    )
    result: dict[str, Any]
    if run.config.retrieval:
        result = evaluation_retrieval.retrieve(
            prepared, reranked=args.rerank, lists=args.ranked_lists, out=args.out
        )
        show = evaluation_retrieval.show
    else:
        result, show = evaluation.classify(prepared), evaluation.show
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    sys.exit(cli.run(main))
