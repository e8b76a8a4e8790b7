"""Rows that are vectors, seen from one side or from several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dml_fast.data.names import some_of
from dml_fast.models.inputs import InputSpec


@dataclass(frozen=True)
class VectorSet:
    """N rows in V views, each with a label and a name.

    Attributes:
        views: V arrays (N, D_v) float32; student k reads view ``k % V``.
        labels: (N,) int64, indices of `DataSet.classes`; -1 for a row without a label.
        names: the N rows' names; by default their indices.
        hidden: (N,) int64, the labels that rows had before some were hidden or made wrong, -1 where
            there was none; None if nothing was. Only studies may read it.
    """

    views: tuple[npt.NDArray[np.float32], ...]
    labels: npt.NDArray[np.int64]
    names: Sequence[str] = field(default=(), kw_only=True)
    hidden: npt.NDArray[np.int64] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not self.names:
            object.__setattr__(self, "names", tuple(map(str, range(len(self.labels)))))

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, ids: npt.NDArray[np.int64]) -> VectorSet:
        """Return copies of the rows ``ids`` (n,) int64, in that order."""
        return VectorSet(
            tuple(view[ids] for view in self.views),
            self.labels[ids],
            names=some_of(self.names, ids),
            hidden=None if self.hidden is None else self.hidden[ids],
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of columns D_v of each view."""
        return tuple(view.shape[1] for view in self.views)

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What a student gets for a row, one entry for each of the V views."""
        return tuple(InputSpec("vector", (width,)) for width in self.widths)
