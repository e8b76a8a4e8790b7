"""``vectors:FILE.npz``: what a file may hold, and the sentence for each that it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import mutations, outcome

from dml_fast.data import DataSet, VectorSet, open_dataset
from dml_fast.data.features import load_features
from dml_fast.data.readers.vectors import VectorFile
from dml_fast.errors import UserError

COUNT, DAMAGES = 40, 300


def arrays(**changes: Any) -> dict[str, Any]:
    """Rows of two views in three classes; a change to None leaves an array out."""
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {
        "x_a": rng.normal(5, 3, (COUNT, 4)).astype(np.float32),
        "x_b": rng.normal(-2, 9, (COUNT, 3)),
        "y": np.arange(COUNT) % 3,
        "id": np.array([f"row {i}" for i in range(COUNT)]),
        "split": np.array(["train"] * 28 + ["val"] * 6 + ["test"] * 6),
    }
    return {name: a for name, a in (found | changes).items() if a is not None}


def saved(folder: Path, **changes: Any) -> str:
    path = folder / "rows.npz"
    np.savez(path, **arrays(**changes))
    return f"vectors:{path}"


def one(**changes: Any) -> dict[str, Any]:
    """Changes to one view, x, without split and id."""
    return {
        **{"x_a": None, "x_b": None, "id": None, "split": None, "x": arrays()["x_a"]},
        **changes,
    }


def opened(folder: Path, levels: tuple[str, ...] | None = (), **changes: Any) -> DataSet:
    options = {"levels": levels, **{k: changes.pop(k) for k in ("classes",) if k in changes}}
    return open_dataset(saved(folder, **changes), **options)


def rows_of(part: object) -> VectorSet:
    assert isinstance(part, VectorSet)
    return part


def test_parts_names_labels_and_views_are_those_of_the_file(tmp_path: Path) -> None:
    data = opened(tmp_path)
    assert data.classes == ("0", "1", "2") and (data.mean, data.std) == ((), ())
    train, val, test = map(rows_of, (data.train, data.val, data.test))
    assert [len(part) for part in (train, val, test)] == [28, 6, 6]
    assert val.names == tuple(f"row {i}" for i in range(28, 34))
    assert test.labels.tolist() == [i % 3 for i in range(34, 40)]
    assert train.widths == (4, 3)
    swapped = rows_of(opened(tmp_path, levels=("b", "a")).train)
    np.testing.assert_array_equal(swapped.views[1], train.views[0])
    assert opened(tmp_path, levels=("b",)).train.widths == (3,)  # type: ignore[union-attr]


def test_columns_are_standardised_by_the_training_rows_alone(tmp_path: Path) -> None:
    x = arrays()["x_b"]
    x[:, 1] = np.float32(0.1)
    data = opened(tmp_path, x_b=x)
    learned = x[:28].astype(np.float32).astype(np.float64)
    mean, std = learned.mean(0), learned.std(0)
    mean[1], std[1] = np.float32(0.1), 1
    for part, kept in ((data.train, slice(28)), (data.val, slice(28, 34))):
        wanted = (x[kept].astype(np.float32) - mean) / std
        np.testing.assert_allclose(rows_of(part).views[1], wanted, rtol=1e-6, atol=1e-6)
    assert not rows_of(data.train).views[1][:, 1].any()  # the constant column


def test_features_of_a_run_are_read_and_not_fitted_again(tmp_path: Path) -> None:
    data = opened(tmp_path)
    assert data.features is not None
    for name, content in data.features.files().items():
        (tmp_path / name).write_bytes(content)
    assert load_features(tmp_path).digest == data.features.digest
    moved = arrays()["x_a"] + 100
    spec = saved(tmp_path, x_a=moved)
    fitted, kept = (open_dataset(spec, levels=(), features=f) for f in (None, tmp_path))
    np.testing.assert_allclose(rows_of(fitted.train).views[0].mean(), 0, atol=1e-5)
    assert rows_of(kept.train).views[0].mean() > 20
    assert fitted.fingerprint == kept.fingerprint != data.fingerprint


def test_dev_is_val_and_rows_of_other_parts_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = opened(tmp_path, split=np.array(["train"] * 30 + ["dev"] * 6 + ["pool"] * 4))
    assert [len(data.train), len(data.val), data.test] == [30, 6, None]
    assert "4 rows are left out, as their split is none of train, val" in caplog.text


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.uint64])
def test_numbers_of_any_type_become_float32(tmp_path: Path, dtype: type) -> None:
    x = np.random.default_rng(1).integers(0, 100, (COUNT, 4))
    data = opened(tmp_path, levels=None, **one(x=x.astype(dtype)))
    same = opened(tmp_path, levels=None, **one(x=np.asfortranarray(x.astype(np.float32))))
    assert data.fingerprint == same.fingerprint
    assert data.features is not None and same.features is not None
    assert data.features.digest == same.features.digest
    assert rows_of(data.train).names[0].isdigit()


def test_the_fingerprint_is_of_raw_rows_labels_classes_and_views(tmp_path: Path) -> None:
    x, y = arrays()["x_a"], arrays()["y"]
    x[3, 2] += 1e-3
    y[5] = (y[5] + 1) % 3
    found = [
        opened(tmp_path).fingerprint,
        opened(tmp_path, x_a=x).fingerprint,
        opened(tmp_path, y=y).fingerprint,
        opened(tmp_path, classes=("a", "b", "c")).fingerprint,
        opened(tmp_path, levels=("b", "a")).fingerprint,
        opened(tmp_path, levels=("a",)).fingerprint,
    ]
    assert len({*found}) == len(found)
    assert opened(tmp_path).fingerprint == found[0]


def test_labels_may_be_names_of_classes(tmp_path: Path) -> None:
    y = np.array(["dog", "cat", ""] * 13 + ["cat"])
    data = opened(tmp_path, y=y, split=None)
    assert data.classes == ("cat", "dog")
    train = rows_of(data.train)
    for name, label in zip(train.names, train.labels.tolist(), strict=True):
        assert (["", *data.classes])[label + 1] == y[int(name.split()[1])]
    given = opened(tmp_path, y=y, split=None, classes=("dog", "owl", "cat"))
    assert given.classes == ("dog", "owl", "cat")
    assert set(rows_of(given.train).labels.tolist()) <= {-1, 0, 2}


def test_numbers_mean_the_classes_that_the_file_or_else_the_user_names(tmp_path: Path) -> None:
    names = np.array(["p", "q", "r"])
    file = saved(tmp_path, **{"classes": names})
    assert open_dataset(file, levels=()).classes == ("p", "q", "r")
    other = open_dataset(file, levels=(), classes=("r", "q", "p"))
    assert rows_of(other.val).labels.tolist() == [2 - i % 3 for i in range(28, 34)]
    unnamed = opened(tmp_path, classes=("r", "q", "p"))
    assert rows_of(unnamed.val).labels.tolist() == [i % 3 for i in range(28, 34)]


class Anything:
    """An object, which numpy can only pickle."""


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no views": ({"x_a": None, "x_b": None}, "'y', 'id', 'split', and neither x nor x_NAME"),
    "an unknown array": ({"weights": np.ones(3)}, "array 'weights', which is none of x"),
    "x beside views": ({"x": np.ones((COUNT, 2))}, "x beside x_a"),
    "another shape": ({"x_a": np.ones((COUNT, 2, 2))}, r"x_a of shape \(40, 2, 2\)"),
    "a single number": ({"x_a": np.float32(1)}, r"x_a of shape \(\)"),
    "no columns": ({"x_a": np.ones((COUNT, 0))}, r"x_a of shape \(40, 0\)"),
    "no rows": (one(x=np.ones((0, 3)), y=None), r"x of shape \(0, 3\)"),
    "text": ({"x_a": np.full((COUNT, 2), "a")}, "x_a of shape .* type <U1"),
    "complex numbers": ({"x_a": np.ones((COUNT, 2), complex)}, "type complex128"),
    "a pickle": ({"x_a": np.full((COUNT, 2), Anything())}, "damaged .*Object arrays"),
    "NaN": ({"x_b": np.where(np.eye(COUNT, 3) > 0, np.nan, 1)},
            r"nan in x_b, row 0 \('row 0'\), column 0, .*: leave 3 such rows out"),
    "too large": ({"x_b": np.full((COUNT, 1), 1e39)}, r"1e\+39 in x_b, row 0 .*float32"),
    "fewer labels": ({"y": np.zeros(39, int)}, r"y of shape \(39,\) and x_a of 40 rows"),
    "fewer rows of a view": ({"x_b": np.ones((39, 2))}, r"x_b of shape \(39, 2\) and x_a of 40"),
    "a single label": ({"y": np.int64(1)}, r"y of shape \(\)"),
    "labels of two columns": ({"y": np.zeros((COUNT, 2), int)}, r"y of shape \(40, 2\)"),
    "labels that are no whole numbers": ({"y": np.full(COUNT, 0.5)}, "y of shape .* float64"),
    "a label below -1": ({"y": np.full(COUNT, -2)}, "-2 in y, row 0"),
    "a label beyond the rows": ({"y": np.full(COUNT, 10**9)}, "class 1000000000 in y and 40 rows"),
    "a label beyond 31 bits": ({"y": np.full(COUNT, 2**40)}, "1099511627776 in y, row 0"),
    "a label beyond the classes": ({"classes": np.array(["a", "b"])},
                                   "class 2 in y, row 2, and there are 2 classes"),
    "a name beyond the classes": ({"y": np.array(["a", "c"] * 20), "classes": np.array(["a"])},
                                  "'c' in y, row 1, which is none of its 1 classes"),
    "classes twice": ({"classes": np.array(["a", "a", "b"])}, "3 classes, of which 2 differ"),
    "classes that are numbers": ({"classes": np.arange(3)}, "classes of shape .* int64"),
    "one name twice": ({"id": np.array(["a", "b"] * 20)}, "'a' for the ids of the rows 0 and 2"),
    "a name without letters": ({"id": np.array([""] * 40)}, "'' for the id of row 0"),
    "a name with a tab": ({"id": np.array(["a\tb"] * 40)}, "for the id of row 0: give a name"),
    "names that are fractions": ({"id": np.arange(40) / 2}, "id of shape .* float64"),
    "parts that are numbers": ({"split": np.arange(40)}, "split of shape .* int64"),
    "no training rows": ({"split": np.array(["test"] * 40)}, "no row whose split is train"),
    "no labels": ({"y": None}, "no y, so its classes are not known: give --classes"),
    "no label at all": ({"y": np.full(COUNT, -1)}, "no label in y, so its classes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_a_file_may_not_hold_is_named(tmp_path: Path, case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(UserError, match=message) as refused:
        open_dataset(saved(tmp_path, **changes), levels=None if "x" in changes else ())
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("levels", "changes", "message"),
    [
        (None, {}, "the views 'a', 'b': add --views levels"),
        ((), one(), "one array x and no views x_NAME: .* leave out --views levels"),
        (("a", "c"), {}, "--levels names 'c', and .* the views 'a', 'b'"),
        (("x_a",), {}, "--levels names 'x_a'"),
    ],
)
def test_views_that_are_not_there_are_refused(
    tmp_path: Path, levels: tuple[str, ...] | None, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        opened(tmp_path, levels, **changes)


def test_a_class_that_is_not_declared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="class 'b' in y, which is none of the 2 classes"):
        opened(tmp_path, y=np.array(["a", "b"] * 20), classes=("a", "c"))


def test_no_file_a_folder_one_array_and_options_of_images_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((3, 2)))
    (tmp_path / "x.npz").write_text("no archive")
    for name, message in (
        ("none.npz", "does not exist: give an .npz file"),
        ("", "is a folder: give an .npz file"),
        ("x.npy", "is one array: save with numpy.savez"),
        ("x.npz", "is damaged .*: save with numpy.savez"),
    ):
        with pytest.raises(UserError, match=message):
            open_dataset(f"vectors:{tmp_path}/{name}")
    with pytest.raises(UserError, match=r"or vectors:.*rows.npz\?"):
        open_dataset(saved(tmp_path).removeprefix("vectors:"))
    with pytest.raises(UserError, match=r"needs a file: write vectors:FILE.npz"):
        open_dataset("vectors:")
    for options in ({"loader": "dali"}, {"resized": True}, {"image_size": 8}, {"download": True}):
        with pytest.raises(UserError, match=r"leave (it )?out"):
            open_dataset(saved(tmp_path), levels=(), **options)  # type: ignore[arg-type]


def test_rows_too_far_from_those_of_the_run_are_refused(tmp_path: Path) -> None:
    x = np.full((COUNT, 1), 1.0)
    x[0], x[30] = 1 + 1e-6, 3e38
    with pytest.raises(UserError, match="x_b, row 2, is too far from the training rows"):
        opened(tmp_path, x_b=x)


def test_a_damaged_file_is_read_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.npz"
    np.savez(path, **arrays())
    whole, kept = VectorFile.read(path), 0
    for damaged in mutations(path.read_bytes(), DAMAGES):
        path.write_bytes(damaged)
        found = outcome(lambda: VectorFile.read(path))
        if found is None:
            continue
        kept += 1
        assert found.names in (whole.names, tuple(map(str, range(COUNT))))
        for name, view in found.views.items():
            np.testing.assert_array_equal(view, whole.views[name])
    assert kept < DAMAGES / 2


def test_damaged_features_of_a_run_are_refused_or_are_as_they_were(tmp_path: Path) -> None:
    data = opened(tmp_path)
    assert data.features is not None
    (path, content), *others = data.features.files().items()
    assert path == "features.npz" and not others
    kept = 0
    for damaged in mutations(content, DAMAGES):
        (tmp_path / path).write_bytes(damaged)
        found = outcome(lambda: load_features(tmp_path))
        if found is not None:
            kept += 1
            assert found.digest == data.features.digest
    assert kept < DAMAGES / 2


def test_an_archive_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((10_000, 10)))
    monkeypatch.setattr("dml_fast.data.npz.available_bytes", lambda: 10_000)
    with pytest.raises(UserError, match=r"x of 0.0 GB, more than half of the free memory"):
        open_dataset(f"vectors:{tmp_path}/x.npz")
