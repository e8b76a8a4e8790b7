"""Open the data set that a spec such as ``cifar10:DIR`` names."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

from dml_fast.data.decode import Size
from dml_fast.data.features import Features, load_features
from dml_fast.data.label_files import read_labels
from dml_fast.data.labelling import Labelling
from dml_fast.data.offset_files import read_offsets
from dml_fast.data.pair_data import open_pairs
from dml_fast.data.pairs import PairSet
from dml_fast.data.readers.cifar import CIFAR, locate_cifar, read_cifar
from dml_fast.data.readers.digits import read_digits
from dml_fast.data.readers.folder import check_folder, read_folder
from dml_fast.data.readers.market1501 import (
    check_market1501,
    check_market1501_searches,
    read_market1501,
)
from dml_fast.data.readers.pairs import check_pairs, read_pairs
from dml_fast.data.readers.several_labels import has_label_table
from dml_fast.data.readers.shard_names import check_shards
from dml_fast.data.readers.shards import read_shards
from dml_fast.data.readers.text import check_text, read_text, read_text_part
from dml_fast.data.readers.vectors import check_vectors, read_vectors, read_vectors_part
from dml_fast.data.reading import LoaderName, Reading
from dml_fast.data.sets import DataSet, ImageSet, RawData, build_dataset
from dml_fast.data.vectors import VectorSet
from dml_fast.errors import UserError, check_choice, check_number, check_whole

_CHECKS: dict[str, Callable[[str], None]] = {
    "folder": lambda root: check_folder(_path(root)),
    "shards": check_shards,
    "market1501": lambda root: check_market1501(_path(root)),
    "text": check_text,
    "vectors": lambda root: check_vectors(_path(root)),
    "pairs": lambda root: check_pairs(_path(root)),
}
_KINDS = ("digits", *CIFAR, *_CHECKS)
_ROWS = {  # kinds without single images, each in a file
    "text": "FILE.tsv",
    "vectors": "FILE.npz",
    "pairs": "FILE.npz",
}
_FILES = "folder:, shards: and market1501:"


def check_data_spec(spec: str, *, download: bool = False) -> None:
    """Check a data spec as far as possible without reading images.

    Args:
        spec: see `open_dataset`.
        download: whether missing files may be downloaded later.

    Raises:
        UserError: the kind is unknown, or its folder is missing, empty or laid out differently.
    """
    kind, root = _parse(spec)
    if kind in _CHECKS:
        if download:
            why = "is downloaded if it is a URL" if kind == "shards" else "cannot be downloaded"
            raise UserError(f"{spec} {why}: leave out --download")
        _CHECKS[kind](root)
    elif kind in CIFAR and not download:
        locate_cifar(kind, _path(root))


def has_several_labels(spec: str) -> bool:
    """Return whether a row of the data may have several labels: a folder with labels.csv."""
    kind, root = _parse(spec)
    return kind == "folder" and has_label_table(_path(root))


def check_searches(spec: str, *, val_fraction: float, camera_rule: bool) -> None:
    """Check that a query has a match, for validation and for testing, by the files' names.

    Args:
        spec: ``market1501:DIR``.
        val_fraction: see `open_dataset`.
        camera_rule: see there.

    Raises:
        UserError: a name is wrong, or none has.
    """
    _, root = _parse(spec)
    check_market1501_searches(_path(root), val_fraction=val_fraction, camera_rule=camera_rule)


def open_dataset(
    spec: str,
    *,
    download: bool = False,
    val_fraction: float = 0.1,
    camera_rule: bool = True,
    train_fraction: float = 1.0,
    labels: str = "",
    labels_per_class: int = 0,
    label_noise: float = 0.0,
    unlabelled_share: float | Literal["auto"] = "auto",
    unlabelled: bool = False,
    classes: tuple[str, ...] = (),
    levels: tuple[str, ...] | None = None,
    dim: int = 200,
    patch: int = 24,
    search: int = 8,
    offsets: str = "",
    seed: int = 0,
    image_size: Size = 0,
    skip_corrupt: bool = False,
    loader: LoaderName = "auto",
    resized: bool = False,
    threads: int = 0,
    device: str = "cpu",
    features: str | os.PathLike[str] | Features | None = None,
) -> DataSet:
    """Read a data set into memory, or list its files for a decoder.

    Args:
        spec: ``digits``, ``cifar10:DIR``, ``cifar100:DIR``, ``folder:DIR``, ``shards:DIR``,
            ``shards:URL``, ``market1501:DIR``, ``text:FILE.tsv``, ``vectors:FILE.npz`` or
            ``pairs:FILE.npz`` (docs/data.md, docs/text.md).
        download: whether to download CIFAR into DIR if it is not there.
        val_fraction: the fraction of the training images that becomes the validation set, in
            (0, 1), stratified and the same for every seed. It is unused where the data set has
            validation images of its own (digits; folders and shards with val). For market1501 it
            is a fraction of the identities, and 0 means to validate on the test images.
        camera_rule: whether a query for validation needs a match by another camera (market1501).
        train_fraction: the fraction of the remaining training images that is used, in (0, 1];
            stratified, drawn with ``seed``, at least one image of each class.
        labels: a file of lines ``name<TAB>class`` (`dml_fast.data.label_files`): all other training
            rows lose their label; "" for none.
        labels_per_class: how many labels of each class are kept, drawn with ``seed``; all others
            are hidden. 0 keeps all.
        label_noise: the fraction of the training labels that is made wrong, in [0, 1), drawn with
            ``seed``. Validation and test labels do not change.
        unlabelled_share: the share of training batches that has no label, in [0, 1); with 0, such
            rows are left out.
        unlabelled: whether rows without a label are kept whatever their share; of pairs, those
            that ``offsets`` leaves out.
        classes: the names of all classes, for text and vectors; () for those of the labels.
        levels: names of the views to read, for text and vectors; () for all, None for one view.
        dim: the most dimensions of each view's features of text.
        patch: height and width of the crops of pairs, in pixels.
        search: the largest displacement of pairs, in pixels.
        offsets: a file of known displacements of pairs (`dml_fast.data.offset_files`); "" for none.
        seed: the run's seed.
        image_size: see `dml_fast.data.decode.Size`; for a folder, shards or market1501.
        skip_corrupt: whether files that cannot be decoded are left out and counted.
        loader: what holds and decodes the images of a folder, shards or market1501. All other
            data are resident.
        resized: whether training will show random parts of these images.
        threads: how many threads decode; 0 for one per core.
        device: the device that trains; ``auto`` asks for its free memory.
        features: those of a run, or its folder, for rows that are no images; None fits new ones to
            the training rows.

    Returns:
        The data set, split into training, validation and test images.

    Raises:
        UserError: an argument or a file is wrong, or no row to train, to validate or to test with
            has a label.
    """
    check_choice("loader", loader, get_args(LoaderName))
    check_whole("threads", threads, 0)
    check_whole("labels_per_class", labels_per_class, 0)
    for name, size in (("dim", dim), ("patch", patch), ("search", search)):
        check_whole(name, size, 1)
    if unlabelled_share != "auto":
        words = "auto, or a number from 0 to below 1"
        check_number("unlabelled_share", unlabelled_share, words, lambda x: 0 <= x < 1)
    check_whole("seed", seed, 0)
    for side in image_size if isinstance(image_size, tuple) else (image_size,):
        check_whole("image_size", side, 0)
    for name, share in (
        ("val_fraction", val_fraction),
        ("train_fraction", train_fraction),
        ("label_noise", label_noise),
    ):
        check_number(name, share, "a number from 0 to 1", lambda x: 0 <= x <= 1)
    check_data_spec(spec, download=download)
    whole = val_fraction == 0.0 and _parse(spec)[0] == "market1501"
    if not (0.0 < val_fraction < 1.0 or whole):
        raise UserError(f"val_fraction {val_fraction} must be above 0 and below 1")
    if not 0.0 < train_fraction <= 1.0:
        raise UserError(f"train_fraction {train_fraction} must be above 0 and at most 1")
    if not 0.0 <= label_noise < 1.0:
        raise UserError(f"label_noise {label_noise} must be at least 0 and below 1")
    if (labels or labels_per_class) and _parse(spec)[0] == "market1501":
        raise UserError(
            f"{'--labels' if labels else '--labels-per-class'} means nothing with --data {spec}, "
            "where files' names tell identities: leave it out"
        )
    if labels:
        read_labels(labels)  # before images are decoded for minutes
    if offsets:
        read_offsets(offsets)
    reading = Reading(image_size, skip_corrupt, loader, resized, threads, device)
    how = Labelling(
        val_fraction=val_fraction,
        train_fraction=train_fraction,
        label_noise=label_noise,
        labels=labels,
        labels_per_class=labels_per_class,
        unlabelled_share=unlabelled_share,
        seed=seed,
    )
    kind, root = _parse(spec)
    if kind == "pairs":
        _check_held(kind, reading)
        return open_pairs(
            _path(root), how, search=search, patch=patch, offsets=offsets, every=unlabelled
        )
    raw = _read(
        spec,
        reading,
        download=download,
        val_fraction=val_fraction,
        camera_rule=camera_rule,
        classes=classes,
        levels=levels,
        dim=dim,
    )
    if isinstance(features, str | os.PathLike):
        features = load_features(Path(features))
    return build_dataset(raw, how, features=features, unlabelled=unlabelled)


def open_part(spec: str, part: str, *, features: Features, classes: Sequence[str]) -> VectorSet:
    """Read one part of a file of rows, which is all of a file that says no parts.

    Args:
        spec: ``text:FILE.tsv`` or ``vectors:FILE.npz``.
        part: train, val or test.
        features: of the run whose students read the rows.
        classes: the names of its classes.

    Raises:
        UserError: a file is missing or wrong, or is not as the run's students read it, or has no
            row of that part, or none with a label.
    """
    check_data_spec(spec)
    kind, root = _parse(spec)
    if kind == "text":
        rows = read_text_part(root, part, classes)
    else:
        rows = read_vectors_part(_path(root), part, views=features.names, classes=classes)
    if (rows.labels < 0).all():
        raise UserError(
            f"none of {len(rows)} rows of {spec} has a label, so nothing can be counted: give them "
            "labels"
        )
    return rows.read_by(features)


def open_every_pair(spec: str, *, search: int, patch: int, seed: int) -> PairSet:
    """Read all pairs of a file, to evaluate the students of another.

    Args:
        spec: ``pairs:FILE.npz``.
        search: see `open_dataset`.
        patch: see there.
        seed: of the run that is evaluated.

    Raises:
        UserError: the file is missing or wrong.
    """
    _, root = _parse(spec)
    return read_pairs(_path(root), search=search, patch=patch, seed=seed)


def _read(
    spec: str,
    how: Reading,
    *,
    download: bool,
    val_fraction: float,
    camera_rule: bool,
    classes: tuple[str, ...],
    levels: tuple[str, ...] | None,
    dim: int,
) -> RawData:
    kind, root = _parse(spec)
    image_size = how.size
    if kind in _CHECKS and kind not in _ROWS:
        if min(image_size if isinstance(image_size, tuple) else (image_size + 1,)) < 1:
            raise UserError(f"--image-size {image_size} must be 0 or a number of pixels")
        if kind == "shards":
            return read_shards(root, how)
        if kind == "folder":
            return read_folder(_path(root), how)
        return read_market1501(_path(root), how, val_fraction=val_fraction, camera_rule=camera_rule)
    _check_held(kind, how)
    if kind in _ROWS:
        if kind == "text":
            return read_text(root, levels=levels, classes=classes, dim=dim)
        return read_vectors(_path(root), levels=levels, classes=classes)
    raw = read_digits() if kind == "digits" else read_cifar(kind, _path(root), download=download)
    assert isinstance(raw.train, ImageSet)
    if image_size not in (0, raw.train.images.shape[2], raw.train.images.shape[2:]):
        raise UserError(
            f"--image-size {image_size} is only for {_FILES} data, and {kind} images "
            f"have {raw.train.images.shape[2]} pixels per side: leave it out"
        )
    return raw


def _check_held(kind: str, how: Reading) -> None:
    """Refuse options for files of images with data that are held in memory."""
    for name, given in (("--loader", how.loader), ("--crop", "resized" if how.resized else "")):
        if given in ("dali", "fallback", "resized"):
            raise UserError(
                f"{name} {given} is only for {_FILES} data, and {kind} is held in memory: "
                "leave it out"
            )
    if kind in _ROWS and how.size:
        raise UserError(
            f"--image-size {how.size} is only for images, and {kind} has none: leave it out"
        )


def _parse(spec: str) -> tuple[str, str]:
    """Split ``kind:DIR`` into its two parts; the folder of digits is empty."""
    kind, colon, folder = spec.partition(":")
    if "\0" in spec:
        raise UserError(f"data {spec!r} holds a zero byte, which no path has: leave it out")
    if kind not in _KINDS:
        close = difflib.get_close_matches(kind.lower(), _KINDS, n=2) or _KINDS
        likely = next((k for k, form in _ROWS.items() if spec.endswith(form[-4:])), "folder")
        hint = f" or {likely}:{spec}" if os.path.exists(spec) else ""
        raise UserError(f"unknown data {spec!r}: did you mean {' or '.join(close)}{hint}?")
    if kind == "digits" and colon:
        raise UserError(f"data {spec!r} should be 'digits' alone: they need no folder")
    if kind != "digits" and not folder:
        what, form = ("file", _ROWS[kind]) if kind in _ROWS else ("folder", "DIR")
        raise UserError(f"data {spec!r} needs a {what}: write {kind}:{form}")
    return kind, folder


def _path(folder: str) -> Path:
    return Path(os.path.expanduser(folder))
