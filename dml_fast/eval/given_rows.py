"""Rows that a user names, of vectors or of text, as the features of a run make them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dml_fast.data import VectorSet
from dml_fast.data.feature_files import Columns
from dml_fast.data.features import Features
from dml_fast.data.readers.text import read_rows
from dml_fast.data.readers.vectors import VectorFile, check_views
from dml_fast.errors import UserError
from dml_fast.foreign import shown
from dml_fast.runs.folder import Run


def read_given_rows(given: Sequence[Path], run: Run) -> VectorSet:
    """Read files in the form of the run's data; labels in them are not looked at.

    Args:
        given: an .npz file of vectors, or .tsv files of text.
        run: whose students read such rows.

    Returns:
        The rows with their names and without labels.

    Raises:
        UserError: a file is not as the run's data, or there are two files of vectors.
    """
    assert run.features is not None
    kind = run.config.data.partition(":")[0]
    columns, names = _vectors(given, run.features) if kind == "vectors" else _texts(given)
    views = run.features.transform(columns)
    return VectorSet(views, np.full(len(names), -1, np.int64), names=names)


def _vectors(given: Sequence[Path], features: Features) -> tuple[Columns, Sequence[str]]:
    if len(given) > 1:
        raise UserError(
            f"{shown(given[1])} is a second file, and the run's students read vectors of one .npz "
            "file: give one at a time"
        )
    file = VectorFile.read(given[0])
    return {view: file.views[view] for view in check_views(file, features.names)}, file.names


def _texts(given: Sequence[Path]) -> tuple[Columns, Sequence[str]]:
    rows = read_rows(given)
    return rows.texts, rows.names
