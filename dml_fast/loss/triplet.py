"""The batch-hard triplet loss (Hermans, Beyer and Leibe, arXiv 1703.07737, equation 5)."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-12  # squares are at least this, as the root has an infinite slope at 0


def triplet_loss(features: Tensor, target: Tensor, margin: float) -> Tensor:
    """Return the mean over images of relu(margin + farthest positive - nearest negative).

    The farthest positive is the largest distance to an image of the same identity, the nearest
    negative the smallest distance to one of another identity.

    Args:
        features: (N, D), any floating dtype.
        target: (N,) identities. An image that is alone with its identity has its farthest
            positive at distance 0; one that has no negative adds 0 to the mean.
        margin: a Euclidean distance.

    Returns:
        0-d, in float32 or the features' dtype, whichever is wider.
    """
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        norms = x.square().sum(1)
        squares = norms[:, None] + norms[None] - 2 * (x @ x.T)
    distances = squares.clamp_min(_TINY).sqrt()
    same = target[:, None] == target[None]
    farthest = distances.masked_fill(~same, 0.0).amax(1)
    nearest = distances.masked_fill(same, torch.inf).amin(1)
    return torch.relu(margin + farthest - nearest).mean()
