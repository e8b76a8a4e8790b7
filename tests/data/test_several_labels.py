"""Folders whose images may have several labels, from labels.csv."""

from __future__ import annotations

import csv
import logging
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_cases import batch_of, loader_of, opened
from PIL import Image
from several_cases import digits_side_by_side

from dml_fast.data import check_data_spec, open_dataset
from dml_fast.data.loaders import evaluation_batches
from dml_fast.data.plan import Augmentation
from dml_fast.data.splits import rarest_label
from dml_fast.errors import UserError

COUNTS = {"train": 30, "val": 6, "test": 6}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_side_by_side(tmp_path_factory.mktemp("several") / "digits", COUNTS)


def table_of(root: Path) -> dict[str, list[float]]:
    with (root / "labels.csv").open() as file:
        return {
            name: [float(cell) for cell in cells] for name, *cells in list(csv.reader(file))[1:]
        }


def test_rows_have_the_labels_of_their_line(whole: Path) -> None:
    data = opened(whole, "resident")
    assert data.classes == tuple(f"has {d}" for d in range(10))
    assert data.several_labels
    table = table_of(whole)
    for part, count in COUNTS.items():
        rows = getattr(data, part)
        assert rows.labels.shape == (count, 10)
        assert rows.labels.tolist() == [table[name] for name in rows.names]
        for image, name in zip(rows.images, rows.names, strict=True):
            assert (image[0] == np.asarray(Image.open(whole / name))).all()


