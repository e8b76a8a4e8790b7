"""Find damaged images and shards before training: ``python -m dml_fast.data scan DIR``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from dml_fast import cli
from dml_fast.errors import UserError
from dml_fast.foreign import shown

if TYPE_CHECKING:
    from dml_fast.data.listing import PassedOver
    from dml_fast.data.storage import Storage


@dataclass(frozen=True)
class DataArguments:
    """Find image files that cannot be decoded, in a folder or in tar shards.

    It also says how many images have no label, if there are any: those of train/unlabelled, and of
    shards without labels. The exit code is 1 if there are any.
    """

    command: Positional[Literal["scan"]]
    """The command: scan is the only one."""
    dir: Positional[str]
    """Where the images are: a folder, with the folders below it, or shards:DIR or shards:URL."""
    decode: bool = False
    """Decode every image. This is slower and also finds damage in the middle of a file."""
    json: bool = False
    """Print JSON instead of a list: the number of files, and each bad file with its reason."""


def main(argv: Sequence[str] | None = None) -> int:
    """Scan, print what was found, and return 1 if a file is bad, else 0."""
    args = cli.parse(DataArguments, argv, "data")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from dml_fast.data.scan import Report, scan

    root, files, damaged, passed, unlabelled = _files(args.dir)
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
    bad = {path.relative_to(root).as_posix(): why for path, why in (damaged | report.bad).items()}
    if args.json:
        found = {
            "files": report.files,
            "unlabelled": unlabelled,
            "bad": bad,
            "passed_over": passed.counts,
        }
        print(json.dumps(found, indent=2))
    else:
        for name, why in bad.items():
            print(f"{shown(name)}\t{shown(why)}")
        how = "decoded" if args.decode else "looked at"
        rest = f"; passed over: {text}" if (text := passed.text(root)) else ""
        if unlabelled:
            rest = f"; {report.files - unlabelled} have a label and {unlabelled} have none{rest}"
        out = sys.stderr if bad else sys.stdout
        print(f"{report.files} files {how}, {len(bad)} bad{rest}", file=out)
    return 1 if bad else 0


def _files(where: str) -> tuple[Path, Storage, dict[Path, str], PassedOver, int]:
    """Return the folder, its images, its damaged shards with reasons, and what else is there.

    The last is how many of the images have no label.
    """
    from dml_fast.data.corrupt import CorruptFiles
    from dml_fast.data.listing import PassedOver, images_below
    from dml_fast.data.readers.folder import UNLABELLED
    from dml_fast.data.readers.shard_names import find_shards
    from dml_fast.data.readers.shards import index_shards
    from dml_fast.data.storage import LooseFiles

    kind, _, spec = where.partition(":")
    if kind == "shards" and spec:
        names = find_shards(spec)
        corrupt = CorruptFiles(names.root, allowed=True)
        members = index_shards(names, corrupt)
        unlabelled = int((members.labels < 0).sum())
        return names.root, members, corrupt.reasons, names.passed, unlabelled
    root, passed = Path(where), PassedOver()
    if not os.path.isdir(root):
        raise UserError(f"{root} is not a folder: give the one that holds the images")
    if not (paths := images_below(root, passed)):
        if any(root.rglob("*.tar")):
            raise UserError(f"{root} holds tar files: give shards:{root} to look into them")
        raise UserError(f"{root} holds no image files: give the folder that holds them")
    without = os.path.join(root, "train", UNLABELLED, "")
    unlabelled = sum(path.startswith(without) for path in paths)
    return root, LooseFiles.of(paths), {}, passed, unlabelled


if __name__ == "__main__":
    sys.exit(cli.run(main))
