"""The names of rows: by them a file of labels finds rows again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from dml_fast.data.storage import Storage

Ids = npt.NDArray[np.int64]


class Names(Sequence[str]):
    """The names of N rows, each made when it is asked for: there may be millions.

    Args:
        name_of: the name of a row of the reader, by its index there.
        rows: (N,) int64, these indices.
    """

    def __init__(self, name_of: Callable[[int], str], rows: Ids) -> None:
        self._name_of, self._rows = name_of, rows

    @classmethod
    def numbered(cls, count: int, first: int = 0) -> Names:
        """Name ``count`` rows by their index, beginning with ``first``."""
        return cls(str, np.arange(first, first + count))

    @classmethod
    def of_files(cls, root: Path, files: Storage) -> Names:
        """Name files by their path relative to the data folder, with ``/`` on any system."""
        return cls(lambda i: files.path(i).relative_to(root).as_posix(), np.arange(len(files)))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice | Ids) -> Names: ...
    def __getitem__(self, index: int | slice | Ids) -> str | Names:
        """Return one name, or some of them in the order of (n,) int64 indices."""
        if isinstance(index, slice | np.ndarray):
            return Names(self._name_of, self._rows[index])
        return self._name_of(int(self._rows[index]))

    def __iter__(self) -> Iterator[str]:
        return map(self._name_of, self._rows.tolist())


def some_of(names: Sequence[str], ids: Ids) -> Sequence[str]:
    """Return the names of the rows ``ids`` (n,) int64, in that order."""
    return names[ids] if isinstance(names, Names) else tuple(names[i] for i in ids.tolist())