def test_the_order_of_lines_means_nothing_and_labels_are_in_the_fingerprint(
    whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    lines = (whole / "labels.csv").read_text().splitlines()
    labels = tmp_path / "copy" / "labels.csv"
    labels.write_text("\ufeff" + "\n".join([lines[0], "", *reversed(lines[1:])]), "utf-8")
    before = opened(whole, "resident").fingerprint
    assert opened(tmp_path / "copy", "resident").fingerprint == before
    lines[1] = lines[1][:-1] + str(1 - int(lines[1][-1]))
    labels.write_text("\n".join(lines))
    assert opened(tmp_path / "copy", "resident").fingerprint != before


def test_the_part_for_validation_has_its_share_of_each_rare_label(tmp_path: Path) -> None:
    root = digits_side_by_side(tmp_path, {"train": 400})
    first, second = (
        open_dataset(f"folder:{root}", val_fraction=0.25, train_fraction=0.5, seed=seed)
        for seed in (0, 1)
    )
    assert len(first.val) == 100
    assert len(first.train) == 150
    assert list(first.val.names) == list(second.val.names)
    assert set(first.val.names).isdisjoint(first.train.names)
    assert list(first.train.names) != list(second.train.names)
    every = np.array([*table_of(root).values()])
    share = first.val.labels.mean(0) / every.mean(0)
    assert share.min() > 0.7
    assert share.max() < 1.3


def test_a_row_is_stratified_by_its_rarest_label() -> None:
    labels = np.array([[1, 1, 0], [1, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 1], [0, 0, 1]])
    assert rarest_label(labels).tolist() == [1, 0, 0, 3, 1, 2]  # 3, 2 and 3 rows


@pytest.mark.parametrize("loader", ["resident", "fallback"])
def test_targets_are_the_labels_on_every_loader(whole: Path, loader: str) -> None:
    data = opened(whole, loader)
    table = table_of(whole)
    with closing(loader_of(data)) as training:
        batch = batch_of(training, 0, 1)
    names = [data.train.names[i] for i in batch.ids.tolist()]
    assert batch.target.dtype == torch.float32
    assert batch.target.tolist() == [table[name] for name in names]
    found = evaluation_batches(data.val, batch_size=4, mean=data.mean, std=data.std, device="cpu")
    targets = torch.cat([batch.target for batch in found])
    assert targets.tolist() == [table[name] for name in data.val.names]


def test_mixed_images_have_mixed_labels(whole: Path) -> None:
    data = opened(whole, "resident")
    plain = batch_of(loader_of(data), 0, 0)
    mixed = batch_of(loader_of(data, Augmentation(mixup=1.0)), 0, 0)
    assert torch.equal(plain.ids, mixed.ids)
    apart = plain.target - plain.target.flip(0)
    weight = ((mixed.target - plain.target.flip(0))[apart != 0] / apart[apart != 0]).unique()
    assert weight.max() - weight.min() < 1e-5
    assert 0 < weight[0] < 1


def test_a_class_that_no_training_row_has_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dml_fast")
    root = digits_side_by_side(tmp_path, {"train": 4, "val": 2})
    opened(root, "resident")
    assert "no training row has a label of" in caplog.text


def change(lines: list[str], number: int, text: str) -> list[str]:
    return [*lines[:number], text, *lines[number + 1 :]]


ZEROS = ",0" * 10
BAD: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "empty": (lambda x: [], "labels.csv is empty: write a line file,CLASS"),
    "other header": (
        lambda x: change(x, 0, "image" + ",a" * 10),
        "line 1 begins with 'image' and not with file",
    ),
    "no classes": (lambda x: ["file"], "line 1 names no class"),
    "class twice": (lambda x: change(x, 0, "file,a,b,a"), "line 1 names no class, one without"),
    "too few": (
        lambda x: change(x, 2, "train/some/0001.png,1"),
        "line 3 has 1 labels and the first line 10 classes",
    ),
    "no label": (
        lambda x: change(x, 2, "train/some/0001.png,2" + ",0" * 9),
        "line 3 has '2' for class 'has 0': write 0 or 1",
    ),
    "twice": (lambda x: [*x, x[1]], "names 'train/some/0000.png' a second time"),
    "outside": (
        lambda x: change(x, 2, "../x.png" + ZEROS),
        "line 3 names '../x.png': write a path below the folder that begins with train/",
    ),
    "no image": (
        lambda x: [*x, "train/none.png" + ZEROS],
        "line 44 names train/none.png, and there is no such image",
    ),
    "no line": (lambda x: x[:-1], "has no line for the image test/some/0005.png: add one"),
    "no rows": (lambda x: x[:1], "names no image"),
    "a quote": (lambda x: [*x, 'train/"x.png'], "is damaged|has 0 labels"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_wrong_file_of_labels_is_one_sentence(
    change: Callable[[list[str]], list[str]], message: str, whole: Path, tmp_path: Path
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(whole, root)
    lines = (root / "labels.csv").read_text().splitlines()
    (root / "labels.csv").write_text("\n".join(change(lines)))
    with pytest.raises(UserError, match=message) as error:
        opened(root, "resident")
    assert "\n" not in str(error.value)
    if "image" not in message or "begins" in message:  # known before any image is looked for
        with pytest.raises(UserError, match=message):
            check_data_spec(f"folder:{root}")


def test_labels_without_images_or_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,a\ntrain/1.png,1\n")
    with pytest.raises(UserError, match=r"has labels\.csv and no train folder"):
        check_data_spec(f"folder:{tmp_path}")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="train holds no images: add some"):
        opened(tmp_path, "resident")
    (tmp_path / "labels.csv").unlink()
    (tmp_path / "labels.csv").mkdir()
    with pytest.raises(UserError, match=r"labels\.csv cannot be read|is damaged"):
        check_data_spec(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_noise": 0.2}, "--label-noise is for rows of one class"),
        ({"labels_per_class": 2}, "--labels-per-class is for rows of one class"),
    ],
)
def test_options_about_one_class_are_refused(
    options: dict[str, Any], message: str, whole: Path
) -> None:
    with pytest.raises(UserError, match=message):
        opened(whole, "resident", **options)


def test_orders_by_class_are_refused(whole: Path) -> None:
    data = opened(whole, "resident")
    for options in ({"balance": True}, {"num_instances": 2}):
        with pytest.raises(UserError, match="rows may have several labels"):
            loader_of(data, **options)


def test_a_damaged_file_is_replaced_by_one_with_the_same_labels(
    whole: Path, tmp_path: Path
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(whole, root)
    (root / "train/some/0000.png").write_bytes(b"damaged")
    resident = opened(root, "resident", skip_corrupt=True)
    assert len(resident.train) == 29
    table = table_of(root)
    assert resident.train.labels.tolist() == [table[name] for name in resident.train.names]
    data = opened(root, "fallback", skip_corrupt=True)
    with closing(loader_of(data, batch_size=30)) as training:
        batch = batch_of(training, 0, 0)
    assert 0 not in batch.ids
    assert batch.target.tolist() == [table[data.train.names[i]] for i in batch.ids.tolist()]
