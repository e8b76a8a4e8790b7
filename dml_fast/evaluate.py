"""Accuracy of a run's students: ``python -m dml_fast.evaluate runs/NAME``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from dml_fast import cli
from dml_fast.errors import UserError
from dml_fast.run import Run


@dataclass(frozen=True)
class EvaluateArguments:
    """Accuracy of a run's students and of their ensemble, on images kept aside for it."""

    run: Positional[Path]
    """Folder of the run."""
    data: str = ""
    """Other data with the same classes, written as for training, in place of the run's own. Its
    pixels are normalised as in the run."""
    split: Literal["test", "val", "train"] = "test"
    """Which images. train: unaugmented, with the labels the students were taught."""
    checkpoint: Literal["best", "last", "previous"] = "best"
    """best: of the epoch with the highest mean validation accuracy."""
    json: bool = False
    """Print JSON in place of the table: accuracies in 0..1."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    batch_size: int = 512
    """Images at a time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, evaluate, print; returns 0."""
    args = cli.parse(EvaluateArguments, argv, "evaluate")
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}: give a whole number of at least 1")
    run = Run.open(args.run)

    from dml_fast.evaluation import evaluate_run, show

    result = evaluate_run(
        run,
        spec=args.data,
        split=args.split,
        which=args.checkpoint,
        device=args.device,
        batch_size=args.batch_size,
    )
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
