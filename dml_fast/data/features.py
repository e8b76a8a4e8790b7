"""Features of rows that are no images: fitted on the training rows, they belong to the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dml_fast.data import text_features, vector_features
from dml_fast.data.feature_files import ARRAYS_FILE, Columns, arrays_of, taken
from dml_fast.data.names import some_of
from dml_fast.data.vectors import VectorSet
from dml_fast.foreign import Unfit, reading


class Features(Protocol):
    """What turns the columns of a row into the vectors that students read."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the V views; student k reads view ``k % V``."""
        ...

    @property
    def digest(self) -> str:
        """The SHA-256 of all that is stored, which ``config.json`` holds too."""
        ...

    def transform(self, columns: Columns) -> tuple[npt.NDArray[np.float32], ...]:
        """Return the V views of N rows, each (N, D_v) float32; a row does not depend on others.

        Raises:
            UserError: the columns do not fit.
        """
        ...

    def files(self) -> dict[str, bytes]:
        """Return the files that `load_features` reads, by name; they hold no pickles."""
        ...


Fit = Callable[[Columns], Features]


@dataclass(frozen=True)
class RowSet:
    """Rows as a reader found them, before their features are known.

    Attributes:
        columns: see `Columns`.
        labels: (N,) int64, indices of the classes; -1 where a row has no label.
        names: one for each row.
        hidden: (N,) int64, as in `dml_fast.data.vectors.VectorSet`.
    """

    columns: Columns
    labels: npt.NDArray[np.int64]
    names: Sequence[str] = field(kw_only=True)
    hidden: npt.NDArray[np.int64] | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.labels)

    def read_by(self, features: Features) -> VectorSet:
        """Return the rows as students read them.

        Raises:
            UserError: the columns do not fit.
        """
        views = features.transform(self.columns)
        return VectorSet(views, self.labels, names=self.names, hidden=self.hidden)

    def subset(self, ids: npt.NDArray[np.int64]) -> RowSet:
        """Return the rows ``ids`` (n,) int64, in that order."""
        return RowSet(
            {name: column[ids] for name, column in self.columns.items()},
            self.labels[ids],
            names=some_of(self.names, ids),
            hidden=None if self.hidden is None else self.hidden[ids],
        )


def load_features(folder: Path) -> Features:
    """Read the features that were fitted for a run.

    Args:
        folder: with ``features.npz`` and, for text, ``vocabulary.json``.

    Raises:
        UserError: a file is missing, damaged, or does not fit the other.
    """
    arrays = arrays_of(folder)
    path = folder / ARRAYS_FILE
    with reading(path):
        kind = str(taken(arrays, "kind", str)[()])
        if kind == vector_features.KIND:
            return vector_features.VectorFeatures.of_arrays(arrays)
        if kind != text_features.KIND:
            raise Unfit(f"its kind is {kind[:40]!r}")
    return text_features.load(folder, arrays)
