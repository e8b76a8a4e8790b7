"""What a data set is, and how it is made from the rows that a reader found."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dml_fast.data.corrupt import CorruptFiles
from dml_fast.data.features import Features, Fit, RowSet
from dml_fast.data.files import ImageFiles
from dml_fast.data.labelling import Labelling, choose_rows
from dml_fast.data.names import Names, some_of
from dml_fast.data.pairs import PairSet
from dml_fast.data.vectors import VectorSet
from dml_fast.errors import UserError
from dml_fast.models.inputs import InputSpec

_STATS_CHUNK = 4096  # images: limits the memory of bincount, which uses 8 bytes per pixel
_STATS_SAMPLE = 1024  # files: to decode all of them may take an hour

_log = logging.getLogger("dml_fast")


@dataclass(frozen=True)
class ImageSet:
    """Images, in memory or in files, with their labels.

    Attributes:
        images: (N, C, H, W) uint8, or files that are decoded to such an array.
        labels: (N,) int64, indices of `DataSet.classes`; -1 for an image without a label. Where an
            image may have several labels, (N, C) int64, 1 where it has that of a class, else 0.
        manifest: (N,) uint64 of `dml_fast.data.files.manifest_of`, None if the images do not come
            from files.
        shard: (N,) int64, the tar shard that each image is in; None without shards.
        names: N names: paths relative to the data folder; by default the numbers 0..N-1.
        hidden: (N,) int64, the labels before options hid or changed some, for studies of how well
            a choice of rows does; None where none did. Training does not read it.
    """

    images: npt.NDArray[np.uint8] | ImageFiles
    labels: npt.NDArray[np.int64]
    manifest: npt.NDArray[np.uint64] | None = field(default=None, kw_only=True)
    shard: npt.NDArray[np.int64] | None = field(default=None, kw_only=True)
    names: Sequence[str] = field(default=(), kw_only=True)
    hidden: npt.NDArray[np.int64] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not self.names:
            object.__setattr__(self, "names", Names.numbered(len(self)))

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, ids: npt.NDArray[np.int64]) -> ImageSet:
        """Return copies of the images ``ids`` (n,) int64, in that order."""
        return ImageSet(
            self.images[ids],
            self.labels[ids],
            manifest=None if self.manifest is None else self.manifest[ids],
            shard=None if self.shard is None else self.shard[ids],
            names=some_of(self.names, ids),
            hidden=None if self.hidden is None else self.hidden[ids],
        )

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What a student gets for a row, one entry for each view of the data: images have one."""
        return (InputSpec("image", tuple(self.images.shape[1:])),)

    def picture(self, index: int) -> npt.NDArray[np.uint8]:
        """Return one image: (C, H, W) uint8."""
        images = self.images
        found: npt.NDArray[np.uint8] = (
            images[np.array([index])].sample(1)[0]
            if isinstance(images, ImageFiles)
            else images[index]
        )
        return found

    @property
    def pixels(self) -> npt.NDArray[np.uint8]:
        """The array of images, which must be in memory."""
        assert not isinstance(self.images, ImageFiles)
        return self.images


@dataclass(frozen=True)
class RetrievalSet(ImageSet):
    """Queries, which are images to search for, and a gallery of images to search in.

    Attributes:
        images: the queries first, then the gallery.
        labels: (N,) int64 identities (not indices of classes); -1 is junk.
        cams: (N,) int64, the camera of each image; None where the files' names have none.
        queries: how many of the images are queries.
    """

    cams: npt.NDArray[np.int64] | None
    queries: int


@dataclass(frozen=True)
class RawData:
    """The rows that a reader found, before they are split; the fields are those of `DataSet`.

    ``val`` is None if the data set has no validation images of its own. ``fit`` makes the features
    of a `RowSet` from the columns of the training rows; None for images.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSet | RowSet
    val: ImageSet | RowSet | None
    test: ImageSet | RowSet | None
    pad: int
    flip: bool
    corrupt: CorruptFiles | None = None
    choice: str = ""
    fit: Fit | None = None


Part: TypeAlias = ImageSet | VectorSet | PairSet
"""Rows of a data set: those to train with, or to validate or test with."""


@dataclass(frozen=True)
class DataSet:
    """A data set ready for training.

    Attributes:
        name: a short name for titles.
        classes: class names; a label is an index of this tuple.
        train: the rows to learn from.
        val: the rows to choose a model by: fixed, disjoint from ``train``, never augmented. If
            identities are learned, ``val`` and ``test`` are a `RetrievalSet`.
        test: the rows for the final result, or None if the data set has none.
        mean: of each channel of the training images, in units of 0..1; () for vectors and pairs.
        std: the standard deviation of each channel, in units of 0..1; 1 for a constant channel; ()
            for vectors and pairs.
        pad: the most pixels by which the usual augmentation of this data set shifts an image.
        flip: whether the usual augmentation of this data set mirrors images.
        fingerprint: SHA-256 of all images (for files: their names and sizes), vectors or pairs,
            labels and class names after splitting, so that a run is not resumed with other data. It
            depends neither on where the files are nor on what decodes them, nor on ``features``.
        corrupt: the files that could not be decoded so far; None if images are not in files.
        choice: which loader was chosen and why, in one line; "" if there was no choice.
        features: what made the vectors, fitted on the training rows; None for images and pairs.
    """

    name: str
    classes: tuple[str, ...]
    train: Part
    val: Part
    test: Part | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool
    fingerprint: str
    corrupt: CorruptFiles | None = None
    choice: str = ""
    features: Features | None = None

    @property
    def several_labels(self) -> bool:
        """Whether a row may have several labels, or none: then labels are (N, C)."""
        return self.train.labels.ndim == 2

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What a student gets for a row: one entry for each of V views; student k reads k % V."""
        return self.train.inputs


