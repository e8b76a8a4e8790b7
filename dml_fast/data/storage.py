"""Where the bytes of image files are: here in files of their own; `samples` has tar shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dml_fast.errors import reason

Ids = npt.NDArray[np.int64]


class CorruptImageError(Exception):
    """A file cannot be read or decoded."""


class Storage(Protocol):
    """N image files, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, ids: Ids | slice) -> Storage:
        """Some of the files, in that order."""
        ...

    def path(self, index: int) -> Path:
        """Names a file; a member of a tar shard is named as if the shard were its folder."""
        ...

    def size(self, index: int) -> int:
        """Its bytes; -1 if nobody knows, which reading it will explain."""
        ...

    def read(self, index: int) -> bytes:
        """Returns the whole file.

        Raises:
            CorruptImageError: it cannot be read.
        """
        ...

    def ends(self, index: int, count: int) -> tuple[bytes, bytes]:
        """Returns its first and last ``count`` bytes, or fewer.

        Raises:
            CorruptImageError: it cannot be read.
        """
        ...


class LooseFiles:
    """Files of their own.

    Args:
        names: (N,) of str: a `Path` would take a third of the time that reading a small file does.
    """

    def __init__(self, names: npt.NDArray[np.object_]) -> None:
        self._names = names

    @classmethod
    def of(cls, paths: Sequence[Path]) -> LooseFiles:
        """Takes files by their paths."""
        return cls(np.array([str(path) for path in paths], dtype=object))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, ids: Ids | slice) -> LooseFiles:
        """Some of the files, in that order."""
        return LooseFiles(self._names[ids])

    def path(self, index: int) -> Path:
        """Names a file."""
        return Path(self._names[index])

    def size(self, index: int) -> int:
        """Its bytes, or -1: a broken link."""
        try:
            return os.stat(self._names[index]).st_size
        except OSError:
            return -1

    def read(self, index: int) -> bytes:
        """Returns the whole file."""
        try:
            with open(self._names[index], "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise CorruptImageError(reason(error)) from error

    def ends(self, index: int, count: int) -> tuple[bytes, bytes]:
        """Returns its first and last ``count`` bytes, or fewer."""
        try:
            with open(self._names[index], "rb", buffering=0) as file:
                start = file.read(count)
                file.seek(max(0, file.seek(0, os.SEEK_END) - count))
                return start, file.read(count)
        except OSError as error:
            raise CorruptImageError(reason(error)) from error
