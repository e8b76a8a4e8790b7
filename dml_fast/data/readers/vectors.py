"""Vectors of any origin in one .npz file: ``vectors:FILE.npz``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dml_fast.data.features import RowSet
from dml_fast.data.npz import arrays_in, check_there
from dml_fast.data.readers.parts import ids_of_part, ids_of_parts, in_parts
from dml_fast.data.sets import RawData
from dml_fast.data.vector_features import VectorFeatures, array_name
from dml_fast.errors import UserError, brief

_SAVE = "save with numpy.savez(PATH, x=..., y=...)"
_OTHERS = ("y", "classes", "split", "id")

Array = npt.NDArray[Any]


class VectorFile(NamedTuple):
    """What a file holds: N rows in V views.

    Attributes:
        path: of the file.
        views: (N, D_v) float32 by name: the NAMEs of arrays ``x_NAME``, "" for the array ``x``.
        names: the rows' names: those of the array ``id``, otherwise their indices.
        labels: (N,) int64, -1 for none; with text in ``y`` indices of ``classes``; None without y.
        classes: the names of the classes that the file tells, or None.
        splits: N values of the array ``split``; None without one.
    """

    path: Path
    views: dict[str, npt.NDArray[np.float32]]
    names: tuple[str, ...]
    labels: npt.NDArray[np.int64] | None
    classes: tuple[str, ...] | None
    splits: tuple[str, ...] | None

    @classmethod
    def read(cls, path: Path) -> VectorFile:
        """Read all arrays of a file; no pickle is opened.

        Raises:
            UserError: the file is missing, damaged or no .npz file, or its arrays are of other
                names, types or lengths, or hold what they should not.
        """
        check_vectors(path)
        with arrays_in(path, str(path), _SAVE) as file:
            arrays = {name: file.read(name) for name in file.names}
        inputs = {name: a for name, a in arrays.items() if name not in _OTHERS}
        first = next(iter(inputs))
        count = len(inputs[first]) if inputs[first].ndim else 0
        for name, array in inputs.items():
            _check_numbers(path, name, array)
        for name, array in arrays.items():
            if name != "classes" and array.shape[:1] != (count,):
                raise UserError(
                    f"{path} has {name} of shape {array.shape} and {first} of {count} rows: give "
                    "one entry for each row"
                )
        names = _names(path, arrays["id"]) if "id" in arrays else tuple(map(str, range(count)))
        classes = _classes(path, arrays["classes"]) if "classes" in arrays else None
        labels = None
        if "y" in arrays:
            labels, classes = _labels(path, arrays["y"], classes)
        return cls(
            path,
            {name[2:]: _as_float32(path, name, a, names) for name, a in inputs.items()},
            names,
            labels,
            classes,
            tuple(_texts(path, "split", arrays["split"], "U", "text"))
            if "split" in arrays
            else None,
        )


def read_vectors(path: Path, *, levels: Sequence[str] | None, classes: Sequence[str]) -> RawData:
    """Read the rows of a file; those of ``split`` val and test are set aside.

    Args:
        path: of the file.
        levels: the names of the views to read, in the order of the students; () for all; None for
            data of one view.
        classes: the names of all classes; () for those that the file tells.

    Raises:
        UserError: see `VectorFile.read`; or there are no such views or classes.
    """
    file = VectorFile.read(path)
    views = _chosen(file, levels)
    known = _known_classes(file, classes)
    rows = _rows(file, views, known)
    ids = ids_of_parts(file.splits or ("train",) * len(rows), path)
    fit = partial(VectorFeatures.fit, names=views)
    return in_parts(path.stem, known, rows, ids, fit)


def read_vectors_part(
    path: Path, part: str, *, views: Sequence[str], classes: Sequence[str]
) -> RowSet:
    """Read one part of a file, which is all of a file that says no parts.

    Args:
        path: of the file.
        part: train, val or test.
        views: the names of the views to read.
        classes: the names of all classes.

    Raises:
        UserError: see `VectorFile.read`; or the file lacks a view, has other classes, or no rows of
            that part.
    """
    file = VectorFile.read(path)
    rows = _rows(file, check_views(file, views), classes)
    return rows.subset(ids_of_part(part, file.splits, len(rows), path))


def check_views(file: VectorFile, views: Sequence[str]) -> Sequence[str]:
    """Return the views that a run's students read, if the file has them.

    Raises:
        UserError: it lacks one.
    """
    for view in views:
        if view not in file.views:
            raise UserError(
                f"{file.path} has {', '.join(map(array_name, file.views))} and no "
                f"{array_name(view)}, which the run's students read: add it"
            )
    return views


def _rows(file: VectorFile, views: Sequence[str], classes: Sequence[str]) -> RowSet:
    columns = {name: file.views[name] for name in views}
    return RowSet(columns, _among(file, classes), names=file.names)


def check_vectors(path: Path) -> None:
    """Refuse what is no file of vectors, by the names of its arrays.

    Raises:
        UserError: it is not there, or no such file.
    """
    check_there(path, "an .npz file of vectors")
    with arrays_in(path, str(path), _SAVE) as file:
        _check_names(path, file.names)


def _check_names(path: Path, names: Sequence[str]) -> None:
    if not (inputs := [name for name in names if _is_input(name)]):
        there = ", ".join(map(brief, names)) or "no array"
        raise UserError(f"{path} has {there}, and neither x nor x_NAME: {_SAVE}")
    for name in names:
        if name not in _OTHERS and not _is_input(name):
            raise UserError(
                f"{path} has the array {brief(name)}, which is none of x, x_NAME, "
                f"{', '.join(_OTHERS)}: leave it out"
            )
    if "x" in inputs and len(inputs) > 1:
        raise UserError(
            f"{path} has x beside {inputs[1] if inputs[0] == 'x' else inputs[0]}: give one x, or "
            "several x_NAME"
        )


def _is_input(name: str) -> bool:
    return name == "x" or (name.startswith("x_") and len(name) > 2)


def _check_numbers(path: Path, name: str, array: Array) -> None:
    if array.ndim != 2 or array.dtype.kind not in "fiu" or 0 in array.shape:
        raise UserError(
            f"{path} has {name} of shape {array.shape} and type {array.dtype}: save numbers, "
            "(rows, columns)"
        )


def _as_float32(
    path: Path, name: str, array: Array, names: Sequence[str]
) -> npt.NDArray[np.float32]:
    """Return finite vectors (N, D) float32."""
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(array, dtype=np.float32)
    if len(wrong := np.flatnonzero(~np.isfinite(found).all(axis=1))):
        row = int(wrong[0])
        column = int(np.flatnonzero(~np.isfinite(found[row]))[0])
        raise UserError(
            f"{path} has {array[row, column]} in {name}, row {row} ({brief(names[row])}), column "
            f"{column}, which is no finite float32 number: leave {len(wrong)} such rows out, or "
            "fill them"
        )
    return found


def _texts(path: Path, name: str, array: Array, kinds: str, words: str) -> list[str]:
    """Return the N entries of a column as text.

    Raises:
        UserError: it has another shape or type.
    """
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise UserError(
            f"{path} has {name} of shape {array.shape} and type {array.dtype}: save {words}, one "
            "for each row"
        )
    return [str(entry) for entry in array.tolist()]


def _names(path: Path, ids: Array) -> tuple[str, ...]:
    names = _texts(path, "id", ids, "iuU", "whole numbers or text")
    seen: dict[str, int] = {}
    for row, name in enumerate(names):
        if not name or not name.isprintable():
            raise UserError(
                f"{path} has {brief(name)} for the id of row {row}: give a name in one line, "
                "without tabs"
            )
        if seen.setdefault(name, row) != row:
            raise UserError(
                f"{path} has {brief(name)} for the ids of the rows {seen[name]} and {row}: give "
                "each row its own"
            )
    return tuple(names)


def _classes(path: Path, array: Array) -> tuple[str, ...]:
    classes = _texts(path, "classes", array, "U", "text")
    if not classes or len(set(classes)) < len(classes) or not all(classes):
        raise UserError(
            f"{path} has {len(classes)} classes, of which {len(set(classes) - {''})} differ: give "
            "each class its own name"
        )
    return tuple(classes)


def _labels(
    path: Path, y: Array, classes: tuple[str, ...] | None
) -> tuple[npt.NDArray[np.int64], tuple[str, ...] | None]:
    """Return the label of each row, -1 for none, and the classes that labels of text tell."""
    if y.ndim == 1 and y.dtype.kind == "U":
        texts = _texts(path, "y", y, "U", "text")
        known = classes or tuple(sorted(set(texts) - {""}))
        place = {name: index for index, name in enumerate(known)} | {"": -1}
        for row, text in enumerate(texts):
            if text not in place:
                raise UserError(
                    f"{path} has {brief(text)} in y, row {row}, which is none of its "
                    f"{len(known)} classes: add it to them"
                )
        return np.array([place[text] for text in texts], np.int64), known or None
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise UserError(
            f"{path} has y of shape {y.shape} and type {y.dtype}: save whole numbers from 0, with "
            "-1 for rows without a label, or names of classes"
        )
    if len(wrong := np.flatnonzero((y < -1) | (y >= 2**31))):
        row = int(wrong[0])
        raise UserError(
            f"{path} has {y[row]} in y, row {row}: give whole numbers from 0, and -1 for rows "
            "without a label"
        )
    return y.astype(np.int64), classes


def _chosen(file: VectorFile, levels: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the views to read."""
    there = [name for name in file.views if name]
    if levels is None:
        if len(file.views) > 1:
            raise UserError(
                f"{file.path} has the views {', '.join(map(brief, there))}: add --views levels, so "
                "that each student reads one of them"
            )
        return tuple(file.views)
    if not there:
        raise UserError(
            f"{file.path} has one array x and no views x_NAME: give a file with "
            "views, or leave out --views levels"
        )
    for name in levels:
        if name not in file.views or not name:
            raise UserError(
                f"--levels names {brief(name)}, and {file.path} has the views "
                f"{', '.join(map(brief, there))}: give some of these"
            )
    return tuple(levels) or tuple(there)


