"""Predictions as lines of CSV or JSON, and files that appear only when they are whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, NamedTuple

from dml_fast.errors import UserError
from dml_fast.runs.files import atomic_write, writing

STDOUT = "-"


class Row(NamedTuple):
    """The prediction for one row.

    Attributes:
        name: its own, or that of its file.
        classes: the names of the likeliest ones, the first is the prediction; of all in their
            order, where a row may have several.
        probabilities: of these classes.
    """

    name: str
    classes: Sequence[str]
    probabilities: Sequence[float]


@contextmanager
def new_file(flag: str, path: Path) -> Iterator[IO[bytes]]:
    """Open a file that gets its name at the end; after an error an old one is as it was.

    Args:
        flag: the option that named it.
        path: its name; its folder is made.

    Raises:
        UserError: it cannot be written.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder: give a file in it")
    with writing(f"{flag} {path}", "give another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            yield file


@contextmanager
def prediction_file(
    out: str, top: int, key: str, classes: Sequence[str] = ()
) -> Iterator[Callable[[Sequence[Row]], object]]:
    """Open a file for predictions: CSV with a header, or one JSON object per line for ``.jsonl``.

    Args:
        out: the new file, or - for CSV on the standard output.
        top: how many classes each row has.
        key: what the names of rows are called: path or name.
        classes: where a row may have several, all of them: each is a column of CSV.

    Yields:
        A function that writes rows.

    Raises:
        UserError: as `new_file`.
    """
    if Path(out).suffix == ".jsonl":
        with new_file("--out", Path(out)) as file:
            yield lambda rows: file.write(json_lines(rows, key))
        return
    header = table_header(classes, key) if classes else csv_header(top, key)
    lines = table_lines if classes else csv_lines
    if out == STDOUT:
        sys.stdout.buffer.write(header)
        yield lambda rows: sys.stdout.buffer.write(lines(rows))
        sys.stdout.buffer.flush()
    else:
        with new_file("--out", Path(out)) as file:
            file.write(header)
            yield lambda rows: file.write(lines(rows))


def csv_header(top: int, key: str) -> bytes:
    """Return the first line of a CSV file with ``top`` classes for each row."""
    pairs = ([f"class_{place}", f"probability_{place}"] for place in range(1, top + 1))
    return (",".join([key, *chain(*pairs)]) + "\n").encode()


def csv_lines(rows: Sequence[Row]) -> bytes:
    """Return one line for each row, in UTF-8; bytes of a name that are not stay as they are."""
    lines = []
    for row in rows:
        pairs = zip(map(_cell, row.classes), map(str, row.probabilities), strict=True)
        lines.append(",".join([_cell(row.name), *chain(*pairs)]) + "\n")
    return _encoded("".join(lines))


def table_header(classes: Sequence[str], key: str) -> bytes:
    """Return the first line of a CSV file with a column for each class."""
    return _encoded(",".join([key, *map(_cell, classes)]) + "\n")


def table_lines(rows: Sequence[Row]) -> bytes:
    """Return one line of probabilities for each row, as `csv_lines`."""
    lines = (",".join([_cell(row.name), *map(str, row.probabilities)]) + "\n" for row in rows)
    return _encoded("".join(lines))


def json_lines(rows: Sequence[Row], key: str) -> bytes:
    r"""Return one object for each row, in ASCII; a byte that is not UTF-8 becomes ``\udcXX``."""
    found = ({key: n, "classes": [*c], "probabilities": [*p]} for n, c, p in rows)
    return "".join(json.dumps(row) + "\n" for row in found).encode()


def _cell(text: str) -> str:
    """Quote what needs it; Python's own writer leaves out a carriage return, which ends a line."""
    if any(character in text for character in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


def _encoded(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a character in the name of a class, which no file's name has
        return text.encode("utf-8", "backslashreplace")
