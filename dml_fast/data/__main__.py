"""Look for damaged images before a run does: ``python -m dml_fast.data scan DIR``."""

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


@dataclass(frozen=True)
class DataArguments:
    """Look for damaged and foreign image files below a folder; exits with 1 if there are any."""

    command: Positional[Literal["scan"]]
    """What to do."""
    dir: Positional[Path]
    """The folder: all image files in it and below are looked at."""
    decode: bool = False
    """Decode every image: slower, and also finds what was overwritten in the middle of a file."""
    json: bool = False
    """Print JSON in place of the list: files, and bad with a reason for each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, scan, print; returns 1 if a file is bad."""
    args = cli.parse(DataArguments, argv, "data")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from dml_fast.data.scan import Report, image_files, scan
    from dml_fast.data.storage import LooseFiles

    if not args.dir.is_dir():
        raise UserError(f"{args.dir} is no folder: give the one that holds the images")
    files = LooseFiles.of(image_files(args.dir))
    if not len(files):
        raise UserError(f"{args.dir} holds no image files: give the folder that holds them")
    report = Report()
    columns = (
        TextColumn("scanning"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(files))
        for report in scan(files, decode=args.decode):
            bar.update(task, completed=report.files, description=f"{len(report.bad)} bad")
    bad = {path.relative_to(args.dir).as_posix(): why for path, why in report.bad.items()}
    if args.json:
        print(json.dumps({"files": report.files, "bad": bad}, indent=2))
    else:
        for name, why in bad.items():
            print(f"{name}\t{why}")
        how = "decoded" if args.decode else "looked at"
        print(f"{report.files} files {how}, {len(bad)} bad", file=sys.stderr if bad else sys.stdout)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
