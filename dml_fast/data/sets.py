"""What a data set is, and how one is made from the images that a reader found."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dml_fast.data.splits import add_label_noise, split_validation, take_fraction

_STATS_CHUNK = 4096  # images: bounds the 8-byte temporaries of bincount


@dataclass(frozen=True)
class ImageSet:
    """Images in memory with their labels.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, indices of `DataSet.classes`.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, ids: npt.NDArray[np.int64]) -> ImageSet:
        """Returns copies of the images ``ids``, in that order."""
        return ImageSet(self.images[ids], self.labels[ids])


@dataclass(frozen=True)
class RetrievalSet(ImageSet):
    """Images to search for, the queries, and images to search among, the gallery.

    Attributes:
        images: the queries first, then the gallery.
        labels: identities (not indices of classes); -1 is junk, 0 a distractor.
        cams: (N,) int64 cameras.
        names: (N,) files, relative to the data folder.
        queries: how many of the images are queries.
    """

    cams: npt.NDArray[np.int64]
    names: tuple[str, ...]
    queries: int


@dataclass(frozen=True)
class RawData:
    """What a reader found, before any choice of split.

    ``val`` is None unless the data set brings its own validation images.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    val: ImageSet | None
    test: ImageSet | None
    pad: int
    flip: bool
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """A data set ready for training.

    Attributes:
        name: a short name for titles.
        classes: class names; a label is an index of this tuple.
        train: the images to learn from.
        val: the images to choose a model by: fixed, disjoint from ``train``, never augmented. A
            `RetrievalSet` where identities are learned, whose ``test`` is one too.
        test: the images for the final figure, or None if the data set has none.
        mean: per channel, in units of 0..1, of the training images.
        std: per channel, in units of 0..1; 1 for a channel that never varies.
        pad: pixels by which a random crop may shift an image, the set's usual augmentation.
        flip: whether the set's usual augmentation mirrors images.
        fingerprint: SHA-256 of every image, label and class name after splitting, so that a
            run is not resumed on other data. It does not depend on where the files lie.
        skipped: corrupt files that were left out, relative to the data folder.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    val: ImageSet
    test: ImageSet | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool
    fingerprint: str
    skipped: tuple[str, ...]


def build_dataset(
    raw: RawData, *, val_fraction: float, train_fraction: float, label_noise: float, seed: int
) -> DataSet:
    """Splits, thins out and mislabels what a reader found (see `open_dataset`)."""
    train, val = raw.train, raw.val
    if val is None:
        train_ids, val_ids = split_validation(train.labels, val_fraction)
        train, val = train.subset(train_ids), train.subset(val_ids)
    if train_fraction < 1.0:
        train = train.subset(take_fraction(train.labels, train_fraction, seed))
    if label_noise > 0.0:
        noisy = add_label_noise(train.labels, len(raw.classes), label_noise, seed)
        train = ImageSet(train.images, noisy)
    mean, std = channel_stats(train.images)
    return DataSet(
        name=raw.name,
        classes=raw.classes,
        train=train,
        val=val,
        test=raw.test,
        mean=mean,
        std=std,
        pad=raw.pad,
        flip=raw.flip,
        fingerprint=_fingerprint(raw.classes, (train, val, raw.test)),
        skipped=raw.skipped,
    )


def channel_stats(
    images: npt.NDArray[np.uint8],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and the population standard deviation of each channel.

    Computed from integer histograms, so that the result is exact and the same on any machine.

    Args:
        images: (N, C, H, W) uint8.

    Returns:
        Mean and deviation, C floats each, in units of 0..1; the deviation of a channel that
        never varies is given as 1, so that dividing by it is harmless.
    """
    levels = np.arange(256)
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(images), _STATS_CHUNK):
            values = images[start : start + _STATS_CHUNK, channel].ravel()
            counts += np.bincount(values, minlength=256)
        total = int(counts.sum())
        first, second = int(counts @ levels), int(counts @ levels**2)
        means.append(first / total / 255)
        stds.append((second * total - first**2) ** 0.5 / total / 255 or 1.0)
    return tuple(means), tuple(stds)


def _fingerprint(classes: tuple[str, ...], parts: tuple[ImageSet | None, ...]) -> str:
    shapes = [None if part is None else part.images.shape for part in parts]
    header: dict[str, Any] = {"classes": classes, "shapes": shapes}
    if found := [part for part in parts if isinstance(part, RetrievalSet)]:
        header["searches"] = [(part.queries, part.cams.tolist()) for part in found]
    digest = hashlib.sha256(json.dumps(header).encode())
    for part in parts:
        if part is not None:
            digest.update(np.ascontiguousarray(part.images).data)
            digest.update(np.ascontiguousarray(part.labels, dtype="<i8").data)
    return digest.hexdigest()
