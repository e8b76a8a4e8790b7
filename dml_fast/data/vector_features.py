"""Vectors as students read them: standardised by the mean and deviation of the training rows."""

from __future__ import annotations

from collections.abc import Mapping
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

KIND = "vectors"


@dataclass(frozen=True)
class VectorFeatures:
    """The mean and the deviation of each column of each view.

    Attributes:
        names: of the V views, which are columns of the data; "" for a view without a name.
        mean: V arrays (D_v,) float32.
        std: V arrays (D_v,) float32, above 0.
    """

    names: tuple[str, ...]
    mean: tuple[npt.NDArray[np.float32], ...]
    std: tuple[npt.NDArray[np.float32], ...]

    @classmethod
    def fit(cls, columns: Columns, names: tuple[str, ...]) -> VectorFeatures:
        """Measure the training rows, in float64.

        Args:
            columns: by name, (N, D_v) float32.
            names: of those that are views, in the order of the students.
        """
        views = [columns[name].astype(np.float64) for name in names]
        deviations = [view.std(axis=0).astype(np.float32) for view in views]
        return cls(
            names,
            tuple(view.mean(axis=0).astype(np.float32) for view in views),
            tuple(np.where(std > 0, std, np.float32(1)) for std in deviations),
        )

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array]) -> VectorFeatures:
        """Take them from the arrays of a file.

        Raises:
            Unfit: one is missing or of another type or shape.
        """
        names = tuple(map(str, taken(arrays, "views", str, -1)))
        mean = tuple(taken(arrays, f"{i}.mean", np.float32, -1) for i in range(len(names)))
        std = tuple(
            taken(arrays, f"{i}.std", np.float32, len(found)) for i, found in enumerate(mean)
        )
        return cls(names, mean, std)

    def transform(self, columns: Columns) -> tuple[npt.NDArray[np.float32], ...]:
        """Return the V views of N rows, each (N, D_v) float32.

        Raises:
            UserError: a view is missing or has another length.
        """
        views = []
        for name, mean, std in zip(self.names, self.mean, self.std, strict=True):
            if name not in columns:
                raise UserError(f"the vectors have no {_shown(name)}: give them with that name")
            found = columns[name]
            if found.shape[1:] != mean.shape:
                raise UserError(
                    f"{_shown(name)} has shape {found.shape} and the run's students take vectors "
                    f"of {len(mean)} numbers: give such vectors"
                )
            views.append((found.astype(np.float32, copy=False) - mean) / std)
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


def _shown(name: str) -> str:
    return f"array {name}" if name else "array x"
