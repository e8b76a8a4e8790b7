"""The samples of tar shards: which image and label belong together, and where the image is.

Only the headers of a tar are read, and it is not unpacked. An index in memory has the offset of
each image, so that any of them can be read at any time.
"""

from __future__ import annotations

import os
import posixpath
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dml_fast.data.listing import HIDDEN, OTHER, PassedOver
from dml_fast.data.readers.tar import DamagedTarError, Member, Reader, walk
from dml_fast.data.storage import SUFFIXES, CorruptImageError, Ids, check_bytes
from dml_fast.errors import UserError, reason
from dml_fast.machine import read_at

_OPEN_AT_ONCE = 64  # shards
_LABEL = ".cls"
_LONGEST_LABEL = 64  # bytes
# as in WebDataset: the key ends at the first dot of the base name
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)(\.[^/]*)", re.DOTALL)


class Index(NamedTuple):
    """The samples of a tar.

    Attributes:
        images: n images, in the order of the tar.
        labels: their n labels; -1 for each image of a shard without labels.
        damage: what is wrong with the tar after these samples; "" if nothing is.
        passed: the members that are no part of a sample.
    """

    images: list[Member]
    labels: list[int]
    damage: str
    passed: PassedOver


def read_index(path: Path) -> Index:
    """Read the headers and labels of a tar, up to its end or to the first damage.

    A tar in which no sample has a label is one of images without labels.

    Raises:
        UserError: some samples have no label, or one has no image, a label is not a whole number,
            or two samples have the same key.
    """
    images: dict[str, Member] = {}
    labels: dict[str, int] = {}
    damage, passed = "", PassedOver()
    try:
        if not (os.path.isfile(path) or os.path.isdir(path)):
            os.stat(path)
            raise DamagedTarError("not a file")  # to open a pipe would wait for ever
        with path.open("rb", buffering=0) as file:
            read = Reader(file.fileno())
            for member in walk(read, lambda name: passed.add("links or devices", str(path / name))):
                match = _KEY.fullmatch(member.name)
                suffix = match[2].lower() if match else ""
                if not match or (suffix != _LABEL and suffix not in SUFFIXES):
                    hidden = posixpath.basename(member.name).startswith(".")
                    passed.add(HIDDEN if hidden else OTHER, str(path / member.name))
                    continue
                key = match[1]
                if key in (labels if suffix == _LABEL else images):
                    what = "label" if suffix == _LABEL else "image"
                    raise UserError(
                        f"{path / member.name} is a second {what} of {key!r} in that shard: give "
                        "each sample its own key"
                    )
                if suffix == _LABEL:
                    labels[key] = _label(
                        read(member.offset, min(member.size, _LONGEST_LABEL)), path / member.name
                    )
                else:
                    images[key] = member
    except DamagedTarError as error:
        damage = str(error)
    except OSError as error:
        damage = reason(error)
    if images and not labels:
        kept = list(images)
        if damage:
            # the label of the last one may have been lost: files of a sample are side by side
            kept.pop()
        return Index([images[key] for key in kept], [-1] * len(kept), damage, passed)
    whole = images.keys() & labels.keys()
    if not damage and (odd := (images.keys() | labels.keys()) - whole):
        key = min(odd)
        if key in images:
            raise UserError(
                f"{path} has no label ({key}{_LABEL}) for the sample {key!r}: add it, remove the "
                "sample, or put samples without a label into shards of their own"
            )
        raise UserError(
            f"{path} has no image ({key}.jpg or the like) for the sample {key!r}: add it, or "
            "remove the sample"
        )
    if not damage and not whole:
        damage = "it holds no sample: an image and its label, such as 0001.jpg and 0001.cls"
    kept = [key for key in images if key in whole]
    return Index([images[key] for key in kept], [labels[key] for key in kept], damage, passed)


def _label(content: bytes, path: Path) -> int:
    text = content.decode("utf-8", "replace").strip()
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise UserError(
            f"{path} is {text[:20]!r}: a label is a whole number, 0 or more, the index of its class"
        )
    return int(text)


class _Descriptor:
    """An open file, which is closed when this object is deleted."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class TarMembers:
    """Images in tars, as a `Storage`.

    Args:
        tars: the tars.
        tar: (N,) int64, the index of the tar that each image is in.
        labels: (N,) int64, the label of each image; -1 for none.
        names: (N,) str, the name of each image in its tar.
        offsets: (N,) int64, in bytes.
        sizes: (N,) int64, in bytes.
    """

    def __init__(
        self,
        tars: tuple[Path, ...],
        tar: Ids,
        labels: Ids,
        names: npt.NDArray[np.object_],
        offsets: Ids,
        sizes: Ids,
    ) -> None:
        self.tar, self.labels = tar, labels
        self._tars, self._names, self._offsets, self._sizes = tars, names, offsets, sizes
        self._open = lru_cache(_OPEN_AT_ONCE)(_Descriptor)

    @classmethod
    def of(cls, tars: list[Path], indices: list[Index]) -> TarMembers:
        """Make a storage of all images of some tars, in order."""
        members = [member for index in indices for member in index.images]
        counts = [len(index.images) for index in indices]
        return cls(
            tuple(tars),
            np.repeat(np.arange(len(tars)), counts),
            np.array([label for index in indices for label in index.labels], np.int64),
            np.array([member.name for member in members], dtype=object),
            np.array([member.offset for member in members], np.int64),
            np.array([member.size for member in members], np.int64),
        )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, ids: Ids | slice) -> TarMembers:
        """Return some of the images, in the order of ``ids``."""
        return TarMembers(
            self._tars,
            self.tar[ids],
            self.labels[ids],
            self._names[ids],
            self._offsets[ids],
            self._sizes[ids],
        )

    def path(self, index: int) -> Path:
        """Return the path of an image: the tar, then the name in the tar."""
        return Path(self._tars[self.tar[index]], self._names[index])

    def shard(self, index: int) -> Path:
        """Return the tar that holds an image."""
        return self._tars[int(self.tar[index])]

    def size(self, index: int) -> int:
        """Return the size of an image file in bytes."""
        return int(self._sizes[index])

    def read(self, index: int) -> bytes:
        """Return the content of an image file."""
        check_bytes(self.size(index))
        return self._read(index, 0, self.size(index))

    def ends(self, index: int, count: int) -> tuple[bytes, bytes]:
        """Return the first and the last ``count`` bytes of a file, fewer if it is shorter."""
        size = self.size(index)
        few = min(count, size)
        return self._read(index, 0, few), self._read(index, size - few, few)

    def _read(self, index: int, start: int, count: int) -> bytes:
        try:
            file = self._open(self._tars[self.tar[index]])
            content = read_at(file.number, count, int(self._offsets[index]) + start)
        except OSError as error:
            raise CorruptImageError(reason(error)) from error
        if len(content) < count:
            raise CorruptImageError("its shard became shorter after the start")
        return content
