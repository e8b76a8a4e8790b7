"""Logit adjustment: the classes' prior is part of training, and not of evaluation.

With z_k + log π in every loss, a student learns the z_k of a balanced problem: z_k + log π predicts
as the training rows are distributed, and z_k alone as if all classes were equally frequent (Menon
et al., Long-tail learning via logit adjustment, ICLR 2021, equation 10 with τ = 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dml_fast.errors import UserError, brief


def log_prior(counts: Sequence[int]) -> Tensor:
    """Return the logarithms of the classes' shares of the labelled rows: (C,) float32.

    A class without a row counts as one row: with a share of 0 its logit would be -inf.

    Args:
        counts: the number of labelled rows of each class.
    """
    rows = torch.tensor(counts, dtype=torch.float64).clamp(min=1)
    return (rows / rows.sum()).log().float()


def check_prior(prior: object, device: torch.device) -> Tensor:
    """Return a prior on the students' device.

    Raises:
        UserError: it is no tensor (C,) of finite numbers.
    """
    if not isinstance(prior, Tensor) or prior.dim() != 1 or not prior.is_floating_point():
        raise UserError(
            f"prior is {brief(prior)}: give a tensor (C,) with the logarithm of each class's share"
        )
    if not prior.isfinite().all():
        raise UserError(
            "prior holds a number that is not finite: a class without rows needs a small share, "
            "not 0"
        )
    return prior.detach().to(device)
