"""The batch-hard triplet loss (Hermans, Beyer and Leibe, arXiv 1703.07737, equation 5)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dml_fast.errors import brief, check_number
from dml_fast.loss.values import dense, fail, finite, number, tensor

_TINY = 1e-12  # squares are at least this, as the root has an infinite slope at 0


class TripletLoss(nn.Module):
    """`triplet_loss` with a margin, as a module of features (N, D) and target (N,).

    Args:
        margin: a Euclidean distance, 0 or more.

    Raises:
        UserError: the margin is something else.
    """

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__()
        check_number("margin", margin, "a finite number, 0 or more", lambda x: 0 <= x < math.inf)
        self.margin = margin

    def forward(self, features: Tensor, target: Any) -> Tensor:
        """Return the 0-d loss."""
        return triplet_loss(features, target, self.margin)


def triplet_loss(features: Tensor, target: Any, margin: float) -> Tensor:
    """Return the mean over images of relu(margin + farthest positive - nearest negative).

    The farthest positive is the largest distance to an image of the same identity, the nearest
    negative the smallest distance to one of another identity.

    Args:
        features: (N, D), any floating dtype.
        target: (N,) identities, integers in a tensor, list or numpy array. An image that is alone
            with its identity has its farthest positive at distance 0; one that has no negative
            adds 0 to the mean.
        margin: a Euclidean distance.

    Returns:
        0-d, in float32 or the features' dtype, whichever is wider.

    Raises:
        UserError: if an argument has a wrong shape, device, dtype or value.
    """
    if not isinstance(features, Tensor) or not features.is_floating_point():
        fail(f"features is {brief(features)}", "pass a floating-point tensor (N, D)")
    if dense(features, "features").dim() != 2:
        fail(f"features has shape {tuple(features.shape)}", "it must be (N, D)")
    target = tensor(target, "target", features.device)
    if target.is_floating_point() or target.is_complex() or target.shape != features.shape[:1]:
        fail(f"target is {brief(target)}", f"pass {len(features)} integer identities")
    if target.device != features.device:
        fail(f"target is on {target.device} and features on {features.device}", "move it there")
    if not len(features):
        fail("features has no rows", "pass at least one image")
    margin = number(margin, "margin")
    if not finite(margin):
        fail(f"margin is {margin}", "pass a finite number")
    target = target.long()
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        norms = x.square().sum(1)
        squares = norms[:, None] + norms[None] - 2 * (x @ x.T)
    distances = squares.clamp_min(_TINY).sqrt()
    same = target[:, None] == target[None]
    farthest = distances.masked_fill(~same, 0.0).amax(1)
    nearest = distances.masked_fill(same, torch.inf).amin(1)
    return torch.relu(margin + farthest - nearest).mean()
