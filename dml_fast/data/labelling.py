"""Which rows are for training, which for validation, and which of them show their label.

Everything here is about labels and names; pixels and vectors are not looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from dml_fast.data.label_files import LabelFile
from dml_fast.data.splits import (
    add_label_noise,
    hide_labels,
    rarest_label,
    split_validation,
    take_fraction,
)
from dml_fast.errors import UserError
from dml_fast.foreign import shown

Ids = npt.NDArray[np.int64]

_NAMED = 5  # classes in a warning
_log = logging.getLogger("dml_fast")


@dataclass(frozen=True)
class Labelling:
    """The options of `dml_fast.data.open_dataset` about rows and labels."""

    val_fraction: float = 0.1
    train_fraction: float = 1.0
    label_noise: float = 0.0
    labels: str = ""
    labels_per_class: int = 0
    unlabelled_share: float | Literal["auto"] = "auto"
    seed: int = 0


class Rows(Protocol):
    """N rows of a data set."""

    @property
    def labels(self) -> Ids:
        """(N,) int64, -1 for none; or (N, C), 0 or 1, where rows may have several labels."""

    @property
    def names(self) -> Sequence[str]:
        """N names."""


class Chosen(NamedTuple):
    """What becomes of the rows that a reader found.

    Attributes:
        rows: (n,) int64, increasing indices of the reader's training rows that stay for training.
        labels: (n,) int64, their labels.
        hidden: (n,) int64, their labels before a file or an option changed them; None if none did.
        used: (m,) int64, which of the n are trained on; None for all.
        val: (v,) int64, which of the reader's training rows are for validation.
        val_labels: labels of the validation rows; where the reader has none, those of the file.
        test_labels: likewise of the test rows; None without test rows.
    """

    rows: Ids
    labels: Ids
    hidden: Ids | None
    used: Ids | None
    val: Ids
    val_labels: Ids
    test_labels: Ids | None


def choose_rows(
    train: Rows,
    val: Rows | None,
    test: Rows | None,
    classes: Sequence[str],
    how: Labelling,
    corrupt: Iterable[str] = (),
) -> Chosen:
    """Split rows, hide labels and make some wrong, in the order that docs/data.md gives.

    Args:
        train: the reader's training rows.
        val: its validation rows; None to take some of ``train`` that have a label.
        test: its test rows.
        classes: the names of all classes.
        how: the options.
        corrupt: names of files that the reader left out.

    Raises:
        UserError: no training, validation or test row has a label, no row is left for validation,
            or the file of labels is wrong.
    """
    if train.labels.ndim == 2:
        return _choose_several(train, val, test, classes, how)
    own, rows, aside = train.labels, np.arange(len(train.labels)), np.arange(0)
    file = LabelFile(how.labels, classes) if how.labels else None
    given = None if file is None else file.of(train.names)
    val_given, test_given = (
        None if file is None or part is None else file.of(part.names) for part in (val, test)
    )
    if file is not None:
        file.check(corrupt, next(iter(train.names)))
    test_labels = None if test is None else _filled(test.labels, test_given)
    if val is not None:
        val_labels = _filled(val.labels, val_given)
    else:
        # the reader's labels first: so a file that grows moves no row
        source = given if given is not None and (own < 0).all() else own
        _check_some(source, how)
        rows, aside = split_validation(source, how.val_fraction)
        val_labels = source[aside]
        val_given = None if given is None else given[aside]
    if how.train_fraction < 1.0:
        rows = rows[take_fraction(own[rows], how.train_fraction, how.seed)]
    labels, hidden = own[rows], None
    if file is not None and given is not None:
        labels, hidden = given[rows], labels
        named = sum(_known(part) for part in (val_given, test_given) if part is not None)
        _say_what_was_given(file, labels, hidden, named)
    if how.labels_per_class:
        hidden = labels if hidden is None else hidden
        _say_who_has_few(labels, classes, how.labels_per_class)
        labels = hide_labels(labels, how.labels_per_class, how.seed)
    _check_some(labels, how)
    if without := np.setdiff1d(np.arange(len(classes)), labels).tolist():
        _log.warning("no training row has a label of %s", _names(classes, without))
    if how.label_noise > 0.0:
        hidden = labels if hidden is None else np.where(hidden < 0, labels, hidden)
        labels = add_label_noise(labels, len(classes), how.label_noise, how.seed)
    return Chosen(rows, labels, hidden, _used(labels, how), aside, val_labels, test_labels)


def _choose_several(
    train: Rows, val: Rows | None, test: Rows | None, classes: Sequence[str], how: Labelling
) -> Chosen:
    """Split rows that may have several labels, in proportion to the rarest label of each.

    Raises:
        UserError: an option is about rows of one class, or no row is left for validation.
    """
    for name in ("labels", "labels_per_class", "label_noise"):
        if getattr(how, name):
            raise UserError(
                f"--{name.replace('_', '-')} is for rows of one class, and those of the data may "
                "have several (labels.csv): leave it out"
            )
    labels, rows, aside = train.labels, np.arange(len(train.labels)), np.arange(0)
    rarest = rarest_label(labels)
    if val is None:
        rows, aside = split_validation(rarest, how.val_fraction)
    if how.train_fraction < 1.0:
        rows = rows[take_fraction(rarest[rows], how.train_fraction, how.seed)]
    if without := np.flatnonzero(~labels[rows].any(0)).tolist():
        _log.warning("no training row has a label of %s", _names(classes, without))
    val_labels = labels[aside] if val is None else val.labels
    test_labels = None if test is None else test.labels
    return Chosen(rows, labels[rows], None, None, aside, val_labels, test_labels)


def _known(labels: Ids) -> int:
    return int((labels >= 0).sum())


def _filled(own: Ids, given: Ids | None) -> Ids:
    """Return the reader's labels, those of a file where the reader has none."""
    return own if given is None else np.where(own < 0, given, own)


