"""Data sets: what a split keeps, fingerprints, statistics."""

from __future__ import annotations

import numpy as np
import pytest

from dml_fast.data import DataSet, ImageSet
from dml_fast.data.labelling import Labelling
from dml_fast.data.sets import RawData, build_dataset, channel_stats


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
    return build_dataset(raw or raw_data(), Labelling(**changes))


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
