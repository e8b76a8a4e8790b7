"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in the binary and in the python distribution.

Archives are read in place, only the files with known names. Nothing is unpacked to the disk.
"""

from __future__ import annotations

import gzip
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dml_fast.data.names import Names
from dml_fast.data.readers.download import download as fetch
from dml_fast.data.readers.unpickle import read_batch
from dml_fast.data.sets import ImageSet, RawData
from dml_fast.errors import UserError, printable
from dml_fast.foreign import reading

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_MOST_BYTES = 1 << 30  # of a file; the largest has 155 MB


class Distribution(NamedTuple):
    """One of the two forms in which a CIFAR set is published.

    Attributes:
        folder: the folder of the unpacked archive.
        archive: the name of the archive.
        train: the files with training images.
        test: the file with test images.
        names: the file with the class names.
        label_key: the key of the labels in the python form, "" for the binary form.
        names_key: the key of the class names in the python form.
        label_column: which of a record's ``label_bytes`` is the label, in the binary form.
        label_bytes: how many bytes come before the pixels of a record, in the binary form.
    """

    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    names: str
    label_key: str = ""
    names_key: str = ""
    label_column: int = 0
    label_bytes: int = 1

    @property
    def files(self) -> tuple[str, ...]:
        """All files that must exist; the one with the class names is the last."""
        return (*self.train, self.test, self.names)


class Cifar(NamedTuple):
    """A CIFAR set: its two forms, and the URL and SHA-256 of the archive of the python form."""

    python: Distribution
    binary: Distribution
    url: str
    sha256: str


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR = {
    "cifar10": Cifar(
        python=Distribution(
            folder="cifar-10-batches-py",
            archive="cifar-10-python.tar.gz",
            train=_BATCHES,
            test="test_batch",
            names="batches.meta",
            label_key="labels",
            names_key="label_names",
        ),
        binary=Distribution(
            folder="cifar-10-batches-bin",
            archive="cifar-10-binary.tar.gz",
            train=tuple(f"{name}.bin" for name in _BATCHES),
            test="test_batch.bin",
            names="batches.meta.txt",
        ),
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    ),
    "cifar100": Cifar(
        python=Distribution(
            folder="cifar-100-python",
            archive="cifar-100-python.tar.gz",
            train=("train",),
            test="test",
            names="meta",
            label_key="fine_labels",
            names_key="fine_label_names",
        ),
        binary=Distribution(
            folder="cifar-100-binary",
            archive="cifar-100-binary.tar.gz",
            train=("train.bin",),
            test="test.bin",
            names="fine_label_names.txt",
            label_column=1,
            label_bytes=2,
        ),
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    ),
}


def find_cifar(kind: str, root: Path) -> tuple[Distribution, Path] | None:
    """Look for a distribution in ``root``: its files, its usual folder, or its archive.

    Returns:
        The distribution and the folder or archive that holds it, or None.
    """
    forms = (CIFAR[kind].python, CIFAR[kind].binary)
    for form in forms:
        for place in (root, root / form.folder):
            if any(os.path.isfile(place / name) for name in form.files):
                return form, place
    for form in forms:
        if os.path.isfile(root / form.archive):
            return form, root / form.archive
    return None


def locate_cifar(kind: str, root: Path) -> tuple[Distribution, Path]:
    """Return what `find_cifar` finds.

    Raises:
        UserError: it finds nothing.
    """
    found = find_cifar(kind, root)
    if found is None:
        python, binary, *_ = CIFAR[kind]
        state = "has no CIFAR files" if os.path.isdir(root) else "does not exist"
        raise UserError(
            f"{kind}:{root} {state}: add --download, or put {python.archive}, {binary.archive} "
            f"or the folder {python.folder} or {binary.folder} there"
        )
    return found


def read_cifar(kind: str, root: Path, *, download: bool) -> RawData:
    """Read ``cifar10`` or ``cifar100`` (with its 100 fine labels).

    Args:
        kind: a key of `CIFAR`.
        root: the folder that holds the files, their usual folder, or the archive.
        download: whether to download the python archive into ``root`` if nothing is found.

    Raises:
        UserError: files are missing or damaged, or their content is not allowed.
    """
    if download and find_cifar(kind, root) is None:
        fetch(CIFAR[kind].url, root / CIFAR[kind].python.archive, CIFAR[kind].sha256)
    form, place = locate_cifar(kind, root)
    contents = _read_files(form, place)
    decode: Callable[[Distribution, bytes, str], ImageSet] = (
        _decode_python if form.label_key else _decode_binary
    )
    parts = {name: decode(form, contents[name], f"{place}/{name}") for name in form.files[:-1]}
    classes = _class_names(form, contents[form.names], f"{place}/{form.names}")
    for name, part in parts.items():
        _check_part(part, len(classes), f"{place}/{name}")
    train = [parts[name] for name in form.train]
    test, count = parts[form.test], sum(map(len, train))
    return RawData(
        name=kind,
        classes=classes,
        train=ImageSet(
            np.concatenate([part.images for part in train]),
            np.concatenate([part.labels for part in train]),
        ),
        val=None,
        # numbered on, so that no name of a test image is that of a training image
        test=replace(test, names=Names.numbered(len(test), first=count)),
        pad=4,
        flip=True,
    )


def _read_files(form: Distribution, place: Path) -> dict[str, bytes]:
    if os.path.isdir(place):
        contents = {
            name: _content(place / name) for name in form.files if os.path.isfile(place / name)
        }
    else:
        contents = _read_archive(form, place)
    if missing := [name for name in form.files if name not in contents]:
        raise UserError(
            f"{place} lacks {', '.join(missing)}: unpack or download {form.archive} again"
        )
    return contents


def _read_archive(form: Distribution, archive: Path) -> dict[str, bytes]:
    wanted = {f"{form.folder}/{name}": name for name in form.files}
    contents = {}
    with (
        reading(archive, "delete it and give --download"),
        gzip.open(archive) as whole,
        tarfile.open(fileobj=whole, mode="r:") as tar,
    ):
        for member in tar:
            name = wanted.get(member.name)
            if name is not None and member.isreg():
                _check_bytes(member.size, f"{archive}/{name}")
                stream = tar.extractfile(member)
                assert stream is not None  # it is a regular file
                contents[name] = stream.read()
        while whole.read(1 << 20):  # at its end is the checksum
            pass
    return contents


def _content(path: Path) -> bytes:
    with reading(path, "unpack or download the data again"):
        _check_bytes(path.stat().st_size, path)
        return path.read_bytes()


def _check_bytes(size: int, what: str | Path) -> None:
    if size > _MOST_BYTES:
        raise UserError(f"{what} has {size} bytes, and CIFAR's files are smaller: replace it")


def _decode_python(form: Distribution, raw: bytes, origin: str) -> ImageSet:
    batch = read_batch(raw, origin)
    pixels, labels = batch.get("data"), batch.get(form.label_key)
    if not (
        isinstance(pixels, np.ndarray)
        and pixels.ndim == 2
        and pixels.shape[1] == _PIXELS
        and isinstance(labels, list)
        and all(type(label) is int and abs(label) < 1 << 31 for label in labels)
        and len(pixels) == len(labels)
    ):
        raise UserError(
            f"{origin} is not a CIFAR batch: it needs (N, {_PIXELS}) 'data' and N "
            f"{form.label_key!r}; delete it and download the data again"
        )
    return ImageSet(_as_images(pixels), np.array(labels, dtype=np.int64))


def _decode_binary(form: Distribution, raw: bytes, origin: str) -> ImageSet:
    record_bytes = form.label_bytes + _PIXELS
    if len(raw) % record_bytes:
        raise UserError(
            f"{origin} is damaged: {len(raw)} bytes are not a multiple of {record_bytes}, the size "
            "of a record; delete it and download the data again"
        )
    records = np.frombuffer(raw, dtype=np.uint8).reshape(-1, record_bytes)
    labels = records[:, form.label_column].astype(np.int64)
    return ImageSet(_as_images(records[:, form.label_bytes :]), labels)


def _class_names(form: Distribution, raw: bytes, origin: str) -> tuple[str, ...]:
    if not form.names_key:
        return tuple(raw.decode("latin1").split())
    names: Any = read_batch(raw, origin).get(form.names_key)
    if not (isinstance(names, list) and all(isinstance(name, bytes | str) for name in names)):
        raise UserError(
            f"{origin} has no {form.names_key!r}: delete it and download the data again"
        )
    return tuple(
        name.decode("latin1") if isinstance(name, bytes) else printable(name) for name in names
    )


def _check_part(part: ImageSet, num_classes: int, origin: str) -> None:
    if len(part) == 0:
        raise UserError(f"{origin} holds no images: delete it and download the data again")
    if part.labels.min() < 0 or part.labels.max() >= num_classes:
        raise UserError(
            f"{origin} has labels from {part.labels.min()} to {part.labels.max()} for "
            f"{num_classes} classes: delete it and download the data again"
        )


def _as_images(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return pixels.reshape(-1, *_SHAPE).copy()
