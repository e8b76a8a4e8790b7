"""Weights of the classes in the cross-entropy, as of `torch.nn.CrossEntropyLoss`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dml_fast.errors import UserError, brief


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """Return weights N / (C n_c), with which all classes count alike: (C,) float32.

    A class without a row counts as one row.

    Args:
        counts: n_c, the number of labelled rows of each of C classes; N is their sum.
    """
    rows = torch.tensor(counts, dtype=torch.float64)
    return (rows.sum() / (len(rows) * rows.clamp(min=1))).float()


def check_class_weight(weight: object, small_loss: float, device: torch.device) -> Tensor:
    """Return weights on the students' device.

    Raises:
        UserError: they are no tensor (C,) of finite numbers of at least 0, one of them above 0; or
            rows are left out by their loss.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not weight.is_floating_point():
        raise UserError(
            f"class_weight is {brief(weight)}: give a tensor (C,) with the weight of each class"
        )
    if not (weight.isfinite() & (weight >= 0)).all() or not weight.any():
        raise UserError(
            "class_weight holds a number that is negative or not finite, or zeros alone: give "
            "numbers of 0 or more"
        )
    if small_loss:
        raise UserError(
            f"small_loss is {small_loss} and compares losses, which class_weight multiplies: leave "
            "out one or the other"
        )
    return weight.detach().to(device)
