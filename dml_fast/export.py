"""Export students for use elsewhere: ``python -m dml_fast.export runs/NAME --format onnx``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from dml_fast import cli
from dml_fast.errors import UserError
from dml_fast.runs.folder import Run


@dataclass(frozen=True)
class ExportArguments:
    """Write a student, or all as one network, to a file that is kept only if it computes the same.

    It holds the network alone, which takes float32 images (N, C, H, W), divided by 255 and
    normalised, and returns logits; embeddings, if it learned identities; logits and codes (N, bits
    / 8) uint8, if it has a hash head. Of the ensemble these are probabilities, the mean of all
    students; embeddings of length 1, side by side; and codes side by side. Mean, std, classes and
    architecture are in it as JSON named dml_fast (safetensors, onnx: metadata; pt2: extra file).
    """

    run: Positional[Path]
    """Folder of the run."""
    student: str = "best"
    """Its number, from 0; best: the one with the highest validation score; or ensemble: all."""
    format: Literal["safetensors", "pt2", "onnx"] = "safetensors"
    """safetensors: weights, for load_student or load_ensemble of dml_fast.runs.weights. pt2: for
    torch.export.load. onnx: for ONNX Runtime and others. The latter two need no dml_fast and take
    any number of images."""
    checkpoint: Literal["best", "last"] = "best"
    """best: of the epoch with the highest mean validation score; of pairs, of the last epoch."""
    weights: Literal["student", "ema"] = "student"
    """The student's own weights, or the average of these that a run with --ema keeps."""
    allow_code: str = ""
    """The function package.module:function (or several, with commas) that the run may call to build
    its students; others that it names are refused."""
    out: str = ""
    """File to write (default: student_K-CHECKPOINT.FORMAT in the run folder, or
    ensemble-CHECKPOINT.FORMAT; of averages, student_K-CHECKPOINT-ema.FORMAT and so on)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, export and compare; return 0, or 1 if the file computes something else."""
    args = cli.parse(ExportArguments, argv, "export")
    run = Run.open(args.run)
    count = len(run.description["students"])
    named = args.student in ("best", "ensemble")
    if not named and not (args.student.isdecimal() and int(args.student) < count):
        raise UserError(
            f"--student is {args.student!r} and {run.folder} has {count} students: "
            f"give best, ensemble, or a number from 0 to {count - 1}"
        )
    cli.check_ending("--out", args.out or None, f".{args.format}")

    from dml_fast.runs.exporting import export_student

    allowed = args.allow_code.split(",")
    kept = export_student(
        run, args.student, args.format, args.checkpoint, args.out, allowed, args.weights
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(cli.run(main))
