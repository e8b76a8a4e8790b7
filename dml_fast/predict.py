"""Classes or embeddings of rows: ``python -m dml_fast.predict RUN FILES --out FILE.csv``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from dml_fast import cli
from dml_fast.config import flag
from dml_fast.errors import UserError, check_whole
from dml_fast.foreign import shown


@dataclass(frozen=True)
class PredictArguments:
    """Write the likeliest classes of images, vectors or texts, or their embeddings.

    Image files that cannot be decoded are named and left out; then the exit code is 1.
    """

    run: Positional[Path]
    """Folder of the run."""
    images: Positional[tuple[Path, ...]]
    """Image files, and folders that hold some at any depth. For a run that learned vectors, an .npz
    file of them; for one that learned texts, .tsv files."""
    out: str = ""
    """File for classes and probabilities: .csv or .jsonl; - for CSV on the standard output."""
    features: Path | None = None
    """File for embeddings: .npz with features (N, D) and names (N,), and where file names tell
    them pids and cams, as dml_fast.evaluate --features reads it. Of a run with --head hash,
    features are packed codes, uint8, for its --metric hamming."""
    student: str = "best"
    """best: the one with the highest validation score. ensemble: the mean of all students'
    probabilities; their embeddings or codes side by side. Or a student's number, from 0."""
    top: int = 5
    """How many classes to write for each row; all where rows may have several labels."""
    checkpoint: Literal["best", "last", "previous"] = "best"
    """best: of the epoch with the highest mean validation score."""
    weights: Literal["student", "ema"] = "student"
    """The student's own weights, or the average of these that a run with --ema keeps."""
    allow_code: str = ""
    """The function package.module:function (or several, with commas) that the run may call to build
    its students; others that it names are refused."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or cuda:N."""
    batch_size: int = 512
    """Rows at a time."""

    def check(self) -> None:
        """Refuse what can be seen to be wrong without the run.

        Raises:
            UserError: which, and what to give.
        """
        if not self.images:
            raise UserError("there is nothing to predict: give files or folders")
        for name in ("top", "batch_size"):
            check_whole(flag(name), getattr(self, name), 1)
        if not self.out and self.features is None:
            raise UserError("give --out FILE.csv or .jsonl for classes, or --features FILE.npz")
        if self.out != "-":
            cli.check_ending("--out", self.out or None, ".csv", ".jsonl")
        cli.check_ending("--features", self.features, ".npz")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, predict, say what was written; return 1 if a file was left out, else 0."""
    args = cli.parse(PredictArguments, argv, "predict")
    args.check()
    from dml_fast.eval.of_images import predict_run

    done = predict_run(
        args.run,
        args.images,
        student=args.student,
        top=args.top,
        checkpoint=args.checkpoint,
        allow_code=args.allow_code.split(","),
        device=args.device,
        batch_size=args.batch_size,
        out=args.out,
        features=args.features,
        weights=args.weights,
    )
    for path, why in done.left_out.items():
        print(f"left out: {shown(path)} ({shown(why)})", file=sys.stderr)
    if done.left_out:
        count = len(done.left_out)
        print(f"{count} of {done.rows + count} files were left out", file=sys.stderr)
    arrays = ", ".join(f"{name} {shape}" for name, shape in done.arrays.items())
    for name, content in ((args.out, "classes"), (args.features, arrays)):
        if name and name != "-":
            print(f"wrote {shown(name)}: {content} of {done.rows:,} {done.what}; {shown(done.by)}")
    return 1 if done.left_out else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