def build_dataset(
    raw: RawData, how: Labelling, *, features: Features | None = None, unlabelled: bool = False
) -> DataSet:
    """Split the rows that a reader found, and apply the options of `open_dataset` to them.

    Args:
        raw: what the reader found.
        how: the options.
        features: of a run, in place of those that would be fitted.
        unlabelled: whether ``train`` keeps the rows without a label that training leaves out. They
            count neither for the fingerprint nor for mean and deviation. Features are fitted to
            them too in any case.

    Raises:
        UserError: as `dml_fast.data.labelling.choose_rows`.
    """
    others = () if raw.corrupt is None else raw.corrupt.names
    found = choose_rows(raw.train, raw.val, raw.test, raw.classes, how, others)
    train, val, test = raw.train, raw.val, raw.test
    if val is None:
        val = train.subset(found.val)
    val = _labelled(val, found.val_labels, "validation")
    if test is not None and found.test_labels is not None:
        test = _labelled(test, found.test_labels, "test")
    if len(found.rows) < len(train):
        train = train.subset(found.rows)
    train = replace(train, labels=found.labels, hidden=found.hidden)
    used = train if found.used is None else train.subset(found.used)
    if features is None and raw.fit is not None and isinstance(train, RowSet):
        features = raw.fit(train.columns)  # of all rows: they are the same while labels grow
    mean, std = ((), ()) if isinstance(used, RowSet) else channel_stats(_for_stats(used))
    return DataSet(
        name=raw.name,
        classes=raw.classes,
        train=_read_by(features, train if unlabelled else used),
        val=_read_by(features, val),
        test=None if test is None else _read_by(features, test),
        mean=mean,
        std=std,
        pad=raw.pad,
        flip=raw.flip,
        fingerprint=_fingerprint(raw.classes, (used, val, test)),
        corrupt=raw.corrupt,
        choice=raw.choice,
        features=features,
    )


def _labelled(
    part: ImageSet | RowSet, labels: npt.NDArray[np.int64], what: str
) -> ImageSet | RowSet:
    """Return rows that are evaluated with their labels, of which there must be some."""
    if isinstance(part, RetrievalSet):
        return part
    without = int((labels < 0).sum())
    if without == len(labels):
        raise UserError(
            f"none of {len(labels)} {what} rows has a label, so nothing can be counted: give them "
            "labels, or leave them out"
        )
    if without:
        _log.info("%d of %d %s rows have no label: they are not counted", without, len(part), what)
    return part if labels is part.labels else replace(part, labels=labels)


def _read_by(features: Features | None, part: ImageSet | RowSet) -> ImageSet | VectorSet:
    """Return what students read of a part."""
    if not isinstance(part, RowSet):
        return part
    assert features is not None  # rows come with a way to fit them
    return part.read_by(features)


def _for_stats(train: ImageSet) -> npt.NDArray[np.uint8]:
    """Return the images for mean and deviation, (n, C, H, W) uint8, the same for every loader."""
    if isinstance(train.images, ImageFiles):
        return train.images.sample(_STATS_SAMPLE)
    if train.manifest is None:
        return train.images
    return train.images[np.unique(np.linspace(0, len(train) - 1, _STATS_SAMPLE).astype(np.int64))]


def channel_stats(
    images: npt.NDArray[np.uint8],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the mean and the population standard deviation of each channel.

    They come from integer histograms, so the result is exact and the same on any machine.

    Args:
        images: (N, C, H, W) uint8.

    Returns:
        Mean and deviation, C floats each, in units of 0..1. The deviation of a constant channel is
        given as 1, so that it can be divided by.
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


def _fingerprint(classes: tuple[str, ...], parts: tuple[ImageSet | RowSet | None, ...]) -> str:
    shapes = [None if part is None else _shape(part) for part in parts]
    header: dict[str, Any] = {"classes": classes, "shapes": shapes}
    if found := [part for part in parts if isinstance(part, RetrievalSet)]:
        cams = [None if part.cams is None else part.cams.tolist() for part in found]
        header["searches"] = [(part.queries, c) for part, c in zip(found, cams, strict=True)]
    digest = hashlib.sha256(json.dumps(header).encode())
    for part in parts:
        if part is not None:
            for content in _content(part):
                digest.update(content)
            digest.update(np.ascontiguousarray(part.labels, dtype="<i8").data)
    return digest.hexdigest()


def _shape(part: ImageSet | RowSet) -> Any:
    """Return the shape of the images, or that of each column of rows."""
    if isinstance(part, RowSet):
        return {name: column.shape for name, column in part.columns.items()}
    return part.images.shape


def _content(part: ImageSet | RowSet) -> Iterator[bytes | memoryview]:
    """Yield all bytes of a part: a text is JSON, so that it is clear where each ends."""
    if isinstance(part, RowSet):
        for column in part.columns.values():
            if column.dtype == object:
                yield json.dumps(column.tolist()).encode()
            else:
                yield np.ascontiguousarray(column.astype("<f4", copy=False)).data
    else:
        content = part.pixels if part.manifest is None else part.manifest.astype("<u8")
        yield np.ascontiguousarray(content).data
