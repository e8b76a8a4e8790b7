"""The C++ extension (csrc/). An array that is not C-contiguous raises TypeError."""

import numpy as np
from numpy.typing import NDArray

def average_precision(ranks: NDArray[np.int64]) -> tuple[float, float, float]:
    """Score one query from the ranks of its positives.

    Args:
        ranks: (P,) int64, C-contiguous: the ranks of the query's P positives among its valid
            gallery items, counted from 1 and strictly rising.

    Returns:
        ``(ap, ap_trapezoid, inp)``, each in (0, 1]. ``ap`` is the mean of the precision at each
        positive. ``ap_trapezoid`` is the area under the precision-recall curve by the trapezoid
        rule, as in the official Market-1501 code (Zheng et al., ICCV 2015). ``inp`` is
        P / rank of the last positive (Ye et al., TPAMI 2021).

    Raises:
        TypeError: ``ranks`` is not int64 or not C-contiguous (nothing is copied in silence).
        ValueError: ``ranks`` is empty, not 1-D, not strictly rising, or below 1.
    """

def instruction_set() -> str:
    """Name the instruction set in use: ``baseline``, ``avx2`` or ``avx512``.

    It is the highest that this machine supports, or what the environment variable
    ``DML_FAST_ISA`` asks for.

    Raises:
        ValueError: ``DML_FAST_ISA`` names no instruction set, or one not supported here.
    """
