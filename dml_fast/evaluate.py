"""Scores of a run's students, or of features in files: ``python -m dml_fast.evaluate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from dml_fast import cli
from dml_fast.config import flag
from dml_fast.errors import UserError, check_number, check_whole


@dataclass(frozen=True)
class EvaluateArguments:
    """Scores of a run's students and their ensemble on images kept aside, or of given features.

    Accuracy; for a run that learned identities, and for features, mAP and CMC.
    """

    run: Positional[Path | None] = None
    """Folder of the run."""
    features: tuple[Path, Path] | None = None
    """In place of a run: two .npz files, of the queries and of the gallery, with the arrays
    features (N, D), pids (N,) and cams (N,)."""
    data: str = ""
    """Other data with the same classes (or other identities), in place of the run's own, written as
    for training. Its pixels are normalised as in the run."""
    split: Literal["test", "val", "train"] = "test"
    """Which images. train: without augmentation, with the labels that the students were taught."""
    checkpoint: Literal["best", "last", "previous"] = "best"
    """Which students. best: those of the epoch with the highest mean validation score; of pairs,
    those of the last epoch."""
    weights: Literal["student", "ema"] = "student"
    """Their own weights, or the averages of these that a run with --ema keeps."""
    allow_code: str = ""
    """The function package.module:function (or several, with commas) that the run may call to build
    its students; others that it names are refused."""
    hamming: bool = False
    """Rank by the codes of a run with --head hash; equal distances count by their mean over all
    orders. Of classes, the split searches among the training and validation images that are not in
    it; of identities, the queries among the gallery."""
    codes: Path | None = None
    """File .npz for these codes: packed bits of each student and of all side by side, with labels
    and names."""
    rerank: bool = False
    """Correct the distances with mutual neighbours (Zhong et al., CVPR 2017)."""
    ranked_lists: int = 0
    """Draw that many queries with their ten nearest gallery images."""
    out: Path = Path("ranked_lists.png")
    """File for the drawing."""
    sets: bool = False
    """Search for sets of images in sets of images: all queries of an identity by one camera, among
    all gallery images of each identity."""
    reduction: Literal["min", "mean", "log_sum_exp", "centroid", "mutual_information"] = "centroid"
    """How two of --sets are compared. min, mean, log_sum_exp: of the distances of all pairs of
    images. centroid: by the mean features. mutual_information: by what each query image says for a
    set and against the others."""
    temperature: float = 0.05
    """Of --reduction log_sum_exp and mutual_information, in units of the cosine distance."""
    metric: Literal["cosine", "euclidean", "hamming"] = "cosine"
    """Distance, for --features. hamming: features are codes, uint8 with 8 bits each."""
    protocol: Literal["auto", "market1501", "cuhk03", "all"] = "auto"
    """Rules of a search. cuhk03: one gallery image per identity. all: cameras do not matter. auto:
    as in the run's validation; market1501 for --features."""
    json: bool = False
    """Print JSON in place of the table: shares in 0..1."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or cuda:N."""
    batch_size: int = 512
    """Images at a time."""

    def check(self) -> None:
        """Refuse numbers that are too small, and arguments that do not go together.

        Raises:
            UserError: which, and what to give.
        """
        for name, least in (("batch_size", 1), ("ranked_lists", 0)):
            check_whole(flag(name), getattr(self, name), least)
        if (self.run is None) == (self.features is None):
            raise UserError("give the folder of a run, or --features QUERY.npz GALLERY.npz")
        if self.features is not None:
            names = ("data", "ranked_lists", "allow_code", "hamming", "codes", "sets", "weights")
            for name in names:
                if getattr(self, name) != getattr(EvaluateArguments, name):
                    instead = "give --metric hamming" if name == "hamming" else "leave it out"
                    raise UserError(
                        f"{flag(name)} goes with a run, and --features has none: {instead}"
                    )
        self._check_sets()
        if self.features is None and self.metric != EvaluateArguments.metric:
            raise UserError("--metric goes with --features: a run is ranked as it was trained")
        if self.hamming and self.rerank:
            raise UserError("--rerank goes with embeddings and not with --hamming: leave it out")
        if self.codes is not None and not self.hamming:
            raise UserError(f"--codes {self.codes} goes with --hamming: add that")
        cli.check_ending("--codes", self.codes, ".npz")

    def _check_sets(self) -> None:
        words = "a number above 0"
        check_number("--temperature", self.temperature, words, lambda t: 0 < t < float("inf"))
        for name in ("reduction", "temperature"):
            if not self.sets and getattr(self, name) != getattr(EvaluateArguments, name):
                raise UserError(f"{flag(name)} goes with --sets: add that, or leave it out")
        if not self.sets:
            return
        from dml_fast.ranking.sets import WITH_TEMPERATURE  # loads numpy

        given = self.temperature != EvaluateArguments.temperature
        if given and self.reduction not in WITH_TEMPERATURE:
            raise UserError(
                f"--temperature means nothing with --reduction {self.reduction}: leave it out, or "
                f"give {' or '.join(WITH_TEMPERATURE)}"
            )
        for name in ("rerank", "ranked_lists", "hamming"):
            if getattr(self, name):
                raise UserError(
                    f"{flag(name)} ranks single images, and --sets sets of them: leave out one"
                )
        if self.protocol == "cuhk03":
            raise UserError(
                "--protocol cuhk03 counts one image of each identity, and --sets makes one item of "
                "all of them: give market1501 or all"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, evaluate, print; return 0."""
    args = cli.parse(EvaluateArguments, argv, "evaluate")
    args.check()
    if args.features is not None:
        from dml_fast.eval.feature_files import rank_files

        protocol = "market1501" if args.protocol == "auto" else args.protocol
        ranking = rank_files(
            *args.features, metric=args.metric, protocol=protocol, reranked=args.rerank
        )
        print(ranking.to_json() if args.json else ranking)
    elif args.run is not None:
        from dml_fast.eval.of_run import evaluate_run
        from dml_fast.reporting.tables import show_evaluation

        result = evaluate_run(
            args.run,
            data=args.data,
            split=args.split,
            checkpoint=args.checkpoint,
            allow_code=args.allow_code.split(","),
            device=args.device,
            batch_size=args.batch_size,
            protocol=args.protocol,
            reranked=args.rerank,
            lists=args.ranked_lists,
            out=args.out,
            sets=(args.reduction, args.temperature) if args.sets else None,
            hamming=args.hamming,
            codes=args.codes,
            weights=args.weights,
        )
        if args.json:
            print(json.dumps(result, indent=2))
        else:
            show_evaluation(result)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
