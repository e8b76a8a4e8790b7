"""Data sets and loaders. Importing this package loads neither torch nor a decoder.

The loaders, which need torch, are in `dml_fast.data.loaders`.
"""

from __future__ import annotations

from dml_fast.data.opening import (
    check_data_spec,
    check_searches,
    has_several_labels,
    open_dataset,
    open_every_pair,
    open_part,
)
from dml_fast.data.pairs import PairSet
from dml_fast.data.sets import DataSet, ImageSet, RetrievalSet
from dml_fast.data.vectors import VectorSet

__all__ = [
    "DataSet",
    "ImageSet",
    "PairSet",
    "RetrievalSet",
    "VectorSet",
    "check_data_spec",
    "check_searches",
    "has_several_labels",
    "open_dataset",
    "open_every_pair",
    "open_part",
]
