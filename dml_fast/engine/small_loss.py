"""Small-loss selection: a step leaves out the labelled rows that the cohort finds hardest to learn.

Networks learn rows with a right label first, so that a large loss is a sign of a wrong label.
JoCoR (Wei et al., CVPR 2020, arXiv 2003.02752) judges a row by all networks together: by the sum of
their cross-entropies and of the divergences between them (its λ / (1 - λ) is the weight of the
mutual term here). Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dml_fast.errors import UserError, check_number

ROUNDING = 1e-6  # 0.29 x 100 rows are 28.999...: 29 are meant


def joint_loss(losses: Tensor, labelled: Tensor) -> Tensor:
    """Return the joint loss of each row, (N,): the sum over the students; NaN without a label.

    A student whose logits of a row are no numbers has no say in that row: the mean of the others
    stands for its loss. Where that is so of all students, the joint loss is infinite.

    Args:
        losses: (K, N), cross-entropy and weighted divergence of each student.
        labelled: (N,) bool.
    """
    joint = losses.nanmean(0) * len(losses)
    joint = joint.masked_fill(joint.isnan(), torch.inf)
    return joint.masked_fill(~labelled, torch.nan)


def row_weights(joint: Tensor, share: float | Tensor) -> Tensor:
    """Return (N,) float32 weights that leave out the rows with the largest joint losses.

    These are 0. The n labelled rows that are kept weigh so much that their sum is the number of all
    labelled rows: a loss that divides by that number gives the mean over those kept. Rows without a
    label weigh 1.

    Args:
        joint: (N,) of `joint_loss`, of the whole batch.
        share: of the labelled rows to leave out, rounded down, below 1; one row always stays. Of
            equal rows the later ones are left out first.
    """
    labelled = ~joint.isnan()
    count = labelled.sum()
    left = torch.floor(share * count.double() + ROUNDING)
    kept = count - left.minimum(count - 1).clamp(min=0)
    order = joint.argsort(stable=True)  # rows without a label are last
    place = torch.empty_like(order)
    place.scatter_(0, order, torch.arange(len(order), device=order.device))
    weight = (place < kept) * (count / kept.clamp(min=1))
    return torch.where(labelled, weight, 1.0).float()


def check_small_loss(rate: float, method: str, update: str, feature_weight: float) -> None:
    """Refuse a rate out of range, and options beside which it means nothing.

    Raises:
        UserError: the option, and what to give.
    """
    check_number("small_loss", rate, "a number from 0 to below 1", lambda x: 0 <= x < 1)
    if not rate:
        return
    if method in ("independent", "dml_e"):
        remedy = "dml" if method == "dml_e" else "dml with a kl_weight of 0"
        raise UserError(f"small_loss is {rate} and method is {method}: give {remedy}")
    if update == "alternating":
        raise UserError(f"small_loss is {rate} and update is alternating: give simultaneous")
    if feature_weight:
        raise UserError(
            f"small_loss is {rate} and feature_weight {feature_weight}, whose loss would still "
            "use the rows that are left out: leave out one or the other"
        )
