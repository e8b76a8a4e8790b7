"""Splits, fractions, label noise, statistics and fingerprints, on the real digits and on chance."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dml_fast.data import DataSet, ImageSet, open_dataset
from dml_fast.data.sets import RawData, build_dataset, channel_stats
from dml_fast.data.splits import (
    add_label_noise,
    remaining,
    split_validation,
    stratified_sample,
    take_fraction,
)
from dml_fast.errors import UserError

label_arrays = st.lists(st.integers(0, 5), min_size=2, max_size=120).map(
    lambda labels: np.array(labels, dtype=np.int64)
)


def rows(images: ImageSet) -> set[bytes]:
    return {image.tobytes() for image in images.images}


def raw_data(**changes: object) -> RawData:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 1, 3, 3), dtype=np.uint8)
    train = ImageSet(images, np.arange(60, dtype=np.int64) % 3)
    test = ImageSet(images[:5] ^ 255, train.labels[:5])
    fields: dict = {"name": "x", "classes": ("a", "b", "c"), "train": train, "val": None}
    fields |= {"test": test, "pad": 1, "flip": False}
    return RawData(**(fields | changes))


def built(raw: RawData | None = None, **changes: float) -> DataSet:
    options: dict = {"val_fraction": 0.1, "train_fraction": 1.0, "label_noise": 0.0, "seed": 0}
    return build_dataset(raw or raw_data(), **(options | changes))


@settings(deadline=None, max_examples=100)
@given(labels=label_arrays, share=st.floats(0, 1), seed=st.integers(0, 9))
def test_stratified_samples_are_proportional_and_spare_one_of_each_class(
    labels: np.ndarray, share: float, seed: int
) -> None:
    count = round(share * len(labels))
    ids = stratified_sample(labels, count, np.random.default_rng(seed))
    assert (np.diff(ids) > 0).all() and len(ids) <= count
    shortfall = 0
    for label in np.unique(labels):
        size, taken = (labels == label).sum(), (labels[ids] == label).sum()
        assert taken <= size - 1
        assert taken <= np.ceil(size * count / len(labels))
        assert taken >= min(np.floor(size * count / len(labels)), size - 1)
        shortfall += taken == size - 1
    assert len(ids) == count or shortfall  # only the spared ones can be missing
    others = remaining(len(labels), ids)
    assert sorted([*ids, *others]) == list(range(len(labels)))


def test_samples_of_a_class_are_drawn_by_chance() -> None:
    labels = np.zeros(100, dtype=np.int64)
    draws = [stratified_sample(labels, 50, np.random.default_rng(seed)) for seed in range(2)]
    assert draws[0].tolist() != draws[1].tolist()
    assert draws[0].max() > 60 and draws[0].min() < 40


@settings(deadline=None, max_examples=100)
@given(
    labels=label_arrays,
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 9),
    num_classes=st.integers(6, 9),
)
def test_noise_makes_exactly_its_fraction_wrong(
    labels: np.ndarray, fraction: float, seed: int, num_classes: int
) -> None:
    before = labels.copy()
    noisy = add_label_noise(labels, num_classes, fraction, seed)
    assert (noisy != labels).sum() == round(fraction * len(labels))
    assert noisy.min() >= 0 and noisy.max() < num_classes and noisy.dtype == np.int64
    np.testing.assert_array_equal(labels, before)
    np.testing.assert_array_equal(noisy, add_label_noise(labels, num_classes, fraction, seed))


def test_noise_is_uniform_over_the_other_classes_and_depends_on_the_seed() -> None:
    labels = np.full(9000, 2, dtype=np.int64)
    noisy = add_label_noise(labels, 4, 0.5, seed=1)
    counts = np.bincount(noisy, minlength=4)
    assert counts[2] == 4500 and (abs(counts[[0, 1, 3]] - 1500) < 150).all()
    assert (noisy != add_label_noise(labels, 4, 0.5, seed=2)).any()
    with pytest.raises(UserError, match="at least 2 classes"):
        add_label_noise(labels, 1, 0.5, seed=1)


def test_training_fractions_are_stratified_nested_and_seeded() -> None:
    labels = np.repeat(np.arange(4), 100)
    tenth, half = take_fraction(labels, 0.1, 7), take_fraction(labels, 0.5, 7)
    assert np.bincount(labels[tenth]).tolist() == [10] * 4
    assert np.bincount(labels[half]).tolist() == [50] * 4
    assert set(tenth) <= set(half)
    assert set(tenth) != set(take_fraction(labels, 0.1, 8))
    assert np.bincount(labels[take_fraction(labels, 0.001, 7)]).tolist() == [1] * 4


def test_the_validation_split_is_fixed() -> None:
    labels = np.random.default_rng(0).integers(0, 5, 200)
    train, val = split_validation(labels, 0.1)
    np.testing.assert_array_equal(val, split_validation(labels.copy(), 0.1)[1])
    assert len(val) == 20 and sorted([*train, *val]) == list(range(200))
    with pytest.raises(UserError, match=r"--val-fraction 0.1 of 4 .*raise it"):
        split_validation(np.zeros(4, dtype=np.int64), 0.1)


def test_validation_and_test_do_not_move_with_seed_fraction_or_noise() -> None:
    plain = built()
    changed = built(seed=5, train_fraction=0.5, label_noise=0.4)
    for a, b in ((plain.val, changed.val), (plain.test, changed.test)):
        assert a is not None and b is not None
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
    assert rows(changed.train) < rows(plain.train)
    assert not rows(plain.train) & rows(plain.val)
    assert len(plain.train) == 54 and len(plain.val) == 6 and len(changed.train) == 27


def test_noise_applies_to_the_training_images_that_are_left() -> None:
    clean, noisy = built(train_fraction=0.5), built(train_fraction=0.5, label_noise=0.3)
    np.testing.assert_array_equal(clean.train.images, noisy.train.images)
    assert (clean.train.labels != noisy.train.labels).sum() == round(0.3 * 27)


def test_a_set_with_its_own_validation_images_keeps_all_training_images() -> None:
    raw = raw_data()
    own = ImageSet(raw.train.images[:4] ^ 85, raw.train.labels[:4])
    data = built(raw_data(val=own))
    assert len(data.train) == 60 and data.val is own


def test_the_fingerprint_follows_content_and_splits_only() -> None:
    plain = built()
    raw = raw_data()
    pixel = raw.train.images.copy()
    pixel[7, 0, 1, 1] ^= 1
    labels = raw.train.labels.copy()
    labels[7] = (labels[7] + 1) % 3
    assert raw.test is not None
    others = [
        built(raw_data(train=ImageSet(pixel, raw.train.labels))),
        built(raw_data(train=ImageSet(raw.train.images, labels))),
        built(raw_data(test=None)),
        built(raw_data(test=ImageSet(raw.test.images ^ 1, raw.test.labels))),
        built(raw_data(classes=("a", "b", "d"))),
        built(raw_data(classes=("a", "b", "c", "d"))),
        built(val_fraction=0.2),
        built(train_fraction=0.5),
        built(train_fraction=0.5, seed=1),
        built(label_noise=0.3),
        built(label_noise=0.3, seed=1),
        built(label_noise=0.6),
    ]
    assert len({data.fingerprint for data in [plain, *others]}) == 1 + len(others)
    # nothing is drawn with the seed here, and the name is only a title
    assert built(raw_data(name="y"), seed=1).fingerprint == plain.fingerprint
    assert len(plain.fingerprint) == 64


def test_statistics_are_those_of_the_training_images() -> None:
    data = built(train_fraction=0.5)
    scaled = data.train.images / 255
    assert data.mean == pytest.approx(scaled.mean(axis=(0, 2, 3)), abs=1e-12)
    assert data.std == pytest.approx(scaled.std(axis=(0, 2, 3)), abs=1e-12)


def test_statistics_by_chunks_and_of_a_constant_channel() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5000, 2, 2, 3), dtype=np.uint8)
    images[:, 1] = 51
    mean, std = channel_stats(images)
    assert mean == pytest.approx((images[:, 0].mean() / 255, 0.2), abs=1e-12)
    assert std == pytest.approx((images[:, 0].std() / 255, 1.0), abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.0}, "--val-fraction 0.0"),
        ({"val_fraction": 1.0}, "--val-fraction 1.0"),
        ({"train_fraction": 0.0}, "--train-fraction 0.0"),
        ({"train_fraction": 1.5}, "--train-fraction 1.5"),
        ({"train_fraction": float("nan")}, "--train-fraction nan"),
        ({"label_noise": -0.1}, "--label-noise -0.1"),
        ({"label_noise": 1.0}, "--label-noise 1.0"),
        ({"image_size": 16}, r"--image-size 16 .* 8 pixels"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_dataset("digits", **options)


def test_importing_the_package_loads_no_torch_and_no_decoder() -> None:
    code = (
        "import sys, dml_fast.data; dml_fast.data.check_data_spec('digits'); "
        "print([m for m in ('torch', 'sklearn', 'PIL', 'simplejpeg') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
