"""Look for damaged images and shards before a run does: ``python -m dml_fast.data scan DIR``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from dml_fast import cli
from dml_fast.errors import UserError

if TYPE_CHECKING:
    from dml_fast.data.storage import Storage


@dataclass(frozen=True)
class DataArguments:
    """Look for damaged and foreign image files in a folder or tar shards; exits with 1 for any."""

    command: Positional[Literal["scan"]]
    """What to do."""
    dir: Positional[str]
    """All image files in this folder and below it, or in shards:DIR or shards:URL."""
    decode: bool = False
    """Decode every image: slower, and also finds what was overwritten in the middle of a file."""
    json: bool = False
    """Print JSON in place of the list: files, and bad with a reason for each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, scan, print; returns 1 if a file is bad."""
    args = cli.parse(DataArguments, argv, "data")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from dml_fast.data.scan import Report, scan

    root, files, damaged = _files(args.dir)
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
    found = damaged | report.bad
    bad = {path.relative_to(root).as_posix(): why for path, why in found.items()}
    if args.json:
        print(json.dumps({"files": report.files, "bad": bad}, indent=2))
    else:
        for name, why in bad.items():
            print(f"{name}\t{why}")
        how = "decoded" if args.decode else "looked at"
        print(f"{report.files} files {how}, {len(bad)} bad", file=sys.stderr if bad else sys.stdout)
    return 1 if bad else 0


def _files(where: str) -> tuple[Path, Storage, dict[Path, str]]:
    """The folder, the images in it, and which of its shards are damaged and why."""
    from dml_fast.data.corrupt import CorruptFiles
    from dml_fast.data.readers.shard_names import find_shards
    from dml_fast.data.readers.shards import index_shards
    from dml_fast.data.scan import image_files
    from dml_fast.data.storage import LooseFiles

    kind, _, spec = where.partition(":")
    if kind == "shards" and spec:
        names = find_shards(spec)
        corrupt = CorruptFiles(names.root, allowed=True)
        return names.root, index_shards(names, corrupt), corrupt.reasons
    root = Path(where)
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give the one that holds the images")
    if not (paths := image_files(root)):
        if any(root.rglob("*.tar")):
            raise UserError(f"{root} holds tar files: give shards:{root} to look into them")
        raise UserError(f"{root} holds no image files: give the folder that holds them")
    return root, LooseFiles.of(paths), {}


if __name__ == "__main__":
    sys.exit(cli.run(main))
