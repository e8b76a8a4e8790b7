"""Markdown that is also readable as plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dml_fast.foreign import shown

# an underscore inside a word is none
_MARKUP = re.compile(r"[\\`*\[\]<>&$~]|(?<![^\W_])_|_(?![^\W_])")


def plain(name: str) -> str:
    """Return a name so that Markdown shows it as it is; most names need no change."""
    return _MARKUP.sub(r"\\\g<0>", shown(name))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose columns also line up as plain text, numbers aligned to the right.

    Args:
        header: a name for each column.
        rows: each with a cell for each column.
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(row[i][:1].isdigit() for row in rows) for i in range(len(header))]
    lines = [
        " | ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        for row in cells
    ]
    rule = "|".join(
        "-" * (width + 1) + (":" if to_right else "-")
        for width, to_right in zip(widths, right, strict=True)
    )
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])
