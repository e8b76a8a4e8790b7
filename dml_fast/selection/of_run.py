"""Rows of a finished run's data to label next, and labelled rows whose label is doubtful."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dml_fast.data.label_files import LabelFile
from dml_fast.data.pairs import PairSet
from dml_fast.data.philox import Draws, uniform
from dml_fast.errors import UserError, escaped
from dml_fast.eval.prediction_files import STDOUT, new_file
from dml_fast.runs.files import check_place
from dml_fast.runs.trained import open_data
from dml_fast.selection.committee import Committee, Opinions, Rows
from dml_fast.selection.scores import Floats, How, Ids, Mask, Score, acquire

_log = logging.getLogger("dml_fast")
_COLUMNS = ("name", "score", "predicted", "probability")
_SUSPECT_COLUMNS = ("name", "label", "label_probability", "predicted", "probability")


class Selected(NamedTuple):
    """What was done.

    Attributes:
        words: which rows were written, of how many, and by whom.
        planted: how many of the chosen labels are known to be wrong; "" where nothing is known.
    """

    words: str
    planted: str = ""


def select_next(
    committee: Committee, count: int, *, score: Score, how: How, seed: int, out: str
) -> Selected:
    """Choose rows without a label, in the order in which to label them, and write them.

    Args:
        committee: the students of a run, among whose training data the rows are. Those that the
            file of ``--labels`` names by now are left out.
        count: how many; all that there are if that is more, which one line says.
        score: by what: a name of `dml_fast.selection.scores.Scores`, or random.
        how: see `dml_fast.selection.scores.acquire`.
        seed: for ``power`` and random.
        out: the new file of tab-separated values, or - for the standard output: name, score,
            predicted class, and its probability by the ensemble.

    Raises:
        UserError: every row has a label; the run's data have changed; the students cannot disagree;
            the file cannot be written.
    """
    run = committee.run
    check_committee(score, len(committee.models), str(run.folder))
    train, classes = _open(committee, out, unlabelled=True)
    pool = np.flatnonzero((train.labels < 0) & ~_labelled_since(committee, train, classes))
    if not len(pool):
        raise UserError(
            f"every row that {run.folder} could train on has a label, so there is none to choose: "
            "give a run of data with unlabelled rows, or --suspects for labels to check"
        )
    if score == "mutual_information" and run.config.unlabelled_share != 0:
        raise UserError(unfit_for_information(f"{run.folder} was trained"))
    found = committee.ask(train, pool)
    places = choose(found, len(train), count, score=score, how=how, seed=seed)
    values = score_values(found, len(train), score, seed)
    rows = [
        [
            train.names[found.ids[i]],
            _number(values[i]),
            _class(classes, found.predicted[i]),
            _number(found.probability[i]),
        ]
        for i in places
    ]
    _write(out, _COLUMNS, rows)
    words = f"{len(rows)} of {len(found.ids):,} rows without a label, by {score}, {how}"
    return Selected(f"{words}; {committee}")


def select_suspects(committee: Committee, count: int, *, out: str) -> Selected:
    """Choose the labelled training rows whose label the ensemble doubts most.

    The order is that of the label's normalised margin, lowest first: its probability minus the
    largest of the other classes (Northcutt, Jiang and Chuang, JAIR 2021, arXiv 1911.00068). The
    students have learned these labels, wrong ones too: the order says less where they know them by
    heart.

    Args:
        committee: the students of a run, whose training rows are judged.
        count: how many; all that there are if that is more, which one line says.
        out: the new file of tab-separated values, or - for the standard output: name, label, its
            probability, predicted class, and its probability.

    Returns:
        What was done; where labels were made wrong on purpose, or the data's own are known, how
        many of the chosen ones are wrong.

    Raises:
        UserError: the run's data have changed, or the file cannot be written.
    """
    train, classes = _open(committee, out, unlabelled=False)
    found = committee.ask(train, np.flatnonzero(train.labels >= 0))
    agrees = found.predicted == train.labels[found.ids]
    gap = 1.0 - found.scores.margin  # of the two largest probabilities
    margin = np.where(agrees, gap, found.of_label - found.probability)
    places = acquire(-margin, _at_most(count, found), how="topk")
    rows = [
        [
            train.names[found.ids[i]],
            _class(classes, train.labels[found.ids[i]]),
            _number(found.of_label[i]),
            _class(classes, found.predicted[i]),
            _number(found.probability[i]),
        ]
        for i in places
    ]
    _write(out, _SUSPECT_COLUMNS, rows)
    words = f"{len(rows)} of {len(found.ids):,} labelled rows, the most doubtful labels first"
    return Selected(f"{words}; {committee}", _planted(train, found.ids, places))


def check_committee(score: str, students: int, who: str) -> None:
    """Refuse a committee of one where disagreement is the score.

    Raises:
        UserError: it is so.
    """
    if score == "mutual_information" and students < 2:
        raise UserError(
            f"--score mutual_information is how much students disagree, and {who} has one: give "
            "--score margin"
        )


def unfit_for_information(who_was_trained: str) -> str:
    """Say why students that agreed on a pool cannot tell its rows apart by disagreement."""
    return (
        f"{who_was_trained} to agree on the unlabelled rows, which takes --score "
        "mutual_information of them towards 0: give --score margin"
    )


def choose(found: Opinions, rows: int, count: int, *, score: Score, how: How, seed: int) -> Ids:
    """Return the places in ``found`` of the rows to label next, (min(count, n),) int64.

    Random numbers are drawn for each row of the training set, so that those of a row do not depend
    on which others have a label.

    Args:
        found: opinions on the pool; its ``ids`` are of the training set.
        rows: of the training set, N.
        count: how many are wanted.
        score: by what.
        how: see `dml_fast.selection.scores.acquire`.
        seed: of the draw.
    """
    places = np.full(rows, -1)
    places[found.ids] = np.arange(len(found.ids))
    values = np.full(rows, np.nan)
    values[found.ids] = score_values(found, rows, score, seed)
    count = _at_most(count, found)
    chosen = acquire(values, count, how=how, seed=seed, exclude=np.flatnonzero(places < 0))
    picked: Ids = places[chosen]
    return picked


def score_values(found: Opinions, rows: int, score: Score, seed: int) -> Floats:
    """Return the scores of a name for the rows of ``found``, (n,) float64."""
    if score == "random":
        return uniform(Draws(seed, "random score").words(np.arange(rows), 0, 1)[0])[found.ids]
    values: Floats = getattr(found.scores, score)
    return values


def _at_most(count: int, found: Opinions) -> int:
    if count > len(found.ids):
        _log.warning(
            "%d rows were asked for and there are %d: all are chosen", count, len(found.ids)
        )
    return min(count, len(found.ids))


def _planted(train: Rows, ids: Ids, places: Ids) -> str:
    """Say how many labels are not those that the data had, of the chosen and of all."""
    if train.hidden is None:
        return ""
    known = train.hidden[ids] >= 0
    wrong = known & (train.labels[ids] != train.hidden[ids])
    if not wrong.any():
        return ""
    hits, of_all = int(wrong[places].sum()), int(wrong.sum())
    return (
        f"labels that are not the data's own: {hits} of the {len(places)} chosen "
        f"({hits / len(places):.1%}), {of_all} of all {len(ids)} ({of_all / len(ids):.1%})"
    )


def _open(committee: Committee, out: str, *, unlabelled: bool) -> tuple[Rows, tuple[str, ...]]:
    """Return the training rows and the classes of the run's data; a bad ``--out`` is refused."""
    if out != STDOUT:
        check_place(Path(out), "--out")
    remedy = "restore them, or train again with the new ones"
    data = open_data(committee.run, unlabelled=unlabelled, remedy=remedy)
    assert not isinstance(data.train, PairSet)
    return data.train, data.classes


def _labelled_since(committee: Committee, train: Rows, classes: tuple[str, ...]) -> Mask:
    """Return which rows (N,) the run's file of labels names by now: some may be new."""
    given = committee.run.config.labels
    file = Path(given).expanduser()
    if not (given and file.is_file()):
        return np.zeros(len(train), dtype=bool)
    named: Mask = LabelFile(file, classes).of(train.names) >= 0
    if new := int((named & (train.labels < 0)).sum()):
        _log.warning("%d rows have a label in %s since the run was trained: left out", new, file)
    return named


def _class(classes: Sequence[str], label: int) -> str:
    return classes[label] if label >= 0 else ""


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6g}"


def _write(out: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    lines = "".join("\t".join(map(escaped, row)) + "\n" for row in (columns, *rows)).encode()
    if out == STDOUT:
        sys.stdout.buffer.write(lines)
        sys.stdout.buffer.flush()
        return
    with new_file("--out", Path(out)) as file:
        file.write(lines)
