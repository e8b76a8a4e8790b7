"""Where the bytes of image files are: in files (here), or in tar shards (`readers.samples`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dml_fast.errors import reason

Ids = npt.NDArray[np.int64]

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


def is_image(name: str) -> bool:
    """Return whether a file has the suffix of an image and is not hidden, by its name."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


class CorruptImageError(Exception):
    """An image file cannot be read or decoded."""


MOST_PIXELS = 178_956_970
"""The most pixels that an image may have, for every decoder. It is Pillow's limit; at that size the
decoded image takes half a GiB."""

_MOST_BYTES = 2 << 30  # of a file: an uncompressed TIFF of that many pixels has less


def check_sides(height: int, width: int) -> None:
    """Check an image's size, from its header, before memory is taken for its pixels.

    Raises:
        CorruptImageError: it has more than `MOST_PIXELS`, or none.
    """
    if min(height, width) < 1:
        raise CorruptImageError(f"{height}x{width} pixels")
    if height * width > MOST_PIXELS:
        raise CorruptImageError(
            f"{height}x{width} pixels, and at most {MOST_PIXELS:,} are allowed: make it smaller"
        )


def check_bytes(size: int) -> None:
    """Check the size of an image file in bytes before it is read.

    Raises:
        CorruptImageError: it has more bytes than an image can have.
    """
    if size > _MOST_BYTES:
        raise CorruptImageError(f"{size} bytes, and at most {_MOST_BYTES} are allowed")


class Storage(Protocol):
    """N image files, by index 0..N-1."""

    def __len__(self) -> int: ...

    def __getitem__(self, ids: Ids | slice) -> Storage:
        """Return some of the files, in the order of ``ids``."""
        ...

    def path(self, index: int) -> Path:
        """Return the path of a file; a tar shard counts as the folder of its members."""
        ...

    def size(self, index: int) -> int:
        """Return the size of a file in bytes, -1 if it is unknown; then `read` says why."""
        ...

    def read(self, index: int) -> bytes:
        """Return the content of a file.

        Raises:
            CorruptImageError: it cannot be read.
        """
        ...

    def ends(self, index: int, count: int) -> tuple[bytes, bytes]:
        """Return the first and the last ``count`` bytes of a file, fewer if it is shorter.

        Raises:
            CorruptImageError: it cannot be read.
        """
        ...


class LooseFiles:
    """Image files that are not in an archive.

    Args:
        names: (N,) paths as str. To make a `Path` takes a third as long as to read a small file.
    """

    def __init__(self, names: npt.NDArray[np.object_]) -> None:
        self._names = names

    @classmethod
    def of(cls, paths: Sequence[str | Path]) -> LooseFiles:
        """Make a storage of files, given their paths."""
        return cls(np.array([str(path) for path in paths], dtype=object))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, ids: Ids | slice) -> LooseFiles:
        """Return some of the files, in the order of ``ids``."""
        return LooseFiles(self._names[ids])

    def path(self, index: int) -> Path:
        """Return the path of a file."""
        return Path(self._names[index])

    def size(self, index: int) -> int:
        """Return the size of a file in bytes, -1 for a broken link."""
        try:
            return os.stat(self._names[index]).st_size
        except OSError:
            return -1

    def read(self, index: int) -> bytes:
        """Return the content of a file."""
        try:
            with open(self._names[index], "rb", buffering=0) as file:
                check_bytes(os.fstat(file.fileno()).st_size)
                return file.read()
        except OSError as error:
            raise CorruptImageError(reason(error)) from error

    def ends(self, index: int, count: int) -> tuple[bytes, bytes]:
        """Return the first and the last ``count`` bytes of a file, fewer if it is shorter."""
        try:
            with open(self._names[index], "rb", buffering=0) as file:
                start = file.read(count)
                file.seek(max(0, file.seek(0, os.SEEK_END) - count))
                return start, file.read(count)
        except OSError as error:
            raise CorruptImageError(reason(error)) from error
