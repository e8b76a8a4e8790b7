"""Vectors as students read them: standardised by the mean and deviation of the training rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dml_fast.data.feature_files import (
    ARRAYS_FILE,
    Array,
    Columns,
    arrays_to_bytes,
    digest_of,
    taken,
)
from dml_fast.errors import UserError
from dml_fast.foreign import Unfit

KIND = "vectors"

_TOGETHER = 4096  # rows


@dataclass(frozen=True)
class VectorFeatures:
    """The mean and the deviation of each column of each view.

    Attributes:
        names: of the V views, which are columns of the data; "" for a view without a name.
        mean: V arrays (D_v,) float64.
        std: V arrays (D_v,) float64, above 0; 1 for a column that was constant.
    """

    names: tuple[str, ...]
    mean: tuple[npt.NDArray[np.float64], ...]
    std: tuple[npt.NDArray[np.float64], ...]

    @classmethod
    def fit(cls, columns: Columns, names: tuple[str, ...]) -> VectorFeatures:
        """Measure the training rows, in float64; the result does not depend on the machine's cores.

        Args:
            columns: by name, (N, D_v) float32.
            names: of those that are views, in the order of the students.
        """
        mean, std = zip(*(_mean_and_std(columns[name]) for name in names), strict=True)
        return cls(names, mean, std)

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array]) -> VectorFeatures:
        """Take them from the arrays of a file.

        Raises:
            Unfit: one is missing or of another type or shape.
        """
        names = tuple(map(str, taken(arrays, "views", str, -1)))
        mean = tuple(taken(arrays, f"{i}.mean", np.float64, -1) for i in range(len(names)))
        std = tuple(
            taken(arrays, f"{i}.std", np.float64, len(found)) for i, found in enumerate(mean)
        )
        if not names or not all((found > 0).all() for found in std):
            raise Unfit("its deviations are not above 0")
        return cls(names, mean, std)

    def transform(self, columns: Columns) -> tuple[npt.NDArray[np.float32], ...]:
        """Return the V views of N rows, each (N, D_v) float32.

        Raises:
            UserError: a view is missing or has another length.
        """
        views = []
        for name, mean, std in zip(self.names, self.mean, self.std, strict=True):
            if name not in columns:
                raise UserError(f"there is no {array_name(name)}: give vectors of that name")
            found = columns[name]
            if found.shape[1:] != mean.shape:
                raise UserError(
                    f"{array_name(name)} has {found.shape[1]} columns, and the run's students take "
                    f"vectors of {len(mean)} numbers: give such vectors"
                )
            view = np.empty(found.shape, np.float32)
            with np.errstate(over="ignore"):
                for part in _parts(len(found)):
                    view[part] = (found[part] - mean) / std
            if len(far := np.flatnonzero(~np.isfinite(view).all(axis=1))):
                raise UserError(
                    f"{array_name(name)}, row {far[0]}, is too far from the training rows for "
                    "float32: leave it out"
                )
            views.append(view)
        return tuple(views)

    @property
    def digest(self) -> str:
        """The SHA-256 of all that is stored."""
        return digest_of(self._arrays())

    def files(self) -> dict[str, bytes]:
        """Return what a run folder holds, by name."""
        return {ARRAYS_FILE: arrays_to_bytes(self._arrays())}

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        arrays: dict[str, npt.NDArray[Any]] = {
            "kind": np.array(KIND),
            "views": np.array(self.names, dtype=str),
        }
        for i, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            arrays |= {f"{i}.mean": mean, f"{i}.std": std}
        return arrays


def array_name(view: str) -> str:
    """Return what a view is called in a file of vectors."""
    return f"x_{view}" if view else "x"


def _mean_and_std(
    view: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return mean and population deviation of each column, (D,); that of a constant one is 1."""
    total, squares = (np.zeros(view.shape[1]) for _ in range(2))
    for part in _parts(len(view)):
        total += view[part].sum(axis=0, dtype=np.float64)
    mean = total / len(view)
    for part in _parts(len(view)):
        squares += np.square(view[part] - mean).sum(axis=0)
    constant = (view == view[0]).all(axis=0)  # its mean need not be exact
    deviation = np.sqrt(squares / len(view))
    return np.where(constant, view[0], mean), np.where(constant, 1.0, deviation)


def _parts(count: int) -> Iterator[slice]:
    """Yield slices of rows, so that their copies in float64 stay small."""
    for start in range(0, count, _TOGETHER):
        yield slice(start, start + _TOGETHER)