def _check_some(labels: Ids, how: Labelling) -> None:
    if not _known(labels):
        remedy = f"name some in --labels {how.labels}" if how.labels else "give --labels FILE"
        raise UserError(
            f"none of {len(labels)} training rows has a label, so nothing can be learned: {remedy}"
        )


def _used(labels: Ids, how: Labelling) -> Ids | None:
    """Return the rows to train on, None for all, and say what happens to those without a label."""
    known = np.flatnonzero(labels >= 0)
    without = len(labels) - len(known)
    if not without:
        return None
    if how.unlabelled_share == 0:
        _log.info("%d training rows without a label are left out (--unlabelled-share 0)", without)
        return known
    _log.info("%d training rows have a label and %d have none", len(known), without)
    return None


def _say_what_was_given(file: LabelFile, labels: Ids, before: Ids, named: int) -> None:
    """Log what a file of labels did to the training rows, which had other labels before."""
    here = _known(labels)
    lost = int(((labels < 0) & (before >= 0)).sum())
    pieces = [f"{here} training rows have a label"]
    if lost:
        pieces.append(f"{lost} lose theirs")
    if named:
        pieces.append(f"validation or test rows that it names, which stay as they are: {named}")
    if unused := len(file) - here - named:
        pieces.append(f"rows that it names and that are not in use: {unused}")
    _log.info("--labels %s: %s", file.path, "; ".join(pieces))


def _say_who_has_few(labels: Ids, classes: Sequence[str], keep: int) -> None:
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    if few := np.flatnonzero((counts > 0) & (counts < keep)).tolist():
        _log.warning(
            "--labels-per-class %d: all labels of %s are kept, as there are fewer",
            keep,
            _names(classes, few),
        )


def _names(classes: Sequence[str], labels: Sequence[int]) -> str:
    """Return the names of some classes for a message: "class a" or "3 classes (a, b, c)"."""
    first = ", ".join(shown(classes[label]) for label in labels[:_NAMED])
    if len(labels) == 1:
        return f"class {first}"
    return f"{len(labels)} classes ({first}{', ...' if len(labels) > _NAMED else ''})"
