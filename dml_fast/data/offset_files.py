"""``--offsets FILE``: displacements of pairs by name, in lines ``name<TAB>rows<TAB>columns``.

Blank lines, lines that begin with ``#``, and a first line ``name<TAB>rows<TAB>columns`` say
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn

from dml_fast.errors import UserError, brief
from dml_fast.foreign import content, shown, utf8

HEADER = "name\trows\tcolumns"
_FORM = "write a name, rows and columns with tabs between them, as dml_fast.register does"


def read_offsets(path: str | Path) -> bytes:
    """Return what a file of offsets holds.

    Raises:
        UserError: it cannot be read.
    """
    return content(Path(path).expanduser(), "give --offsets a file of names, rows and columns")


def offsets_in(path: str | Path) -> dict[str, tuple[int, int]]:
    """Return the rows and columns, in pixels, that a file gives to each name in it.

    Raises:
        UserError: the file cannot be read, is not UTF-8 or names no pair; or a line has not three
            columns, no whole numbers, or a name of an earlier line.
    """
    text = utf8(read_offsets(path), partial(_refuse, path))
    found: dict[str, tuple[int, int]] = {}
    first = True
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip() or line.startswith("#"):
            continue
        if not (first and line == HEADER):
            name, offset = _parsed(path, number, line.split("\t"))
            if name in found:
                _refuse(path, number, f"names {brief(name)} a second time: remove one of the lines")
            found[name] = offset
        first = False
    if not found:
        raise UserError(f"--offsets {shown(path)} names no pair: {_FORM}")
    return found


def offsets_text(offsets: Mapping[str, tuple[int, int]]) -> str:
    """Return the text of a file with these offsets, rows before columns."""
    lines = [HEADER, *(f"{name}\t{rows}\t{columns}" for name, (rows, columns) in offsets.items())]
    return "".join(f"{line}\n" for line in lines)


def _parsed(path: str | Path, number: int, columns: list[str]) -> tuple[str, tuple[int, int]]:
    if len(columns) != 3:
        found = "one column" if len(columns) == 1 else f"{len(columns)} columns"
        _refuse(path, number, f"has {found} and not three: {_FORM}")
    name, *sizes = columns
    for size in sizes:
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", size):
            _refuse(path, number, f"has {brief(size)} for a number of pixels: give a whole number")
    return name, (int(sizes[0]), int(sizes[1]))


def _refuse(path: str | Path, line: int, what: str) -> NoReturn:
    raise UserError(f"--offsets {shown(path)}: line {line} {what}")
