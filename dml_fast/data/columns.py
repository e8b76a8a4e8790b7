"""Lines ``one<TAB>other`` of a file: of labels (`label_files`), of weights (`weight_files`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn

from dml_fast.errors import escaped


def two_columns(
    text: str,
    header: tuple[str, str],
    form: str,
    refuse: Callable[[int, str], NoReturn],
    comments: dict[str, int] | None = None,
) -> Iterator[tuple[int, str, str]]:
    """Yield the number of each line, from 1, and its two columns as messages show them.

    Blank lines, lines that begin with ``#`` and a first line that is the header are left out.

    Args:
        text: of the file.
        header: the names of the columns.
        form: what a line is asked to be.
        refuse: raises an error for a line's number and what is wrong with it.
        comments: is given the first column and line number of comments with a tab in them.
    """
    first = True
    for number, line in enumerate(text.split("\n"), 1):
        columns = tuple(escaped(column) for column in line.removesuffix("\r").split("\t"))
        if not line.strip():
            continue
        if line.startswith("#"):
            if comments is not None and len(columns) == 2:
                comments.setdefault(columns[0], number)
            continue
        if not (first and columns == header):
            if len(columns) != 2:
                count = "one column" if len(columns) == 1 else f"{len(columns)} columns"
                refuse(number, f"has {count} and not two: {form}")
            yield number, *columns
        first = False
