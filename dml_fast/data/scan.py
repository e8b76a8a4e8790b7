"""Looks for damaged and foreign image files before a run does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dml_fast.data.decode import decode_image
from dml_fast.data.readers.folder import SUFFIXES
from dml_fast.data.storage import CorruptImageError, Storage
from dml_fast.machine import cores

_AT_ONCE = 512  # files: bounds what waits
_ENDS = 64  # bytes at a file's beginning and end

# how files of the usual kinds begin and end
_KINDS = {
    b"\xff\xd8\xff": b"\xff\xd9",  # JPEG
    b"\x89PNG\r\n\x1a\n": b"IEND\xaeB`\x82",
    b"GIF8": b"\x3b",
}


@dataclass
class Report:
    """What a scan has found so far.

    Attributes:
        files: how many were looked at.
        bad: file to what is wrong with it.
    """

    files: int = 0
    bad: dict[Path, str] = field(default_factory=dict)


def image_files(root: Path) -> list[Path]:
    """All files below a folder with an image's suffix, sorted; hidden ones are passed over."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(folder, name)
            for name in sorted(names)
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
        ]
    return found


def scan(files: Storage, *, decode: bool) -> Iterator[Report]:
    """Looks at each file; the same report is yielded again as it grows.

    Args:
        files: which.
        decode: whether to decode them, which finds everything. Otherwise a file that begins and
            ends as a whole JPEG, PNG or GIF does is believed, and only others are decoded: fast,
            but blind to what was overwritten in the middle.
    """
    report = Report()
    look = decoded if decode else glanced_at
    with ThreadPoolExecutor(cores()) as pool:
        try:
            for start in range(0, len(files), _AT_ONCE):
                some = range(start, min(start + _AT_ONCE, len(files)))
                for index, problem in zip(some, pool.map(partial(look, files), some), strict=True):
                    report.files += 1
                    if problem:
                        report.bad[files.path(index)] = problem
                yield report
        finally:
            pool.shutdown(cancel_futures=True)


def glanced_at(files: Storage, index: int) -> str:
    """What is wrong with a file by its first and last bytes; "" for nothing."""
    try:
        start, end = files.ends(index, _ENDS)
    except CorruptImageError as error:
        return str(error)
    if not start:
        return "empty"
    for first, last in _KINDS.items():
        if start.startswith(first) and end.endswith(last):
            return ""
    # truncated, foreign, of another kind, or with something behind its end
    return decoded(files, index)


def decoded(files: Storage, index: int) -> str:
    """What is wrong with a file when it is decoded; "" for nothing."""
    try:
        decode_image(files.read(index))
    except CorruptImageError as error:
        return str(error)
    return ""
