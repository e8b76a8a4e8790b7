"""``folder:DIR`` with DIR/labels.csv: images that may have several labels, or none.

The first column of the file is ``file``, an image by its path below DIR, such as train/a/1.jpg;
each further column is a class, with 1 where the image has that label and 0 where it has not. Images
are in DIR/train, and optionally in DIR/val and DIR/test, in folders that mean nothing.
"""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from dml_fast.data.listing import BESIDE, OTHER, PassedOver, entries, images_below, is_folder
from dml_fast.data.names import Names
from dml_fast.data.reading import Reading, image_data, load
from dml_fast.data.sets import ImageSet, RawData
from dml_fast.data.storage import LooseFiles
from dml_fast.errors import UserError, brief, escaped
from dml_fast.foreign import content, reading, shown, utf8

LABELS = "labels.csv"
_PARTS = ("train", "val", "test")
_FIRST = "file"
_FORM = "write a line file,CLASS,CLASS,... and then for each image its path and 0 or 1"


class LabelTable(NamedTuple):
    """What labels.csv says.

    Attributes:
        classes: C names, in the order of the columns.
        labels: (N, C) int64, 0 or 1.
        rows: which of the N rows is a file's, by its `escaped` path below the folder.
        lines: (N) the line of each row, from 1.
    """

    classes: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    rows: dict[str, int]
    lines: list[int]


def has_label_table(root: Path) -> bool:
    """Return whether a folder has such a file of labels."""
    return os.path.lexists(root / LABELS)


def check_several_labels(root: Path) -> None:
    """Check the file of labels and that there is a train folder, without reading images.

    Raises:
        UserError: what is wrong, and in which line.
    """
    if not os.path.isdir(root / "train"):
        raise UserError(
            f"folder:{root} has {LABELS} and no train folder: put images in {root}/train"
        )
    read_table(root / LABELS)


def read_table(path: Path) -> LabelTable:
    """Read a file of labels.

    Raises:
        UserError: it cannot be read, or a line of it is wrong.
    """

    def refuse(line: int, what: str) -> NoReturn:
        raise UserError(f"{shown(path)}: line {line} {what}")

    text = utf8(content(path), refuse)
    with reading(path, "write it as CSV"):
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        found = [(lines.line_num, columns) for columns in lines if columns]
    if not found:
        raise UserError(f"{shown(path)} is empty: {_FORM}")
    line, (first, *classes) = found[0]
    if first.strip() != _FIRST:
        refuse(
            line,
            f"begins with {brief(first)} and not with {_FIRST}: {_FORM}; or rename the file if its "
            f"folders are the classes",
        )
    classes = [name.strip() for name in classes]
    if not classes or "" in classes or len(set(classes)) < len(classes):
        refuse(line, f"names no class, one without a name, or one twice: {_FORM}")
    rows: dict[str, int] = {}
    values = np.zeros((len(found) - 1, len(classes)), np.int64)
    for number, (line, (name, *cells)) in enumerate(found[1:]):
        if len(cells) != len(classes):
            refuse(
                line,
                f"has {len(cells)} labels and the first line {len(classes)} classes: give one for "
                "each",
            )
        if wrong := [
            (one, cell)
            for one, cell in zip(classes, cells, strict=True)
            if cell.strip() not in ("0", "1")
        ]:
            called, cell = wrong[0]
            refuse(line, f"has {brief(cell)} for class {brief(called)}: write 0 or 1")
        values[number] = [cell.strip() == "1" for cell in cells]
        key = escaped(name)
        if key.split("/")[0] not in _PARTS or "/" not in key:
            refuse(
                line,
                f"names {brief(name)}: write a path below the folder that begins with "
                f"{', '.join(f'{part}/' for part in _PARTS)}",
            )
        if key in rows:
            refuse(line, f"names {brief(name)} a second time: remove one of the lines")
        rows[key] = number
    if not rows:
        raise UserError(f"{shown(path)} names no image: {_FORM}")
    return LabelTable(tuple(classes), values, rows, [line for line, _ in found[1:]])


def read_several_labels(root: Path, how: Reading) -> RawData:
    """Read such a folder, or list its files for a decoder.

    Args:
        root: the folder.
        how: how to read it.

    Returns:
        The rows; their labels are (N, C) int64, 0 or 1.

    Raises:
        UserError: the file of labels is wrong, it and the folder do not have the same images, a
            part has none, a file is corrupt, sizes differ, or the images do not fit in memory.
    """
    check_several_labels(root)
    table = read_table(root / LABELS)
    passed = PassedOver()
    for entry in entries(root, passed):
        if entry.name not in (*_PARTS, LABELS):
            passed.add(BESIDE if is_folder(entry) else OTHER, entry.path)
    listing = {
        part: images_below(root / part, passed) for part in _PARTS if os.path.isdir(root / part)
    }
    passed.report(root)
    for part, paths in listing.items():
        if not paths:
            raise UserError(f"{root / part} holds no images: add some or remove it")
    files = LooseFiles.of([path for paths in listing.values() for path in paths])
    names = Names.of_files(root, files)
    labels = table.labels[_rows(root, table, names)]
    loaded = load(root, files, how)
    sets, end = {}, 0
    for part, paths in listing.items():
        start, end = end, end + len(paths)
        piece = loaded.among(start, end)
        kept = loaded.kept[piece]
        if not len(kept):
            raise UserError(
                f"{root / part} holds no image that can be decoded: add some or remove it"
            )
        sets[part] = ImageSet(
            loaded.images[piece], labels[kept], manifest=loaded.manifest[piece], names=names[kept]
        )
    return image_data(root, table.classes, sets, loaded)


def _rows(root: Path, table: LabelTable, names: Names) -> npt.NDArray[np.int64]:
    """Return the row of each file in the table; refuse a file, or a row, that the other lacks."""
    found, missing = [], dict(table.rows)
    for name in map(escaped, names):
        if (row := missing.pop(name, None)) is None:
            raise UserError(
                f"{root / LABELS} has no line for the image {shown(name)}: add one, with 0 for "
                "every class if it has no label"
            )
        found.append(row)
    for name, row in missing.items():
        raise UserError(
            f"{root / LABELS}: line {table.lines[row]} names {shown(name)}, and there is no such "
            "image: remove the line, or restore the file"
        )
    return np.array(found, np.int64)
