"""How two images lie to each other: ``python -m dml_fast.register RUN A.npy B.npy``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from dml_fast import cli
from dml_fast.config import flag
from dml_fast.errors import UserError, check_number, check_whole
from dml_fast.eval.registration import Registration as Registration
from dml_fast.eval.registration import register as register
from dml_fast.foreign import shown


@dataclass(frozen=True)
class RegisterArguments:
    """Find the displacement between two images with the students of a run on pairs: data.

    All displacements of a square are compared. With --training-pairs: register the pairs that the
    run was trained with, and write the offsets of the surest, for train --offsets.
    """

    run: Positional[Path]
    """Folder of the run."""
    a: Positional[Path | None] = None
    """An image, (height, width) real numbers in an .npy file."""
    b: Positional[Path | None] = None
    """The other modality, as large, or wider on each side by the same number of pixels."""
    search: int = 0
    """Largest displacement in pixels, at most the run's (0: the run's)."""
    surface: Path | None = None
    """File for the logit of each displacement: .npz with logits, offset and margin."""
    picture: Path | None = None
    """File for a picture: the logits, and the edges of both images before and after, .png."""
    training_pairs: bool = False
    """Register the training pairs, in place of two images, and write --out."""
    keep: float = 0.5
    """Share of the training pairs to write: those whose optimum stands out most. Let it grow from
    round to round."""
    out: Path | None = None
    """File for the offsets of the training pairs: name, rows and columns with tabs between them."""
    checkpoint: Literal["best", "last", "previous"] = "best"
    """Which students. best: those of the last whole epoch, for nothing is chosen by rough pairs."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print JSON."""

    def check(self) -> None:
        """Refuse what can be seen to be wrong without the run.

        Raises:
            UserError: which, and what to give.
        """
        check_whole("--search", self.search, 0)
        check_number("--keep", self.keep, "a share above 0 and up to 1", lambda x: 0 < x <= 1)
        other = ("keep", "out") if not self.training_pairs else ("search", "surface", "picture")
        for name in other:
            if getattr(self, name) != getattr(RegisterArguments, name):
                does = "goes with" if not self.training_pairs else "means nothing with"
                raise UserError(f"{flag(name)} {does} --training-pairs: {self._remedy}")
        if self.training_pairs:
            if self.a is not None:
                raise UserError(f"--training-pairs takes no images: leave out {self.a}")
            if self.out is None:
                raise UserError("give --out FILE.tsv for the offsets of the training pairs")
        elif self.a is None or self.b is None:
            raise UserError("give two images, A.npy and B.npy, or --training-pairs")
        for name, ending in (("surface", ".npz"), ("picture", ".png")):
            cli.check_ending(flag(name), getattr(self, name), ending)

    @property
    def _remedy(self) -> str:
        return "leave it out" if self.training_pairs else "add that, or leave it out"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, register, print; return 0."""
    args = cli.parse(RegisterArguments, argv, "register")
    args.check()
    from dml_fast.eval.of_pairs import StudentsOfPairs, register_files, register_training_pairs
    from dml_fast.runs.files import check_place

    for name in ("surface", "picture", "out"):
        if (path := getattr(args, name)) is not None:
            check_place(path, flag(name))
    students = StudentsOfPairs.load(args.run, args.checkpoint, args.device)
    if args.training_pairs:
        assert args.out is not None
        result = register_training_pairs(students, args.keep, args.out)
        words = _of_pairs(result)
    else:
        assert args.a is not None and args.b is not None
        result = register_files(
            students,
            args.a,
            args.b,
            search=args.search,
            surface=args.surface,
            picture=args.picture,
        )
        words = _of_files(result)
    print(json.dumps(result, indent=2) if args.json else words)
    return 0


def _of_files(found: dict[str, Any]) -> str:
    rows, columns, side = found["rows"], found["columns"], 2 * found["search"] + 1
    below, right = ("above" if rows < 0 else "below"), ("left" if columns < 0 else "right")
    pixels = f"{abs(rows)} pixel{'s' * (abs(rows) != 1)} {below} and {abs(columns)} {right}"
    lines = [
        f"rows {rows}, columns {columns}: what {shown(found['b'])} shows lies {pixels} of its "
        f"place in {shown(found['a'])}",
        f"the optimum stands {found['margin']:.2f} deviations above the mean of "
        f"{side} x {side} displacements; {found['by']}",
        *([f"compared {found['cut']}"] if found["cut"] else []),
        *(f"wrote {shown(found[key])}" for key in ("surface", "picture") if found[key]),
    ]
    return "\n".join(lines)


def _of_pairs(found: dict[str, Any]) -> str:
    offset, moved = (
        f"{rows:.2f} rows, {columns:.2f} columns"
        for rows, columns in (found["mean_offset"], found["mean_correction"])
    )
    return (
        f"wrote {shown(found['out'])}: offsets of {found['kept']:,} of {found['pairs']:,} training "
        f"pairs, whose optimum stands at least {found['least_margin']:.2f} deviations above the "
        f"mean; {found['by']}\n"
        f"mean offset {offset}; mean correction in this round {moved}; {found['corrected']:,} were "
        "corrected"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