def _known_classes(file: VectorFile, declared: Sequence[str]) -> tuple[str, ...]:
    """Return the classes that the user declares, or those that the file tells."""
    if declared or file.classes:
        return tuple(declared or file.classes or ())
    if file.labels is None or file.labels.max() < 0:
        lack = "no y" if file.labels is None else "no label in y"
        raise UserError(
            f"{file.path} has {lack}, so its classes are not known: give --classes a,b,c, or save "
            "the array classes"
        )
    count = int(file.labels.max()) + 1
    if count > len(file.labels):
        raise UserError(
            f"{file.path} has the class {count - 1} in y and {len(file.labels)} rows: number the "
            "classes from 0, or save the array classes with their names"
        )
    return tuple(map(str, range(count)))


def _among(file: VectorFile, classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return labels as indices of these classes, -1 for none."""
    if file.labels is None:
        return np.full(len(file.names), -1, np.int64)
    place = {name: index for index, name in enumerate(classes)}
    own = classes if file.classes is None else file.classes
    for label in np.unique(file.labels[file.labels >= 0]).tolist():
        if label >= len(own):
            row = int(np.flatnonzero(file.labels == label)[0])
            raise UserError(
                f"{file.path} has class {label} in y, row {row}, and there are {len(own)} classes: "
                f"give numbers from 0 to {len(own) - 1}"
            )
        if own[label] not in place:
            raise UserError(
                f"{file.path} has the class {brief(own[label])} in y, which is none of the "
                f"{len(classes)} classes: correct it, or declare all classes with --classes"
            )
    table = np.array([place.get(name, -1) for name in own] + [-1], np.int64)
    return table[file.labels]  # -1 takes the last entry
