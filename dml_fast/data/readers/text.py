"""Rows of text in tab-separated files: ``text:FILE.tsv``, or several as ``text:A.tsv,B.tsv``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dml_fast.data.feature_files import Array, Columns
from dml_fast.data.features import RowSet
from dml_fast.data.readers.parts import ids_of_part, ids_of_parts, in_parts
from dml_fast.data.sets import RawData
from dml_fast.data.text_features import ARGUMENTS, ONE_TEXT, TextFeatures, check_levels
from dml_fast.errors import UserError, brief
from dml_fast.foreign import content, opened, reading

_ADVICE = "give UTF-8 with tabs between columns, and a header line with text, or arg1 and arg2"
_LONGEST_HEADER = 2**16  # bytes


class TextRows(NamedTuple):
    """N rows of one file or of several.

    Attributes:
        texts: ``text`` (N,), or ``arg1`` and ``arg2``; of dtype object.
        labels: N class names, "" where a row has none.
        splits: N values of the column ``split``, "train" in a file without it; None if no file
            has it.
        names: N values of the column ``id``; the numbers of the rows, from 0, without one.
        places: N files and lines, for messages.
    """

    texts: Columns
    labels: list[str]
    splits: list[str] | None
    names: tuple[str, ...]
    places: list[tuple[Path, int]]


def text_files(spec: str) -> list[Path]:
    """Return the files that a spec names: one, or several with commas between them."""
    whole = Path(os.path.expanduser(spec))
    if "," not in spec or os.path.exists(whole):
        return [whole]
    return [Path(os.path.expanduser(part)) for part in spec.split(",")]


def check_text(spec: str) -> None:
    """Check the files' headers.

    Raises:
        UserError: a file is missing or has a header that does not do.
    """
    text_columns(text_files(spec))


def read_text(
    spec: str, *, levels: Sequence[str] | None, classes: Sequence[str], dim: int
) -> RawData:
    """Read the rows of files; those of ``split`` val and test are set aside.

    Args:
        spec: one file, or several with commas.
        levels: of `dml_fast.data.text_features`; () for all that suit the columns but ``words`` of
            two arguments; None for ``words``.
        classes: the names of all classes; () for the labels in the files, sorted.
        dim: the most dimensions of a level.

    Raises:
        UserError: a file, a line, a class or a level is wrong.
    """
    files = text_files(spec)
    columns = text_columns(files)
    if levels is None:
        levels = ("words",)
    elif not levels:
        levels = ("words", "chars") if columns == ONE_TEXT else ("args", "pairs", "edges")
    check_levels(levels, columns, spec)
    found = read_rows(files)
    ids = ids_of_parts(found.splits or ["train"] * len(found.labels), spec)
    read = np.concatenate([*ids.values()])
    known = _known_classes(found, np.sort(read).tolist(), classes, spec)
    rows = _rows(found, known)
    fit = partial(TextFeatures.fit, levels=tuple(levels), dim=dim, where=spec)
    return in_parts(files[0].stem, known, rows, ids, fit)


def read_text_part(spec: str, part: str, classes: Sequence[str]) -> RowSet:
    """Read one part of files, which is all of files that say no parts.

    Args:
        spec: one file, or several with commas.
        part: train, val or test.
        classes: the names of all classes.

    Raises:
        UserError: a file, a line or a class is wrong, or there is no row of that part.
    """
    found = read_rows(text_files(spec))
    ids = ids_of_part(part, found.splits, len(found.labels), spec)
    _known_classes(found, ids.tolist(), classes, spec)
    return _rows(found, classes).subset(ids)


def _rows(found: TextRows, classes: Sequence[str]) -> RowSet:
    place = {name: index for index, name in enumerate(classes)} | {"": -1}
    labels = np.array([place.get(label, -1) for label in found.labels], dtype=np.int64)
    return RowSet(found.texts, labels, names=found.names)


def text_columns(files: Sequence[Path]) -> tuple[str, ...]:
    """Return which columns the files have: ``arg1`` and ``arg2``, or ``text``.

    Raises:
        UserError: one is missing, has neither, or other ones than the first.
    """
    first: tuple[str, ...] = ()
    for path in files:
        with reading(path, _ADVICE), opened(path) as file:
            line = file.readline(_LONGEST_HEADER).decode("utf-8-sig")
        found = _text_columns(path, _fields(line))
        first = first or found
        if found != first:
            raise UserError(
                f"{path} has {' and '.join(found)}, and {files[0]} {' and '.join(first)}: give "
                "files with the same columns of text"
            )
    return first


def _fields(line: str) -> list[str]:
    return line.removesuffix("\n").removesuffix("\r").split("\t")


def _text_columns(path: Path, header: Sequence[str]) -> tuple[str, ...]:
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(f"{path} has the column {brief(twice)} twice: name each column once")
    for columns in (ARGUMENTS, ONE_TEXT):
        if set(columns) <= set(header):
            return columns
    there = ", ".join(map(brief, header[:6]))
    raise UserError(f"{path} has the columns {there}: {_ADVICE}")


def read_rows(files: Sequence[Path]) -> TextRows:
    """Read all rows of files, one file after the other.

    Raises:
        UserError: a file is missing or no UTF-8, or a line has too few or too many fields, no text,
            or the id of another.
    """
    columns = text_columns(files)
    found = TextRows({}, [], None, (), [])
    splits: list[str] = []
    parted = False
    texts: dict[str, list[str]] = {name: [] for name in columns}
    names: list[str] = []
    for path in files:
        lines = _lines(path)
        header = _fields(lines[0])
        parted |= "split" in header
        for number, line in enumerate(lines[1:], 2):
            fields = _fields(line)
            if len(fields) != len(header):
                raise UserError(
                    f"{path}, line {number}, has {len(fields)} fields and the header "
                    f"{len(header)}: put one tab between two fields, and none into a text"
                )
            row = dict(zip(header, fields, strict=True))
            for name in columns:
                if not row[name].strip():
                    raise UserError(
                        f"{path}, line {number}, has nothing in the column {name}: leave the line "
                        "out, or fill it"
                    )
                texts[name].append(row[name])
            found.labels.append(row.get("label", ""))
            splits.append(row.get("split", "train"))
            found.places.append((path, number))
            names.append(row.get("id", str(len(names))))
    if not names:
        raise UserError(f"{files[0]} has a header and no rows: add some")
    _check_names(names, found.places)
    return found._replace(
        texts={name: _column(texts[name]) for name in columns},
        splits=splits if parted else None,
        names=(*names,),
    )


def _lines(path: Path) -> list[str]:
    data = content(path, _ADVICE)
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}, is no UTF-8 (byte {data[error.start]:#04x}): convert the file, "
            "for example with iconv"
        ) from None
    if not lines[-1]:
        lines.pop()  # the last line ended as all do
    return lines


def _column(texts: list[str]) -> Array:
    column = np.empty(len(texts), dtype=object)
    column[:] = texts
    return column


def _check_names(names: Sequence[str], places: Sequence[tuple[Path, int]]) -> None:
    seen: dict[str, int] = {}
    for row, name in enumerate(names):
        path, line = places[row]
        if not name or not name.isprintable():
            raise UserError(
                f"{path}, line {line}, has the id {brief(name)}: give a name that can be printed"
            )
        if (first := seen.setdefault(name, row)) != row:
            raise UserError(
                f"{path}, line {line}, has the id {brief(name)}, as line {places[first][1]} of "
                f"{places[first][0]}: give each row its own"
            )


def _known_classes(
    found: TextRows, rows: Sequence[int], declared: Sequence[str], spec: str
) -> tuple[str, ...]:
    """Return the classes that the user declares, or those of the labels of the rows in use."""
    labels = {found.labels[row] for row in rows} - {""}
    if not declared:
        if not labels:
            raise UserError(
                f"{spec} has no labels, so its classes are not known: give --classes a,b,c"
            )
        return tuple(sorted(labels))
    if labels <= set(declared):
        return tuple(declared)
    row = next(row for row in rows if found.labels[row] not in {"", *declared})
    path, line = found.places[row]
    raise UserError(
        f"{path}, line {line}, has the label {brief(found.labels[row])}, which is none of the "
        f"{len(declared)} classes: correct it, or declare it with --classes"
    )
