"""Which rows of a file are for training, for validation and for testing."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dml_fast.data.features import Fit, RowSet
from dml_fast.data.sets import RawData
from dml_fast.errors import UserError, brief

_PARTS = {"train": "train", "val": "val", "dev": "val", "test": "test"}

_log = logging.getLogger("dml_fast")

Ids = npt.NDArray[np.int64]


def ids_of_parts(splits: Sequence[str], where: str | os.PathLike[str]) -> dict[str, Ids]:
    """Return the rows of each part, (n,) int64 and rising; log how many are of none.

    Args:
        splits: of each row, train, val (or dev), test, or what else the file says.
        where: the file.

    Raises:
        UserError: none is for training.
    """
    ids = _ids(splits, where)
    if not len(ids["train"]):
        raise UserError(f"{where} has no row whose split is train: mark the rows to learn from")
    return ids


def in_parts(
    name: str, classes: tuple[str, ...], rows: RowSet, ids: Mapping[str, Ids], fit: Fit
) -> RawData:
    """Return rows that are no images as a data set.

    Args:
        name: of the data.
        classes: the names of all classes.
        rows: of all parts.
        ids: of `ids_of_parts`.
        fit: from the training rows to their features.
    """
    val, test = (rows.subset(ids[part]) if len(ids[part]) else None for part in ("val", "test"))
    return RawData(name, classes, rows.subset(ids["train"]), val, test, pad=0, flip=False, fit=fit)


def ids_of_part(
    part: str, splits: Sequence[str] | None, count: int, where: str | os.PathLike[str]
) -> Ids:
    """Return the rows of one part (n,) int64, which are all N of a file that says no parts.

    Args:
        part: train, val or test.
        splits: as for `ids_of_parts`; None for a file that says none.
        count: N.
        where: the file.

    Raises:
        UserError: there are none.
    """
    ids = np.arange(count) if splits is None else _ids(splits, where)[part]
    if not len(ids):
        raise UserError(
            f"{where} has no row whose split is {part}: give another --split, or a file that "
            "leaves split out, of which all rows are taken"
        )
    return ids


def _ids(splits: Sequence[str], where: str | os.PathLike[str]) -> dict[str, Ids]:
    parts = np.array([_PARTS.get(split, "") for split in splits])
    if others := Counter(split for split in splits if split not in _PARTS):
        counts = ", ".join(f"{brief(split)} ({n})" for split, n in others.most_common(4))
        _log.warning(
            "%s: %d rows are left out, as their split is none of train, val, dev, test: %s",
            *(where, others.total(), counts),
        )
    return {part: np.flatnonzero(parts == part) for part in ("train", "val", "test")}
