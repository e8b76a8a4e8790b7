"""Factors of rows, as numbers or as tensors: what the closed forms multiply by."""

from __future__ import annotations

from typing import overload

from torch import Tensor

Factor = float | Tensor  # for all rows: a number or (); for each row: (N,) or (K, N)


@overload
def column(factor: Tensor) -> Tensor: ...
@overload
def column(factor: Factor) -> Factor: ...
def column(factor: Factor) -> Factor:
    """Return the factor shaped to multiply (..., N, C)."""
    return factor.unsqueeze(-1) if isinstance(factor, Tensor) and factor.dim() else factor


def inverse(denominator: Factor) -> Factor:
    """Return the reciprocal, or 0 for 0, so that a mean over no rows is 0."""
    if isinstance(denominator, Tensor):
        return denominator.reciprocal().masked_fill_(denominator == 0, 0.0)
    return 1.0 / denominator if denominator else 0.0
