"""Rows without a label: the order of the options, what is drawn among whom, what stays the same."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dml_fast.data import DataSet, ImageSet, open_dataset
from dml_fast.data.features import RowSet
from dml_fast.data.labelling import Labelling, choose_rows
from dml_fast.data.names import Names
from dml_fast.data.sets import RawData, build_dataset
from dml_fast.data.splits import add_label_noise, hide_labels, split_validation, take_fraction
from dml_fast.data.vector_features import VectorFeatures
from dml_fast.errors import UserError

CLASSES = ("a", "b", "c")


def images(labels: list[int] | np.ndarray, first: int = 0) -> ImageSet:
    rng = np.random.default_rng(first)
    pixels = rng.integers(0, 256, (len(labels), 1, 3, 3), dtype=np.uint8)
    names = Names.numbered(len(labels), first=first)
    return ImageSet(pixels, np.array(labels, dtype=np.int64), names=names)


def raw_data(train: ImageSet, val: ImageSet | None = None, test: ImageSet | None = None) -> RawData:
    return RawData("x", CLASSES, train, val, test, pad=1, flip=False)


def mixed(labelled: int = 60, without: int = 30) -> ImageSet:
    """Return labelled rows with others between them, in a fixed disorder."""
    labels = np.concatenate([np.arange(labelled) % 3, np.full(without, -1)])
    return images(np.random.default_rng(1).permutation(labels))


def built(train: ImageSet, unlabelled: bool = False, **options: object) -> DataSet:
    return build_dataset(raw_data(train), Labelling(**options), unlabelled=unlabelled)  # type: ignore[arg-type]


def written(tmp_path: Path, lines: dict[str, str]) -> str:
    path = tmp_path / "labels.tsv"
    path.write_text("".join(f"{name}\t{label}\n" for name, label in lines.items()))
    return str(path)


@pytest.mark.parametrize(
    "options",
    [{}, {"train_fraction": 0.5}, {"labels_per_class": 4}, {"label_noise": 0.3},
     {"train_fraction": 0.6, "labels_per_class": 5, "label_noise": 0.5, "seed": 3}],
)  # fmt: skip
def test_with_a_share_of_zero_all_is_as_without_these_rows(options: dict) -> None:
    """The options draw the same rows, labels and statistics, whatever is between them."""
    train = mixed()
    alone = train.subset(np.flatnonzero(train.labels >= 0))
    off, plain = built(train, unlabelled_share=0.0, **options), built(alone, **options)
    if "labels_per_class" in options:  # these hide labels of the other set too
        plain = built(alone, unlabelled_share=0.0, **options)
    assert list(off.train.names) == list(plain.train.names)
    assert (off.mean, off.std) == (plain.mean, plain.std) and off.fingerprint == plain.fingerprint
    for part in ("train", "val"):
        ours, theirs = getattr(off, part), getattr(plain, part)
        np.testing.assert_array_equal(ours.images, theirs.images)
        np.testing.assert_array_equal(ours.labels, theirs.labels)


def test_the_rows_that_are_left_out_can_be_kept_for_the_pool() -> None:
    train = mixed()
    off, kept = (built(train, unlabelled_share=0.0, unlabelled=flag) for flag in (False, True))
    assert (len(off.train), len(kept.train)) == (54, 84) and (kept.train.labels < 0).sum() == 30
    assert (kept.fingerprint, kept.mean, kept.std) == (off.fingerprint, off.mean, off.std)
    assert built(train).fingerprint != off.fingerprint


def test_labels_that_an_option_hid_go_with_their_rows() -> None:
    train = mixed()
    data = built(train, labels_per_class=5, label_noise=0.4, unlabelled_share=0.0)
    truth = dict(zip(train.names, train.labels.tolist(), strict=True))
    assert data.train.hidden is not None and len(data.train) == 15
    assert data.train.hidden.tolist() == [truth[name] for name in data.train.names]
    assert (data.train.hidden != data.train.labels).sum() == 6


def test_draws_among_labelled_rows_are_those_of_before_rows_could_lack_a_label() -> None:
    """The SHA-256 is that of commit ac34b4e, so that runs of then can be resumed."""
    data = open_dataset("digits", train_fraction=0.3, label_noise=0.2, seed=4)
    expected = "cb4eaf55617e1a8d228ebe28acd41e5f43c0d3539d20240ae2789046c3718872"
    assert data.fingerprint == expected


def test_splits_fractions_and_noise_leave_rows_without_a_label_alone() -> None:
    labels = mixed().labels
    train, val = split_validation(labels, 0.2)
    assert len(val) == 12 and (labels[val] >= 0).all() and (labels[train] < 0).sum() == 30
    half = take_fraction(labels, 0.5, 7)
    assert np.bincount(labels[half] + 1).tolist() == [15, 10, 10, 10]
    noisy = add_label_noise(labels, 3, 0.3, 1)
    assert (noisy != labels).sum() == 18 and ((noisy < 0) == (labels < 0)).all()


def test_kept_labels_are_so_many_of_each_class_and_nested() -> None:
    labels = mixed().labels
    few, many = hide_labels(labels, 3, seed=1), hide_labels(labels, 10, seed=1)
    assert np.bincount(few + 1).tolist() == [81, 3, 3, 3]
    assert (few[few >= 0] == labels[few >= 0]).all() and (many[few >= 0] >= 0).all()
    assert (few != hide_labels(labels, 3, seed=2)).any()
    np.testing.assert_array_equal(hide_labels(labels, 20, seed=1), labels)


def test_the_order_of_fraction_file_labels_per_class_and_noise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dml_fast")
    train = images(np.arange(60) % 3)
    plain = built(train, train_fraction=0.5)
    dropped = sorted(set(train.names) - set(plain.train.names) - set(plain.val.names))
    named = [*list(plain.train.names)[:20], plain.val.names[0], dropped[0]]
    assert len(plain.train) == 27 and not caplog.records
    file = written(tmp_path, dict.fromkeys(named[:9], "a") | dict.fromkeys(named[9:], "b"))
    data = built(train, train_fraction=0.5, labels=file)
    assert list(data.train.names) == list(plain.train.names)
    assert data.train.labels.tolist() == [0] * 9 + [1] * 11 + [-1] * 7
    assert data.train.hidden is not None
    np.testing.assert_array_equal(data.train.hidden, plain.train.labels)
    np.testing.assert_array_equal(data.val.labels, plain.val.labels)
    assert [record.getMessage() for record in caplog.records] == [
        f"--labels {file}: 20 training rows have a label; 7 lose theirs; validation or test rows "
        "that it names, which stay as they are: 1; rows that it names and that are not in use: 1",
        "no training row has a label of class c",
        "20 training rows have a label and 7 have none",
    ]
    few = built(train, train_fraction=0.5, labels=file, labels_per_class=4, seed=0)
    assert np.bincount(few.train.labels + 1).tolist() == [19, 4, 4]
    noisy = built(train, train_fraction=0.5, labels=file, labels_per_class=4, label_noise=0.5)
    known = few.train.labels >= 0
    assert (noisy.train.labels[known] != few.train.labels[known]).sum() == 4
    assert (noisy.train.labels[~known] < 0).all() and noisy.train.hidden is not None
    np.testing.assert_array_equal(noisy.train.hidden, plain.train.labels)


def test_hidden_labels_are_those_before_noise_where_only_a_file_has_some(tmp_path: Path) -> None:
    train, val = images([-1] * 20), images([0, 1, 2], first=100)
    file = written(tmp_path, {str(i): CLASSES[i % 3] for i in range(12)})
    data = build_dataset(raw_data(train, val), Labelling(labels=file, label_noise=0.5))
    assert data.train.hidden is not None
    assert data.train.hidden.tolist() == [i % 3 for i in range(12)] + [-1] * 8
    assert (data.train.labels != data.train.hidden).sum() == 6
    assert built(images(np.arange(30) % 3)).train.hidden is None


def test_rows_for_validation_are_those_that_the_reader_labelled(tmp_path: Path) -> None:
    """Where it labelled none they are of the file, and have its labels."""
    train = mixed()
    plain = built(train)
    unknown = [name for name, label in zip(train.names, train.labels, strict=True) if label < 0]
    file = written(tmp_path, dict.fromkeys(unknown[:20], "a"))
    assert list(built(train, labels=file).val.names) == list(plain.val.names)
    blank = replace(train, labels=np.full(90, -1))
    data = built(blank, labels=file)
    assert set(data.val.names) < set(unknown[:20]) and data.val.labels.tolist() == [0, 0]
    assert (data.train.labels >= 0).sum() == 18 and len(data.train) == 88


def test_sets_without_labels_are_refused_and_classes_without_labels_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dml_fast")
    good, blank = images([0, 1, 2, 0, 1, 2] * 4), images([-1] * 5, first=100)
    with pytest.raises(UserError, match=r"none of 5 training rows has a label, .*--labels FILE"):
        built(blank)
    file = written(tmp_path, {"100": "a"})
    with pytest.raises(UserError, match=r"none of 24 training rows .*name some in --labels"):
        build_dataset(raw_data(good, images([0], 100)), Labelling(labels=file))
    with pytest.raises(UserError, match="none of 5 validation rows has a label"):
        build_dataset(raw_data(good, blank), Labelling())
    with pytest.raises(UserError, match="none of 5 test rows has a label"):
        build_dataset(raw_data(good, good, blank), Labelling())
    with pytest.raises(UserError, match=r"--val-fraction 0\.1 of 2 training rows with a label"):
        built(images([0, 1, -1, -1]))
    caplog.clear()
    half = images([0, -1, -1], first=100)
    build_dataset(raw_data(good, half), Labelling(labels_per_class=9))
    assert [record.getMessage() for record in caplog.records] == [
        "--labels-per-class 9: all labels of 3 classes (a, b, c) are kept, as there are fewer",
        "2 of 3 validation rows have no label: they are not counted",
    ]


def test_rows_that_are_no_images_are_chosen_in_the_same_way() -> None:
    train = mixed()
    rows = RowSet({"x": np.zeros((90, 2))}, train.labels, names=train.names)
    how = Labelling(train_fraction=0.5, labels_per_class=3, label_noise=0.4)
    ours, theirs = (choose_rows(part, None, None, CLASSES, how) for part in (rows, train))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_features_are_fitted_to_rows_that_are_left_out_too() -> None:
    """So they are the same in all rounds of a loop in which labels grow."""
    rng = np.random.default_rng(0)
    rows = RowSet({"x": rng.normal(size=(90, 2))}, mixed().labels, names=mixed().names)
    fitted: list[int] = []

    def fit(columns: dict) -> VectorFeatures:
        fitted.append(len(columns["x"]))
        return VectorFeatures.fit(columns, ("x",))

    raw = RawData("x", CLASSES, rows, None, None, pad=0, flip=False, fit=fit)
    data = build_dataset(raw, Labelling(labels_per_class=2, unlabelled_share=0.0))
    assert fitted == [84] and len(data.train) == 6


def test_names_are_stable_and_made_when_asked_for(tmp_path: Path) -> None:
    data = open_dataset("digits", train_fraction=0.1)
    assert data.test is not None
    parts = [list(part.names) for part in (data.train, data.val, data.test)]
    assert len({name for names in parts for name in names}) == sum(map(len, parts))
    plain = open_dataset("digits")
    where = {name: row for row, name in enumerate(plain.train.names)}
    rows = np.array([where[name] for name in data.train.names])
    np.testing.assert_array_equal(plain.train.pixels[rows], data.train.pixels)
    asked: list[int] = []
    names = Names(lambda i: f"{asked.append(i) or i}", np.arange(10**6))  # type: ignore[func-returns-value]
    some = names[np.array([5, 7])]
    assert not asked and (len(some), some[1], list(some)) == (2, "7", ["5", "7"])
    assert list(names[3:5]) == ["3", "4"] and asked == [7, 5, 7, 3, 4]


@pytest.mark.parametrize("option", [{"labels": "x.tsv"}, {"labels_per_class": 3}])
def test_identities_have_no_hidden_labels(option: dict, tmp_path: Path) -> None:
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        (tmp_path / part).mkdir()
    with pytest.raises(UserError, match=r"--labels.* means nothing with --data market1501"):
        open_dataset(f"market1501:{tmp_path}", **option)
